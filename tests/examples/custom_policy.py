"""A fault policy of one's own: read ahead for each vCPU, twice as far each time it walks on.

When a vCPU touches an absent page, the pager asks the policy which pages to fetch along with it. This one remembers,
for each vCPU, the pages that it fetched last. A vCPU that touches a page just behind them walks up through memory, and
one that touches a page just before them walks down: it gets twice as many pages as the last time, on the side to which
it walks. A vCPU that jumps gets the one page that it touched.

Run it on a machine with /dev/kvm:  python tests/examples/custom_policy.py
"""

from __future__ import annotations

import sys
from dataclasses import replace

from kvmdp.lab.experiment import run_workload
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.workloads import WorkloadOptions, make_workload
from kvmdp.page import Origin, PageFault
from kvmdp.source.synthetic import SyntheticSource

MEMORY = 16 << 20  # bytes of RAM
VCPUS = 2
MOST = 128  # pages fetched at once; the pager allows 512
NEAR = 4  # pages: how large a step may be


class ReadAhead:
    """Any object with a method `window` is a policy (`kvmdp.paging.policy.FaultPolicy`)."""

    def __init__(self) -> None:
        # Who -> the first page fetched last for it, and how many. The pager asks one thread at a time: no lock.
        self._last: dict[tuple[Origin, int], tuple[int, int]] = {}

    def window(self, fault: PageFault) -> tuple[int, int]:
        """Return the first page to fetch and how many. The pager leaves out what is present, or beyond RAM's ends."""
        who = fault.origin, fault.number
        first, count = self._last.get(who, (fault.page, 0))
        more = min(max(2 * count, 1), MOST)
        if 0 <= fault.page - (first + count) < NEAR:
            window = fault.page, more
        elif 0 < first - fault.page <= NEAR:
            window = fault.page - more + 1, more
        else:
            window = fault.page, 1
        self._last[who] = window
        return window


def main() -> int:
    """Run the same guest page by page and with the policy; returns 0 if both runs saw the source's bytes."""
    options = MachineOptions(MEMORY, "mmio", vcpus=VCPUS)
    work = WorkloadOptions(memory_bytes=MEMORY, vcpus=VCPUS)
    source = SyntheticSource(MEMORY)
    is_exact = True
    for name, policy in (("page by page", None), ("reading ahead", ReadAhead())):
        result = run_workload(replace(options, policy=policy), make_workload("checksum", work), source)
        verdict = "exact" if result.ok else "wrong bytes"
        print(f"{name}: {result.counters.claims} faults for {result.counters.pages_fetched} pages, {verdict}")
        is_exact = is_exact and result.ok
    return 0 if is_exact else 1


if __name__ == "__main__":
    sys.exit(main())
