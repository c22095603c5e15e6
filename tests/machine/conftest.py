"""KVMDP_USER_MODE_ONLY=1 runs these tests as on a host where userfaultfd is not told of the kernel's own faults.

So it is for an ordinary user, who has no other. What needs more is skipped, or fails with the remedy.
"""

import os
from collections.abc import Iterator

import pytest
from harness import without_kernel_faults


@pytest.fixture(autouse=True, scope="session")
def user_mode_faults_only() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("KVMDP_USER_MODE_ONLY"):
            without_kernel_faults(patch)
        yield
