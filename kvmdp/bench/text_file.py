"""Text files that a user names as input: one that has no end is refused, not read until memory runs out."""

from __future__ import annotations

import stat
from pathlib import Path


def read_text(path: str | Path) -> str:
    """Return what a file, or a pipe, has. Raises ValueError for any other kind, UnicodeDecodeError; OSError."""
    mode = Path(path).stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise ValueError(f"{path} is neither a file nor a pipe")
    return Path(path).read_text(encoding="utf-8")
