"""How much the tests try: KVMDP_EFFORT is quick (about a minute), normal (what a change must pass) or full (hours)."""

import os
from typing import TypeVar

T = TypeVar("T")

EFFORTS = ("quick", "normal", "full")
EFFORT = os.environ.get("KVMDP_EFFORT") or "normal"


def by_effort(quick: T, normal: T, full: T) -> T:
    """Return what goes with the effort that was asked for: a number of rounds, of seconds, of pages."""
    return (quick, normal, full)[EFFORTS.index(EFFORT)]
