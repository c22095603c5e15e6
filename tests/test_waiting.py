"""Waits that are interrupted at every step: the lock is held afterwards, no lock is left taken, others are woken."""

import threading

from interruptions import interrupt_everywhere

from kvmdp.waiting import Condition, Latch

SHORT, LONG = 0.001, 60


def test_the_lock_of_a_condition_is_held_after_a_wait_and_free_after_the_block():
    def each(interrupted):
        lock = threading.RLock()
        changed = Condition(lock)
        woken = []

        def wait():
            with lock:
                changed.wait(SHORT)

        def wait_too():
            with lock:
                waiting.set()
                woken.append(changed.wait(LONG))

        waiting = threading.Event()
        interrupted(wait)  # RuntimeError where the lock is not held at the block's end
        thread = threading.Thread(target=wait_too)
        thread.start()
        waiting.wait()
        with lock:  # free, for another thread has had it; and that waits
            changed.notify_all()
        thread.join(LONG)
        assert woken == [True]

    assert interrupt_everywhere(each, steps=True) > 5


def test_the_lock_is_held_when_a_wait_that_others_contend_for_is_interrupted():
    lock = threading.RLock()
    changed = Condition(lock)
    over = threading.Event()

    def contend():
        while not over.is_set():
            with lock:
                changed.notify_all()

    def each(interrupted):
        def wait():
            with lock:
                changed.wait(SHORT)

        interrupted(wait)

    thread = threading.Thread(target=contend)
    thread.start()
    try:
        for _ in range(20):
            assert interrupt_everywhere(each, steps=True) > 5
    finally:
        over.set()
        thread.join()


def test_a_latch_can_be_set_and_waited_for_after_a_wait_that_was_interrupted():
    def each(interrupted):
        latch = Latch()
        latch.set()
        interrupted(lambda: latch.wait(SHORT))
        latch.set()
        assert latch.wait(LONG)
        assert latch.wait(0)

    assert interrupt_everywhere(each, steps=True) > 1


def test_a_latch_wakes_a_thread_that_waits():
    latch, woken = Latch(), []
    thread = threading.Thread(target=lambda: woken.append(latch.wait(LONG)))
    thread.start()
    latch.set()
    thread.join(LONG)
    assert woken == [True]
