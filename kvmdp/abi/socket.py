"""Socket options that Python's `socket` does not have yet. After `asm-generic/socket.h`."""

from __future__ import annotations

SO_PEERPIDFD = 77  # Linux 6.5
