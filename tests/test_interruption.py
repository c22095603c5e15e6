"""Interruptions that are put off, with real signals: taken once, where they may be, by whatever handles them."""

import contextlib
import signal
import threading

import pytest

from kvmdp.interruption import Interrupter, Interruptible, Uninterrupted, undone

INTERRUPTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ToldError(Exception):
    """What a handler raises that knows nothing of putting off."""


def tell(number, _frame):
    raise ToldError(number)


@contextlib.contextmanager
def handled_by(handler):
    before = {number: signal.signal(number, handler) for number in INTERRUPTING}
    try:
        yield
        assert {signal.getsignal(number) for number in INTERRUPTING} == {handler}
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@pytest.fixture(
    params=[Interrupter, lambda: tell, lambda: signal.default_int_handler], ids=["knows", "not", "Python's"]
)
def interrupted(request):
    """What is raised at an interruption."""
    with handled_by(handler := request.param()):
        yield ToldError if handler is tell else KeyboardInterrupt


def interrupt(number=signal.SIGINT):
    signal.raise_signal(number)


@pytest.mark.parametrize("number", INTERRUPTING)
def test_what_must_not_be_cut_short_is_not(interrupted, number):
    done = []

    def work():
        with Uninterrupted():
            interrupt(number)
            done.append("all of it")

    with pytest.raises(interrupted):
        work()
    assert done
    with Uninterrupted():
        pass  # it was taken, and is not taken again


def test_inside_another_block_it_is_taken_at_the_end_of_that(interrupted):
    done = []

    def work():
        with Uninterrupted():
            with Uninterrupted():
                interrupt()
            done.append("all of it")

    with pytest.raises(interrupted):
        work()
    assert done


def test_several_are_one(interrupted):
    def work():
        with Uninterrupted():
            for number in INTERRUPTING:
                interrupt(number)

    with pytest.raises(interrupted):
        work()
    with Uninterrupted():
        pass


def test_what_the_block_raises_is_not_lost(interrupted):
    def work():
        with Uninterrupted():
            interrupt()
            raise ValueError("of the block")

    with pytest.raises(interrupted) as raised:
        work()
    assert isinstance(raised.value.__context__, ValueError)


def test_where_it_may_be_taken_it_is_taken_at_once(interrupted):
    done = []

    def work():
        with Uninterrupted(), Interruptible():
            interrupt()
            done.append("not reached")

    with pytest.raises(interrupted):
        work()
    assert done == []
    with pytest.raises(interrupted):
        interrupt()


def test_where_it_may_be_taken_one_that_was_put_off_is_taken_first(interrupted):
    done = []

    def work():
        with Uninterrupted():
            interrupt()
            with Interruptible():
                done.append("not reached")

    with pytest.raises(interrupted):
        work()
    assert done == []


def test_after_a_place_where_it_may_be_taken_it_is_put_off_again(interrupted):
    done = []

    def work():
        with Uninterrupted():
            with Interruptible(), Interruptible():
                pass
            interrupt()
            done.append("all of it")

    with pytest.raises(interrupted):
        work()
    assert done


@pytest.mark.parametrize("before", [True, False], ids=["put off", "in the block"])
def test_one_that_is_taken_where_it_may_be_lets_no_other_into_the_rest(interrupted, before):
    done = []

    def work():
        with Uninterrupted():
            try:
                if before:
                    interrupt()
                with Interruptible():
                    interrupt()
            finally:
                interrupt(signal.SIGTERM)
                done.append("all of it")

    with pytest.raises(interrupted):
        work()
    assert done


def test_outside_a_place_that_may_be_interrupted_means_nothing(interrupted):
    with Interruptible():
        pass
    with pytest.raises(interrupted):
        interrupt()


def test_other_threads_put_nothing_off(interrupted):
    inside, leave = threading.Event(), threading.Event()

    def work():
        with Uninterrupted(), Interruptible(), Uninterrupted():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    with pytest.raises(interrupted):
        interrupt()
    leave.set()
    thread.join()


def test_a_signal_that_is_ignored_stays_so():
    with handled_by(signal.SIG_IGN), Uninterrupted():
        interrupt()


def test_a_handler_that_knows_hears_of_every_signal():
    heard = []

    class Listening(Interrupter):
        def __call__(self, number, frame):
            heard.append(number)
            super().__call__(number, frame)

    def work():
        with Uninterrupted():
            interrupt(signal.SIGINT)
            interrupt(signal.SIGTERM)
            assert heard == [signal.SIGINT, signal.SIGTERM]

    with handled_by(Listening()), pytest.raises(KeyboardInterrupt):
        work()


@pytest.mark.parametrize("interrupted_at", range(4))
def test_what_is_to_be_undone_is_undone_whatever_is_interrupted(interrupted_at):
    steps, left = iter(range(100)), []

    def step():
        if next(steps) == interrupted_at:
            raise KeyboardInterrupt

    def undo():
        step()
        left.clear()
        step()

    with contextlib.suppress(KeyboardInterrupt), undone(undo):
        step()
        left.append("to be undone")
        step()
    assert left == []
