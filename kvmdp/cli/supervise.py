"""`--detect-leaks` around a process: a parent that sees what the run itself cannot tell any more.

A user-space touch of the guest view ends a process (SIGBUS on a marker, SIGSEGV where nothing is mapped) or puts it
to sleep in userfaultfd with the interpreter's lock held, so that no reader can serve the fault. So the run happens in a
child, which beats like a heart: a thread of it writes to a pipe, for which it needs that lock. The parent waits for
the beats, the child's end and its own signals. Python's stacks come from faulthandler, which needs no lock.

Units: seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NoReturn

from kvmdp.abi.libc import libc, named_call
from kvmdp.abi.signal import siginfo_t
from kvmdp.cli.ending import SAME_SECONDS, run_to_end
from kvmdp.cli.entry import INTERRUPTING, interruptions, last_words, leave, on_interruption
from kvmdp.cli.output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_LACKING, say
from kvmdp.cli.streams import missing_streams, open_streams
from kvmdp.errors import KvmdpError
from kvmdp.lab.leaks import Leak, LeakKind
from kvmdp.last_acts import last_act
from kvmdp.shortage import ShortageError, starting_process, starting_thread

_BEAT_SECONDS = 0.2
_STALL_BEATS = 50  # beats that may be missed in a row
_GRACE_SECONDS = 2.0  # for faulthandler to write the stacks
_STACKS_SIGNAL = signal.SIGUSR2
_FATAL = (signal.SIGBUS, signal.SIGSEGV)
_NOTE = "address "  # begins the line of what a fatal signal was about
_STACKS_SAY = "the Python stacks above say where"
_SA_SIGINFO = 4
_PR_SET_PDEATHSIG = 1

_supervised = False
_START = "import sys; sys.path[:] = {path!r}; from kvmdp.cli.supervise import child; child({numbers})"


class TouchedError(KvmdpError):
    """The supervised run was ended by a touch of memory that is not there; `leak` says what is known."""

    def __init__(self, leak: Leak) -> None:
        super().__init__(str(leak))
        self.leak = leak


def is_supervised() -> bool:
    """Return whether this process is the child of `supervise`."""
    return _supervised


# The parent


def supervise(clear_up: Callable[[], None]) -> int:
    """Run this command once more, in a child, and watch it; returns its exit status.

    `clear_up` is called if the child did not come to the end of its command, and so has not cleaned up. Raises
    TouchedError if it died of a touch of the guest view, or stalled; ShortageError if there can be no child.
    """
    with named_call("memfd_create"):
        stacks = os.memfd_create("kvmdp-stacks", os.MFD_CLOEXEC)
    beats, beating = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    interrupting, asked = interruptions(), deque[int]()
    heeded = {*interrupting, signal.SIGCHLD}
    # What is blocked here the kernel gives to another thread that takes it (numpy has some), and then this one has to
    # answer it in Python, wherever it is: between a child's start and the name for it, say. So it only takes note.
    handlers = {each: signal.signal(each, lambda number, _: asked.append(number)) for each in interrupting}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, heeded)
    child: subprocess.Popen[bytes] | None = None

    def abandon() -> None:
        if child is not None and child.poll() is None:
            _kill(child)
            clear_up()

    try:
        numbers = f"{stacks}, {beating}, {os.getpid()}, {missing_streams()}"
        start = _START.format(path=sys.path, numbers=numbers)
        with last_act(abandon):
            with starting_process():
                child = subprocess.Popen(
                    [sys.executable, "-c", start, *sys.argv[1:]], pass_fds=(stacks, beating), close_fds=True
                )
            end = _watch(child, beats, heeded, asked)
            if child.returncode < 0:
                clear_up()
            return _verdict(child.returncode, end, stacks)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for descriptor in (stacks, beats, beating):
            os.close(descriptor)


class _End(enum.Enum):
    """Why a child was ended by its parent, if it was."""

    OWN = "it was not"
    STALL = "the interpreter stood still"
    IMPATIENCE = "it was asked to end a second time"


def _watch(
    child: subprocess.Popen[bytes], beats: int, heeded: set[signal.Signals], asked: deque[int]
) -> _End:
    """Wait for the child's end, handing on signals.

    The `heeded` ones are blocked; `asked` has those that came by another thread.
    """
    missed, beaten, handed_on = 0, False, None
    while child.poll() is None:
        got = signal.sigtimedwait(heeded, _BEAT_SECONDS)
        if got is not None and got.si_signo in INTERRUPTING:
            asked.append(got.si_signo)
        while asked:
            number = asked.popleft()
            if handed_on is None:
                child.send_signal(number)
                handed_on = time.monotonic()
            elif time.monotonic() - handed_on >= SAME_SECONDS:
                # The child would end at once too, but only if its interpreter still runs.
                _kill(child)
                return _End.IMPATIENCE
        piece = b""
        with contextlib.suppress(BlockingIOError):
            piece = os.read(beats, 4096)
        beaten = beaten or bool(piece)
        # Counted in waits of one's own, not by the clock: a job that is stopped as a whole misses none.
        excused = piece or not beaten or _is_stopped(child.pid)
        missed = 0 if excused else missed + (got is None)
        if missed >= _STALL_BEATS:
            child.send_signal(_STACKS_SIGNAL)
            time.sleep(_GRACE_SECONDS)
            _kill(child)
            return _End.STALL
    return _End.OWN


def _is_stopped(pid: int) -> bool:
    """Return whether a child has been stopped (SIGSTOP) and not been continued: it does not beat, and does no harm."""
    try:
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False  # it has ended since


def _kill(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()


def _verdict(status: int, end: _End, stacks: int) -> int:
    """Return the exit status of a run whose process ended with `status`. Raises TouchedError."""
    if end is _End.IMPATIENCE:
        say("kvmdp: interrupted")
        return EXIT_INTERRUPTED
    if end is _End.OWN and status >= 0:
        return status
    if end is _End.OWN and -status not in _FATAL:
        say(f"kvmdp: the run was ended by {signal.Signals(-status).name}")
        return EXIT_INTERRUPTED if -status in INTERRUPTING else EXIT_FAILED
    os.lseek(stacks, 0, os.SEEK_SET)
    with open(stacks, "rb", closefd=False) as file:
        text = file.read().decode(errors="replace")
    note, _, stack = text.partition("\n") if text.startswith(_NOTE) else ("", "", text)
    if stack:
        say(stack.rstrip())
    if end is not _End.OWN:
        raise TouchedError(_touch(f"{end.value}; {_STACKS_SAY}"))
    died = f"it died of {signal.Signals(-status).name}"
    if not note:
        raise TouchedError(
            _touch(
                f"{died} in a vCPU's thread, or in C, which leaves no stack; or the host has taken back memory that it "
                "had promised"
            )
        )
    raise TouchedError(_touch(f"host {note}, {died}; {_STACKS_SAY}"))


def _touch(detail: str) -> Leak:
    return Leak(LeakKind.TOUCH, None, "our own process", detail)


# The child


def child(stacks: int, beating: int, parent: int, missing: list[int]) -> NoReturn:
    """Run the command line in this process, supervised: stacks go to the file `stacks`, beats to `beating`.

    `parent` is the pid of the supervisor, without which this process does not go on; `missing` are the standard streams
    that it was started without.
    """
    global _supervised
    _supervised = True
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before that
        os._exit(EXIT_FAILED)
    for descriptor in (stacks, beating):
        os.set_inheritable(descriptor, False)
    faulthandler.enable(stacks, all_threads=True)
    faulthandler.register(_STACKS_SIGNAL, stacks, all_threads=True)
    _note_address(stacks)
    try:
        with starting_thread():
            threading.Thread(target=_beat, args=(beating,), name="heartbeat", daemon=True).start()
    except ShortageError as error:
        last_words(str(error), EXIT_LACKING)
    on_interruption(leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*INTERRUPTING, signal.SIGCHLD})
    open_streams(missing)
    run_to_end(taken=(_STACKS_SIGNAL,))


def _beat(beating: int) -> None:
    while True:
        with contextlib.suppress(BlockingIOError):  # a stopped parent reads none
            os.write(beating, b".")
        time.sleep(_BEAT_SECONDS)


class _Action(ctypes.Structure):
    """glibc's `struct sigaction`."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


_keep: list[object] = []  # what the kernel has the address of


def _note_address(stacks: int) -> None:
    """Have SIGBUS and SIGSEGV write the address to `stacks` before faulthandler's turn comes.

    faulthandler does not say it. The handler runs in the thread that faulted, puts back faulthandler's and returns:
    the instruction faults again. It is Python called in a signal handler, which is all right here, for the signal is
    synchronous: the thread was in the middle of a copy, not of the interpreter.
    """
    previous = {number: _Action() for number in _FATAL}

    def write_address(number: int, info: ctypes._Pointer[siginfo_t], _context: int | None) -> None:
        os.write(stacks, f"{_NOTE}{info.contents.si_addr:#x}\n".encode())
        for each in _FATAL:
            libc.sigaction(each, ctypes.byref(previous[signal.Signals(each)]), None)

    note = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(siginfo_t), ctypes.c_void_p)(write_address)
    action = _Action(handler=ctypes.cast(note, ctypes.c_void_p), flags=_SA_SIGINFO)
    for number in _FATAL:
        libc.sigaction(number, ctypes.byref(action), ctypes.byref(previous[number]))
    _keep.extend((note, previous))
