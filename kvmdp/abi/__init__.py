"""What the kernel's headers say and nothing more, one module a header.

Names are the kernel's, verbatim.  Structures are :mod:`ctypes` ones for x86-64; ioctl numbers are
derived from their sizes.  :mod:`kvmdp.abi.libc` is the one place that calls C.
"""
