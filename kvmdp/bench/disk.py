"""Throughput of the disk workload: in this process and in another, with everything present and under demand paging.

Units: bytes a second of what goes out and comes in, over the guest's time.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvmdp.child import ChildProcess
from kvmdp.errors import PagingError
from kvmdp.interruption import entered
from kvmdp.lab.experiment import in_process_disk
from kvmdp.last_acts import last_act
from kvmdp.machine.guest_abi import DISK_SECTOR
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.remote_disk import RemoteDisk
from kvmdp.machine.workloads import WorkloadOptions, make_workload
from kvmdp.page import Outcome
from kvmdp.peers.wire.endpoint import Listener
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.temporary import temporary_folder

_PLACES = ("in_process", "out_of_process")
_DEVICE = "from kvmdp.cli.entry import entry; entry()"
_SECONDS = 60.0


def measure_disk(options: MachineOptions, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Let the four take turns; returns bytes a second by round: [place][`present` or `absent`].

    `options` say how much memory of which backing, under which trap; what is shared is needed out of process. Raises
    what a machine raises, PagingError if no device process comes.
    """
    results: dict[str, dict[str, list[float]]] = {place: {"present": [], "absent": []} for place in _PLACES}
    for _ in range(rounds):
        for place in _PLACES:
            for state, figures in results[place].items():
                figures.append(_throughput(options, place, state == "present"))
    return results


def _throughput(options: MachineOptions, place: str, present: bool) -> float:
    workload = make_workload("disk", WorkloadOptions(memory_bytes=options.memory_bytes, vcpus=options.vcpus))
    source = SyntheticSource(options.memory_bytes)
    with entered(Machine, options, source) as machine, _disk(machine, place, workload.disk_bytes):
        machine.set_parameters(workload.blocks)
        if present and machine.pager.mark_present(0, machine.layout.pages) is not Outcome.PRESENT:
            raise machine.pager.error or PagingError("memory cannot be made present")
        machine.run(_SECONDS)
        sectors = sum(thread.parameters.accesses for thread in machine.threads)
        return float(sectors * DISK_SECTOR / machine.guest_seconds)


@contextlib.contextmanager
def _disk(machine: Machine, place: str, size: int) -> Iterator[None]:
    """Give the machine a disk; one of another process is connected when the block begins."""
    if place == "in_process":
        with entered(in_process_disk(size), machine):
            yield
        return
    with _folder() as folder, Listener(str(folder / "socket")) as listener:
        file_path = folder / "disk"
        file_path.touch()
        os.truncate(file_path, size)
        command = [
            sys.executable,
            "-c",
            _DEVICE,
            "device",
            "--connect",
            listener.path,
            "--file",
            str(file_path),
        ]
        silent = subprocess.DEVNULL
        with entered(ChildProcess, command, stdout=silent, stderr=silent) as process:
            with entered(RemoteDisk, machine, listener, _SECONDS, lambda _: None) as disk:
                disk.await_device(_SECONDS)
                yield
            try:
                process.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                raise PagingError(f"the device process did not end within {_SECONDS:g} seconds") from None


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder for the time of the block."""
    folder = tempfile.TemporaryDirectory(dir=temporary_folder(), ignore_cleanup_errors=True)
    with last_act(folder.cleanup):
        yield Path(folder.name)
