"""kvmdp: KVM demand paging, emulated from user space on unpatched kernels.

The package is a house of six floors; every import runs down (abi and source; kvm and
memory; paging; machine; bench; cli). Start with ``kvmdp.kvm`` for bare bindings to
``/dev/kvm`` and with ``kvmdp.machine`` for a guest under demand paging.
"""

__version__ = "0.1.0"
