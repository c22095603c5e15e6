"""vCPUs, a device thread and a device process at the same absent pages: exact, fetched once, everybody answered."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parent.parent / room) for room in ("paging", "machine")]

from device_process import SOON, child_of
from harness import SEED, TIMEOUT, all_of_ram, in_threads_with, make_machine, plan

from kvmdp.memory.layout import PAGE_SIZE
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm
