"""kvmdp: KVM demand paging, emulated from user space on unpatched kernels.

`README.md` beside this file shows the rooms and where to begin. Two are useful by themselves: `kvmdp.kvm`, bare
bindings to /dev/kvm, and `kvmdp.machine`, a guest under demand paging.
"""

__version__ = "0.1.0"
