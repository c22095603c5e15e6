"""What a collapse is worth, as KVM's statistics and the guest's own speed have it.

The guest touches its memory again for that (`Machine.restart`): KVM maps what is touched, and as large as it can.

Units: seconds, pages of 4 KiB.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmdp.jobs.collapse import CollapsePolicy, Collapser
from kvmdp.kvm import KvmError
from kvmdp.machine.machine import Machine
from kvmdp.machine.workloads import WorkloadOptions, make_workload
from kvmdp.page import PAGE_SIZE

_TIMED_TOUCHES = 1 << 20  # of each vCPU: enough to see the cost of a TLB miss


@dataclass(frozen=True, slots=True)
class Touched:
    """What KVM had mapped once the guest had touched its memory, and how fast the guest touched it after that.

    `mapped` has KVM's statistics pages_4k, pages_2m and pages_1g, None each that this kernel does not have.
    """

    mapped: dict[str, int | None]
    pages_per_second: float


@dataclass(frozen=True, slots=True)
class CollapseResult:
    """What was put together, by which policy, in `seconds` of work; how often vCPUs were stopped while the guest ran
    or for this, and how long at most.

    `supported` is False where nothing can be put together: with this trap, this memory or on this kernel. `before` and
    `after` are None if fewer pages are present in a row than there are vCPUs; `before` also where the policy put
    pages together while the guest ran.
    """

    policy: CollapsePolicy
    supported: bool
    pages: int
    seconds: float
    stops: int
    longest_stop: float
    before: Touched | None
    after: Touched | None

    @property
    def retouch_ratio(self) -> float | None:
        """The guest's speed over the same memory after the collapse, in terms of that before."""
        if self.before is None or self.after is None:
            return None
        return self.after.pages_per_second / self.before.pages_per_second


def measure_collapse(machine: Machine, collapser: Collapser, timeout: float | None) -> CollapseResult:
    """Collapse what is left to, by the policy "end", and have the guest touch its memory before and after.

    The machine has run, with the collapser. Raises what `Machine.run` raises.
    """
    before = None
    if collapser.policy == "end":
        before = _touch_again(machine, timeout)
        collapser.collapse_all()
    stops, longest = machine.gate.stops, machine.gate.longest_stop
    return CollapseResult(
        policy=collapser.policy,
        supported=machine.pager.trap.collapses,
        pages=collapser.pages,
        seconds=collapser.seconds,
        stops=stops,
        longest_stop=longest,
        before=before,
        after=_touch_again(machine, timeout),
    )


def _touch_again(machine: Machine, timeout: float | None) -> Touched | None:
    """Have all vCPUs read the longest run of present pages: once for KVM to map it, then at random, timed."""
    vcpus = len(machine.threads)
    runs = machine.pager.bitmap.present_runs().tolist()
    first, count = max(runs, key=lambda run: run[1], default=(0, 0))
    if count < vcpus:
        return None
    _touch(machine, first, count, "sequential", None, timeout)
    names = ("pages_4k", "pages_2m", "pages_1g")
    try:
        with machine.vm.statistics() as statistics:
            known = set(statistics.names)
            mapped = {name: statistics.get(name) if name in known else None for name in names}
    except KvmError:  # KVM_CAP_BINARY_STATS_FD is of Linux 5.14
        mapped = dict.fromkeys(names)
    _touch(machine, first, count, "random", _TIMED_TOUCHES, timeout)
    touches = sum(thread.parameters.accesses for thread in machine.threads)
    return Touched(mapped, touches / machine.guest_seconds)


def _touch(
    machine: Machine, first: int, count: int, order: str, touches: int | None, timeout: float | None
) -> None:
    # In ring 3, as some hosts emulate the other; reads only.
    options = WorkloadOptions(
        low_ram_end=machine.layout.low_ram_end,
        memory_bytes=count * PAGE_SIZE,
        vcpus=len(machine.threads),
        order=order,
        touches=touches,
    )
    blocks = make_workload("touch", options).blocks
    for block in blocks:
        block.first_page += first
    machine.restart(blocks)
    machine.run(timeout)
