"""When a device's time is over: what counts, and what does not."""

import pytest

from kvmdp.machine.service_watch import ServiceWatch
from kvmdp.own_clock import OwnClock


@pytest.fixture
def watch():
    """A watch of 2 seconds, on time that the test makes pass."""
    now = [0.0]
    made = ServiceWatch(2, OwnClock(2, clock=lambda: now[0]))

    def look(seconds, *, work=True, waits_for=None, progress=0):
        now[0] += seconds
        return made.look(work, waits_for, progress)

    look(0)
    return look


def test_a_device_that_does_nothing_has_its_time(watch):
    assert [watch(0.5) for _ in range(4)] == [False, False, False, True]


def test_progress_begins_it_anew(watch):
    assert not any(watch(0.9, progress=number // 2) for number in range(100))


def test_without_work_there_is_nothing_to_be_late_with(watch):
    assert not any(watch(1, work=False) for _ in range(10))
    assert [watch(0.5) for _ in range(4)] == [False, False, False, True]


def test_while_it_waits_for_the_machine_the_time_stands_still(watch):
    assert not watch(0.9, waits_for="a page")
    assert not any(watch(1, waits_for="a page") for _ in range(10))
    assert not watch(1, waits_for="another page")
    assert not any(watch(1, waits_for="another page") for _ in range(10))
    assert watch(0.9)


def test_one_that_asks_all_the_time_and_is_answered_has_its_time(watch):
    assert [watch(0.5, waits_for=number) for number in range(4)] == [False, False, False, True]


def test_while_this_process_is_stopped_the_time_stands_still(watch):
    assert not watch(3600)
    assert not watch(0.9)
    assert watch(3600)  # a second of each: that is 2.9
