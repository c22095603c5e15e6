"""Interruptions: signals whose handlers raise (SIGINT, SIGTERM, SIGHUP), and what they must not cut short.

Python calls a signal's handler in the main thread, between two steps of whatever that is at, and the usual handler
raises KeyboardInterrupt there. Other threads are never interrupted. What holds all the same, whichever handlers there
are, for every call of this package in the main thread:

- An interruption leaves nothing behind that others would wait for: no claim on a page, no pin, no freeze, no vCPU kept
  out (`undone`). The call has been done, or has not, for each page by itself.
- What must not stop half-way (a trap that is told of a page, the start of a thread, the end of a machine) is not
  interrupted: the signal is taken when it is over (`Uninterrupted`, `entered`). Masking signals would not do: another
  thread may take one, and Python runs its handler in the main thread all the same.

What the main thread waits on is made for that (`kvmdp.waiting`).

Not so for exceptions of other signals' handlers (SIGALRM, say) and for those set from another thread: they find nothing
left behind either, but may break what a trap is told; then the machine is paused with that as its error.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from threading import get_ident
from types import FrameType, TracebackType
from typing import ParamSpec, TypeVar

_INTERRUPTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MAIN_THREAD = threading.main_thread().ident

_P = ParamSpec("_P")
_T = TypeVar("_T")

# The main thread's own.
_is_put_off = False
_came: list[int] = []  # signals that were put off
_is_owed = False  # a KeyboardInterrupt was put off
_before: dict[int, signal._HANDLER] = {}  # handlers that know nothing of this give way to `_note` meanwhile


class Interrupter:
    """A signal handler that raises KeyboardInterrupt, as soon as interruptions are not put off.

    It is called at every signal. Python's own, and any other, is replaced while they are put off, which takes some
    20 us each time; what it does is done afterwards, once.
    """

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, now or soon."""
        global _is_owed
        if not _is_put_off:
            raise KeyboardInterrupt
        _is_owed = True


def _note(number: int, _frame: FrameType | None) -> None:
    _came.append(number)


class Uninterrupted:
    """Puts interruptions off to the end of a `with` block; one that came is taken there. Inside another: does nothing.

    In the block the main thread waits for nothing that may not come; where it has to, `Interruptible` is for that.
    """

    __slots__ = ("_is_outermost",)

    def __enter__(self) -> None:
        self._is_outermost = get_ident() == _MAIN_THREAD and not _is_put_off
        if self._is_outermost:
            try:
                _put_off()
            except BaseException:  # one came before its handler was replaced
                _let_in()
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_outermost:
            _let_in()
            _take()


class Interruptible:
    """Lets interruptions in again for the time of a `with` block inside an `Uninterrupted` one; else does nothing.

    One that has been put off is taken at the block's beginning. What comes after the block is put off again, also when
    it is left by an interruption.
    """

    # A class and no generator: an interruption at the very entry of `__exit__` leaves all as it was before
    # `Uninterrupted`. The end of a generator could come much later, and put off for good what comes after it.

    __slots__ = ("_puts_off_again",)

    def __enter__(self) -> None:
        self._puts_off_again = get_ident() == _MAIN_THREAD and _is_put_off
        if self._puts_off_again:
            _let_in()
            try:
                _take()
            except BaseException:
                _put_off()
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._puts_off_again:
            _put_off()


@contextlib.contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` when the block is left in whatever way, and once more if the block or `undo` has raised.

    For an interruption, which comes once, may come at the first step of `undo`, or of what the block itself undoes. So
    `undo` does nothing where there is nothing to undo, yet or any more.
    """
    try:
        try:
            yield
        finally:
            undo()
    except BaseException:
        undo()
        raise


@contextlib.contextmanager
def entered(
    make: Callable[_P, contextlib.AbstractContextManager[_T]], *arguments: _P.args, **named: _P.kwargs
) -> Iterator[_T]:
    """Make a context manager and be in it for the time of the block, which no interruption leaves behind.

    `with make(...)` does so too, but for an interruption that comes between the making and the block, or at the very
    entry of its `__exit__`: then its threads go on, and Python waits for them at its end. It is left without a word of
    what the block raised. In `make` an interruption comes only where that lets it in (`Interruptible`).
    """
    stack = contextlib.ExitStack()

    def leave() -> None:
        with Uninterrupted():
            stack.close()

    with undone(leave):
        with Uninterrupted():
            inside = stack.enter_context(make(*arguments, **named))
        yield inside


def _put_off() -> None:
    global _is_put_off
    _is_put_off = True
    for number in _INTERRUPTING:
        handler = signal.getsignal(number)
        # Others than these raise nothing: they are ignored, end the process, or are not Python's.
        if callable(handler) and not isinstance(handler, Interrupter):
            _before[number] = handler
            signal.signal(number, _note)


def _let_in() -> None:
    """Put the handlers back. Each may be called from the moment it is there: the others are put back all the same."""
    global _is_put_off
    try:
        _put_back()
    finally:
        _is_put_off = False
        _put_back()


def _put_back() -> None:
    while _before:
        number, handler = next(iter(_before.items()))
        signal.signal(number, handler)
        del _before[number]


def _take() -> None:
    """Do what was put off: raise KeyboardInterrupt, or have the first of the signals handled by whatever handles it."""
    global _is_owed
    number = _came[0] if _came else None
    is_owed, _is_owed = _is_owed, False
    _came.clear()
    if is_owed:
        raise KeyboardInterrupt
    if number is not None:
        signal.raise_signal(number)
