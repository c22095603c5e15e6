"""Runs one kernel and one initramfs in QEMU, and brings output and exit status of the command inside back.

The emulated machine: q35, two CPUs, `-cpu max` with SVM and nested paging, all of it in software (TCG). TCG
runs single-threaded: with one thread a CPU the emulated kernel itself fails now and then.

Nothing outlives this process, however it ends: the initramfs is a memfd, every channel a socket pair, and the
kernel kills QEMU when its parent dies. Times are in seconds.
"""

import contextlib
import ctypes
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import ENVIRONMENT, FAILED, VmtestError
from .streams import KernelLog, Stream

_PROGRAM = "qemu-system-x86_64"
_PORTS = ("stdout", "stderr", "result")
_PANIC_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Machine:
    """A kernel image, an initramfs (descriptor of a memfd), and the memory's size in QEMU's notation (3G)."""

    vmlinuz: Path
    initramfs: int
    memory: str


@dataclass(frozen=True)
class Outcome:
    """A run that reported back: exit status, the report file's bytes, when the command started and ended."""

    status: int
    report: bytes
    started: float
    ended: float
    warnings: tuple[str, ...]


def program() -> str:
    """Return the path of QEMU. Raises VmtestError, which names the package, where it is not installed."""
    found = shutil.which(_PROGRAM)
    if found is None:
        raise VmtestError(
            f"{_PROGRAM} is not installed; install it with: apt-get install qemu-system-x86", ENVIRONMENT
        )
    return found


def run(machine: Machine, end: bytes, timeout: float, show_log: bool) -> Outcome:
    """Boot `machine` and wait until the command of its initramfs has ended, at most `timeout` seconds.

    The command's stdout and stderr go to this process's own, live and byte for byte; `end` is the mark the
    initramfs was built with. `show_log` sends the kernel's messages to stderr too. Raises VmtestError (status
    1) where no exit status comes back: the kernel panicked, the time is over, QEMU failed.
    """
    result = Stream(end)
    marked = {
        "stdout": Stream(end, sys.stdout.buffer),
        "stderr": Stream(end, sys.stderr.buffer),
        "result": result,
    }
    log = KernelLog(sys.stderr.buffer if show_log else None)
    complaints = KernelLog()
    sinks: dict[str, Stream | KernelLog] = {**marked, "console": log, "qemu": complaints}
    begin = time.monotonic()
    ends, panicked = begin + timeout, False
    started = None
    with _emulator(machine) as (process, channels), selectors.DefaultSelector() as selector:
        for name, channel in channels.items():
            selector.register(channel, selectors.EVENT_READ, name)
        while not all(stream.closed for stream in marked.values()):
            remaining = ends - time.monotonic()
            if remaining <= 0 and panicked:
                raise VmtestError(_without_status(0, log, complaints), FAILED)
            if remaining <= 0:
                raise VmtestError(_overdue(timeout, started is not None) + log.tail(), FAILED)
            if not selector.get_map():
                raise VmtestError(_without_status(process.wait(), log, complaints), FAILED)
            for key, _ in selector.select(remaining):
                if data := channels[key.data].recv(65536):
                    sinks[key.data].feed(data)
                    if key.data == "console" and b"Kernel panic - " in data:
                        panicked = True  # it should go off now; some spin for ever instead
                        ends = min(ends, time.monotonic() + _PANIC_SECONDS)
                else:
                    selector.unregister(key.fileobj)
            if started is None and result.content.startswith(b"started\n"):
                started = time.monotonic() - begin
                log.forget_boot()
    assert started is not None, "the result stream opens with its word for started"
    _, status, report = result.content.split(b"\n", 2)
    return Outcome(
        int(status.removeprefix(b"exit ")), report, started, time.monotonic() - begin, log.warnings()
    )


def shell(machine: Machine) -> int:
    """Boot `machine` with its serial console on this terminal; return QEMU's exit status in the end."""
    terminal = ["-chardev", "stdio,id=console,mux=on,signal=off", "-mon", "chardev=console"]
    command = [program(), *_arguments(machine), *terminal, "-serial", "chardev:console"]
    with subprocess.Popen(command, pass_fds=[machine.initramfs], preexec_fn=_die_with_parent) as process:
        try:
            return process.wait()
        finally:
            process.kill()


def _arguments(machine: Machine) -> list[str]:
    # panic=-1 with -no-reboot ends QEMU at once. An oops must not pass for a success, so it is made a panic.
    return [
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "q35", "-accel", "tcg,thread=single", "-cpu", "max,+svm,+npt", "-smp", "2"),
        *("-m", machine.memory, "-kernel", str(machine.vmlinuz), "-initrd", f"/dev/fd/{machine.initramfs}"),
        *("-append", "console=ttyS0 panic=-1 oops=panic"),
    ]


@contextlib.contextmanager
def _emulator(machine: Machine) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, socket.socket]]]:
    """Start QEMU. Gives it, and its channels by name: the ports, `console`, and `qemu`, its own messages."""
    command = [program(), *_arguments(machine), "-device", "virtio-serial-pci"]
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        channels = {}
        passed = [machine.initramfs]
        for name in (*_PORTS, "console", "qemu"):
            here, there = socket.socketpair()
            channels[name] = ours.enter_context(here)
            theirs.enter_context(there)
            passed.append(there.fileno())
            if name != "qemu":
                command += ["-chardev", f"socket,id={name},fd={there.fileno()}"]
            if name in _PORTS:
                command += ["-device", f"virtserialport,chardev={name},name={name}"]
        command += ["-serial", "chardev:console"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=passed[-1],
            stderr=passed[-1],
            pass_fds=passed,
            # Ctrl-C is for this process to handle; in a session of its own QEMU does not see it.
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        theirs.close()
        try:
            yield process, channels
        finally:
            process.kill()
            process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _overdue(timeout: float, started: bool) -> str:
    what = "the command did not end" if started else "the kernel did not start the command"
    return f"{what} within the time limit of {timeout:g} s; the emulator was ended"


def _without_status(status: int, log: KernelLog, complaints: KernelLog) -> str:
    if panic := log.panic():
        return f"the kernel panicked ({panic}); its last messages:{log.tail()}"
    if status:
        return f"{_PROGRAM} ended with status {status}:{complaints.tail()}"
    return f"the machine went off before the command reported its exit status; last messages:{log.tail()}"
