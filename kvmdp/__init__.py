"""kvmdp: KVM demand paging, emulated from user space on unpatched kernels.

Three rooms are useful by themselves: `kvmdp.kvm`, bare bindings to /dev/kvm; `kvmdp.machine`, a guest under demand
paging; `kvmdp.lab`, runs of such a guest that are proven (`kvmdp.lab.experiment.run_workload`). `kvmdp.cli` is the
command. `README.md` beside this file shows all rooms and where to begin.
"""

__version__ = "0.1.0"
