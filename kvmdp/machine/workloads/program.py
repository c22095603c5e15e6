"""program: code of the user's own (`MachineOptions.program`, guest/README.md). Nothing is expected of it."""

from __future__ import annotations

import numpy as np

from kvmdp.machine.workloads.base import Share, Task, WorkloadOptions
from kvmdp.machine.workloads.poison import choose_pages
from kvmdp.page import PAGE_SHIFT


class Program(Task):
    """Every vCPU runs the program and is told of all pages; `options.poison` of those are poisoned."""

    name = "program"
    number = 0

    def __init__(self, options: WorkloadOptions) -> None:
        everything = Share(0, options.memory_bytes >> PAGE_SHIFT)
        super().__init__(options, [everything] * options.vcpus)
        self.poisoned = choose_pages(options, np.asarray(everything.pages))
