"""`linux/close_range.h`: closing many descriptors in one call, those of the calling thread alone if it wishes.

glibc has a wrapper from 2.34 on; the number of the system call is the same everywhere but on Alpha.
"""

from __future__ import annotations

NR_close_range = 436  # __NR_close_range, asm/unistd_64.h; Linux 5.9

# Give the calling thread a descriptor table of its own first; of what is closed it gets no copy even for a moment.
CLOSE_RANGE_UNSHARE = 1 << 1
