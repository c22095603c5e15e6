"""The checks of the matrix, as one program: it runs on the kernel that is to be judged and judges nothing itself.

On each trap every workload in ring 3 and ring 0, and contended faults (two vCPUs that add to the same 256 pages,
three rounds), each as `kvmdp run` does it; instruction forms in both rings, on one vCPU and on two, and guests with
instructions that were once emulated wrongly (tests/support/forms); besides, `kvmdp probe`, the tests of the kernel's
ABI, and those of what is left of an access that KVM's emulator has begun. A trap that refuses its first run is asked no
more. The report goes to the file that $VMTEST_REPORT names:

    {"schema": "kvmdp.vmtest/1", "probe": {...} or null, "checks": [{"trap": str or null, "check": str,
     "status": exit status, "message": last line of its output}]}

An emulated CPU takes about a minute for the forms: each is run under some traps, in some ring, on one vCPU or two. With
KVMDP_EFFORT=full each of the whole table is run under all of that, which takes far longer than any other check.

Exit status 0 as soon as there is a report; what the results mean is for matrix.py to say.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/support"))

from forms.named import NAMED, Named
from forms.reference import cpu_flags
from forms.survey import chosen, survey
from forms.trapped import Setting

from kvmdp.cli.main import main as kvmdp
from kvmdp.errors import PagingError
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.machine.workloads import WORKLOADS
from kvmdp.trap.registry import TRAPS

_FAILED, _REFUSED = 1, 4
_ROUNDS = 3
_SHARES = 5  # of the forms that stand for the others, a different one for each trap, ring and number of vCPUs
_SECONDS = 120
_RUN = ("run", "--memory", "2M", "--timeout", str(_SECONDS))
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
_TESTS = {"abi": "tests/abi", "settled": "tests/machine/test_settled.py"}


def main() -> None:
    checks: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.json")
        checks.append(_check(None, "probe", "probe", "--json", str(probe)))
        for check, tests in _TESTS.items():
            done = subprocess.run((*_PYTEST, tests), capture_output=True, text=True)
            checks.append(_result(None, check, done.returncode, done.stdout))
        for number, trap in enumerate(TRAPS):
            checks += _trap_checks(trap, number)
        found = json.loads(probe.read_text()) if probe.exists() else None
    report = {"schema": "kvmdp.vmtest/1", "probe": found, "checks": checks}
    Path(os.environ["VMTEST_REPORT"]).write_text(json.dumps(report))


def _trap_checks(trap: str, number: int) -> list[dict[str, Any]]:
    # Few pages and, but for the contended run, few memslots: the CPU is emulated.
    few = ("--pages", "64", *(("--granule", "16K") if TRAPS[trap].by_memslot else ()))
    checks = []
    for ring in ("3", "0"):
        for workload in WORKLOADS:
            single = ("--trap", trap, "--ring", ring, "--workload", workload, *few)
            checks.append(_check(trap, f"{workload}, ring {ring}", *_RUN, *single))
            if checks[0]["status"] == _REFUSED:
                return checks
    for round_ in range(1, _ROUNDS + 1):
        contended = ("--trap", trap, "--vcpus", "2", "--workload", "atomic", "--pages", "256")
        checks.append(_check(trap, f"contended {round_}", *_RUN, *contended, "--seed", str(round_)))
    # The baseline has nothing emulated: that two vCPUs get what is right shows above.
    places = [(ring, vcpus) for vcpus in ((1, 2) if TRAPS[trap].exits else (1,)) for ring in (3, 0)]
    checks += [_forms(trap, *place, share) for share, place in enumerate(places, number)]
    checks += [_named(trap, guest) for guest in NAMED if guest.needs in cpu_flags()]
    return checks


def _forms(trap: str, ring: int, vcpus: int, share: int) -> dict[str, Any]:
    """Run a share of the instruction forms that stand for the others, or all there are."""
    check = f"forms, ring {ring}, {vcpus} vCPU"
    is_full = os.environ.get("KVMDP_EFFORT") == "full"
    forms = chosen() if is_full else chosen(quick=True)[share % _SHARES :: _SHARES]
    found = survey(Setting(trap, vcpus), ring, forms)
    differ = [f"{name}: {words}" for name, words in found.different.items()]
    if differ:
        return _result(trap, check, _FAILED, f"{len(differ)} of {found.cases} cases differ; {differ[0]}")
    return _result(trap, check, 0, f"{found.cases} cases")


def _named(trap: str, guest: Named) -> dict[str, Any]:
    """Run a guest with instructions that were once emulated wrongly."""
    check, right = f"guest {guest.name}", guest.right()
    try:
        found = guest.run(trap)
    except (GuestError, PagingError) as error:
        return _result(trap, check, _FAILED, str(error))
    return _result(trap, check, 0 if found == right else _FAILED, f"checksums {found}, right is {right}")


def _check(trap: str | None, check: str, *arguments: str) -> dict[str, Any]:
    """Run the kvmdp command in this process, which spares an emulated CPU the start of Python for each."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = kvmdp(arguments)
    return _result(trap, check, status, output.getvalue())


def _result(trap: str | None, check: str, status: int, output: str) -> dict[str, Any]:
    message = output.strip().splitlines()[-1] if output.strip() else ""
    print(
        f"{trap or '':<13} {check:<17} {'ok' if status == 0 else f'status {status}: {message}'}", flush=True
    )
    return {"trap": trap, "check": check, "status": status, "message": message}


if __name__ == "__main__":
    main()
