"""Interrupts a call at each of its points in turn, to see what it leaves behind.

Two kinds of points. *Entries*: an exception is raised as a function of ours is entered, or a generator of ours goes on,
but not inside what puts interruptions off. *Steps*: SIGINT is raised where CPython looks for signals in our code,
and its own handler raises KeyboardInterrupt, there or where it has been put off to. It looks as it enters a function,
when a call of a function in C is over, and as it jumps backward (Python/ceval.c, CHECK_EVAL_BREAKER).
"""

import contextlib
import dis
import functools
import signal
import sys
import threading
from pathlib import Path

import kvmdp
from kvmdp import interruption

# What Python's own do for us too: a condition's lock is taken and given back in Python.
_OURS = (str(Path(kvmdp.__file__).parent), contextlib.__file__, threading.__file__)
# What puts interruptions off has a test of its own (test_interruption.py); half-way through it nothing is as it says.
_PUTS_OFF = frozenset(("__enter__", "__exit__", "_put_off", "_let_in", "_put_back", "_take"))
_LOOKS = (
    "RESUME",
    "CALL",
    "JUMP_BACKWARD",
    "POP_JUMP_BACKWARD",
)  # what the names of such instructions begin with


@functools.cache
def _handlers(code):
    """By offset of each instruction: whether CPython looks for signals in it, and where its exceptions are handled."""
    bytecode = dis.Bytecode(code)
    found = {}
    for instruction in bytecode:
        at = instruction.offset
        handler = next(
            (each.target for each in bytecode.exception_entries if each.start <= at < each.end), None
        )
        found[at] = instruction.opname.startswith(_LOOKS), handler
    return found


class _Injection:
    """A trace function that interrupts at point number `at`; `where` says which that was, None if there are fewer."""

    def __init__(self, at, steps):
        self.at = at
        self.steps = steps
        self.points = 0
        self.where = None
        self.last = {}  # by frame: the offset of its last instruction

    def __call__(self, frame, event, _):
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if not file.startswith(_OURS):
            return None
        if self.steps:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return self._step
        puts_off = interruption._is_put_off or (file.endswith("/interruption.py") and name in _PUTS_OFF)
        # An expression that is left half-way is entered to be closed: what is raised there is lost.
        if not puts_off and name != "<genexpr>" and self._is_there(frame):
            raise KeyboardInterrupt
        return None

    def _step(self, frame, event, _):
        if event == "opcode":
            # It has looked in the last instruction, and comes to us in the next: all the same where both have the same
            # handler. Where not, the exception would go astray.
            handlers, at = _handlers(frame.f_code), frame.f_lasti
            looks, handler = handlers[self.last.get(frame, at)]
            self.last[frame] = at
            if looks and handler == handlers[at][1] and self._is_there(frame):
                self.last.clear()
                signal.raise_signal(signal.SIGINT)
        elif event == "return":
            self.last.pop(frame, None)
        return self._step

    def _is_there(self, frame):
        self.points += 1
        if self.points - 1 != self.at:
            return False
        self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
        return True


def interrupt(call, at, steps):
    """Make a call that is interrupted at point `at`; returns where that was, or None if it came to its end before."""
    injection = _Injection(at, steps)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    tracing = sys.gettrace()
    try:
        sys.settrace(injection)
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(tracing)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, injection.where
        signal.signal(signal.SIGINT, before)
    return injection.where


def points(call, steps):
    """Make a call and return at how many points it can be interrupted."""
    injection = _Injection(-1, steps)
    tracing = sys.gettrace()
    try:
        sys.settrace(injection)
        call()
    finally:
        sys.settrace(tracing)
    return injection.points


def interrupt_everywhere(each, steps, stride=1):
    """Call `each(interrupted)` with a function that makes a call interrupted, at another point each time.

    Of all points it is every `stride`-th. Returns how many points there are, about.
    """
    assert threading.current_thread() is threading.main_thread()
    at = 0
    while True:
        places = []

        def interrupted(call, at=at, places=places):
            places.append(interrupt(call, at, steps))

        try:
            each(interrupted)
        except BaseException as error:
            error.add_note(f"interrupted at point {at}, {places}")
            raise
        if places == [None]:
            return at
        at += stride
