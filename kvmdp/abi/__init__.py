"""What the kernel's headers say and nothing more, one module a header.

Names are the kernel's, verbatim.  Structures are `ctypes` ones for x86-64; ioctl numbers are
derived from their sizes.  `kvmdp.abi.libc` is the one place that calls C.
"""
