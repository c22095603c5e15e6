"""The error that says what a host lacks."""

from __future__ import annotations


class UnsupportedError(Exception):
    """This host lacks what is wanted: the message says what, and what would provide it."""
