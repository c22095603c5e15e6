"""The checks of the matrix, as one program: it runs on the kernel that is to be judged and judges nothing itself.

On each trap every workload in ring 3 and ring 0, and contended faults (two vCPUs that add to the same 256 pages,
three rounds), each through `kvmdp run`; besides, `kvmdp probe` and the tests of the kernel's ABI. A trap that
refuses its first run is asked no more. The report goes to the file that $VMTEST_REPORT names:

    {"schema": "kvmdp.vmtest/1", "probe": {...} or null, "checks": [{"trap": str or null, "check": str,
     "status": exit status, "message": last line on stderr}]}

Exit status 0 as soon as there is a report; what the results mean is for matrix.py to say.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvmdp.machine.workloads import WORKLOADS
from kvmdp.paging.trap.registry import TRAPS

_REFUSED = 4
_ROUNDS = 3
_SECONDS = 300
_RUN = ("kvmdp", "run", "--memory", "2M", "--timeout", str(_SECONDS))


def main() -> None:
    checks: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.json")
        checks.append(_check(None, "probe", "kvmdp", "probe", "--json", str(probe)))
        checks.append(
            _check(None, "abi", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/abi")
        )
        for trap in TRAPS:
            checks += _trap_checks(trap)
        found = json.loads(probe.read_text()) if probe.exists() else None
    report = {"schema": "kvmdp.vmtest/1", "probe": found, "checks": checks}
    Path(os.environ["VMTEST_REPORT"]).write_text(json.dumps(report))


def _trap_checks(trap: str) -> list[dict[str, Any]]:
    checks = []
    for ring in ("3", "0"):
        for workload in WORKLOADS:
            single = ("--trap", trap, "--ring", ring, "--workload", workload)
            checks.append(_check(trap, f"{workload}, ring {ring}", *_RUN, *single))
            if checks[0]["status"] == _REFUSED:
                return checks
    for round_ in range(1, _ROUNDS + 1):
        contended = ("--trap", trap, "--vcpus", "2", "--workload", "atomic", "--pages", "256")
        checks.append(_check(trap, f"contended {round_}", *_RUN, *contended, "--seed", str(round_)))
    return checks


def _check(trap: str | None, check: str, *command: str) -> dict[str, Any]:
    """Run `command`; its exit status and the last line on its stderr are the result."""
    try:
        # kvmdp has a time limit of its own, which explains more. This one is for when that fails.
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS + 60)
        status, output = done.returncode, done.stderr.strip() or done.stdout.strip()
    except subprocess.TimeoutExpired:
        status, output = 1, f"did not end within {_SECONDS + 60} s"
    message = output.splitlines()[-1] if output else ""
    print(
        f"{trap or '':<13} {check:<17} {'ok' if status == 0 else f'status {status}: {message}'}", flush=True
    )
    return {"trap": trap, "check": check, "status": status, "message": message}


if __name__ == "__main__":
    main()
