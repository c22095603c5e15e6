"""Runs the whole suite in two streams at once, on a host that has two CPUs: tools/test without arguments.

The streams share out the rooms of tests/, so that they take about as long as each other. What both must not do at the
same time is kept apart by locks (`pools_to_itself` in tests/conftest.py). A stream's output comes line by line.
"""

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

from effort import EFFORT, by_effort

TESTS = Path(__file__).resolve().parents[1]
# Beside these a second stream has all other rooms, of this day and of a later one.
FIRST_STREAM = ("abi", "bench", "cli", "failure", "interop", "kvm", "memory", "package", "tools")
# What a minute is enough for: a little of everything that a fault meets.
QUICK = (
    ("kvm", "memory", "source", "peers", "cli/test_run_command.py", "cli/test_fresh_start.py"),
    ("abi", "paging", "vcpu", "trap", "lab/test_matrix.py"),
)


def shares() -> list[list[str]]:
    """Return the paths that each stream is given."""
    if EFFORT == "quick":
        given = [[str(TESTS / name) for name in names] for names in QUICK]
    else:
        rooms = sorted(
            each for each in TESTS.iterdir() if [*each.glob("test_*.py")] or each.match("test_*.py")
        )
        first = [str(each) for each in rooms if each.name in FIRST_STREAM]
        given = [first, [str(each) for each in rooms if each.name not in FIRST_STREAM]]
    return given if len(os.sched_getaffinity(0)) > 1 else [list(itertools.chain(*given))]


def run(number: int, paths: list[str], statuses: list[int]) -> None:
    """Run one stream to its end and pass its output on."""
    command = [sys.executable, "-u", "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{number}: {line}", end="", flush=True)
    statuses[number - 1] = process.returncode


def main() -> int:
    """Run the streams; returns the exit status of the first that failed, 130 if interrupted."""
    how_long = by_effort("1 minute", "7 minutes", "some hours")
    print(
        f"This takes about {how_long} on two CPUs. KVMDP_EFFORT=quick takes one minute, full some hours.",
        flush=True,
    )
    given = shares()
    statuses = [1] * len(given)
    threads = [
        threading.Thread(target=run, args=(number, paths, statuses)) for number, paths in enumerate(given, 1)
    ]
    for thread in threads:
        thread.start()
    interrupted = False
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt:  # the streams have it too, and end
                interrupted = True
    return 130 if interrupted else next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
