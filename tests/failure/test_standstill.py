"""A machine that was itself stopped for longer than its peers may be late accuses none of them."""

import signal
import time

import pytest
from command import Running
from device_process import bench
from fakes import in_threads
from handlers import MEMORY, SEED, HandlerProcess

from kvmdp.own_clock import OwnClock


def test_a_clock_that_stands_still_while_nobody_can_look_at_it():
    now = [100.0]
    clock = OwnClock(2, clock=lambda: now[0])
    assert clock.now() == 0
    now[0] += 0.75
    assert clock.now() == 0.75
    now[0] += 3600
    assert clock.now() == 1.75
    now[0] += 0.5
    assert clock.now() == 2.25


@pytest.mark.kvm
def test_a_run_that_is_stopped_for_longer_than_a_handler_may_take(socket_path):
    slow = ("--synthetic", f"{MEMORY},{SEED}", "--latency", "5ms")
    run = ("run", "--trap", "marker", "--vcpus", 2, "--handler", socket_path, "--handler-timeout", 1)
    with HandlerProcess(socket_path, *slow) as handler, Running(*run) as guest:
        guest.wait_for_progress("pages present")
        for _ in range(2):  # in the middle of a fault or two, as they are all the time
            guest.process.send_signal(signal.SIGSTOP)
            time.sleep(1.5)
            guest.process.send_signal(signal.SIGCONT)
            time.sleep(0.1)
        done = guest.finish()
        assert handler.says("has gone")
    assert done.status == 0, done.err


ACKNOWLEDGES_LATE = (
    'question = receive()\nsay("asked")\nheard()\nsend(Record(Kind.ACK, question.token))\nheard()'
)


def test_a_device_that_acknowledges_when_the_machine_was_stopped_meanwhile():
    now = [0.0]
    with bench(patience=10) as here:
        here.pager.mark_present(0, 1)
        child = here.child(ACKNOWLEDGES_LATE, raw=True)
        child.session._clock = OwnClock(10, clock=lambda: now[0])

        def stand_still():
            assert child.hear() == "asked"
            now[0] += 3600
            time.sleep(
                2 * child.session._clock.longest_wait
            )  # the machine looks at the clock before it hears the ACK
            child.tell("acknowledge")

        in_threads(lambda: here.pager.mark_nonpresent(0, 1), stand_still)
        assert not here.pager.bitmap.test(0)
        assert here.sentences == []
