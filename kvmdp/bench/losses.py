"""What a comparison goes on without: contenders that this host cannot run, and those of which a run has failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from kvmdp.errors import UnsupportedError
from kvmdp.kvm import KvmError
from kvmdp.shortage import in_words, named

_Measured = TypeVar("_Measured")


@dataclass(slots=True)
class Losses:
    """By name, with the reason: `skipped`, for this host cannot run it; `failed`, for it was run and failed."""

    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.skipped or name in self.failed

    def spare(self, name: str, measure: Callable[[], _Measured]) -> _Measured | None:
        """Return what `measure` returns; None if it raises, which is noted of `name`."""
        try:
            with named():
                return measure()
        except (UnsupportedError, KvmError) as error:
            self.skipped[name] = str(error)
        except Exception as error:  # whatever it is, the others' figures are not lost to it
            self.failed[name] = in_words(error)
        return None
