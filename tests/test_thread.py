import os
import random
import signal
import threading
import time

import pytest

from kvmdp.thread import JoinableThread


def unexpected(error):
    raise error


def test_a_thread_that_was_never_started_is_joined_at_once():
    assert JoinableThread(lambda: None, "idle", unexpected).join()


def test_a_thread_that_runs_is_waited_for():
    go = threading.Event()
    thread = JoinableThread(go.wait, "busy", unexpected)
    thread.start()
    assert not thread.join(0.01)
    go.set()
    assert thread.join()


@pytest.fixture
def interrupt_soon():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    chance, wanted, sent = random.Random(5), threading.Semaphore(0), threading.Semaphore(0)
    ending = []

    def interrupt():
        while wanted.acquire() and not ending:
            until = time.perf_counter() + chance.uniform(0, 150e-6)
            while time.perf_counter() < until:
                pass
            os.kill(os.getpid(), signal.SIGINT)
            sent.release()

    thread = threading.Thread(target=interrupt)
    thread.start()
    yield wanted.release, sent.acquire
    ending.append(True)
    wanted.release()
    thread.join()
    signal.signal(signal.SIGINT, before)


def test_a_start_that_is_interrupted_leaves_a_thread_that_can_be_joined(interrupt_soon):
    ask, was_sent = interrupt_soon
    threads, interruptions = [], 0
    for _ in range(100):
        threads.append(thread := JoinableThread(lambda: None, "started", unexpected))
        try:
            ask()
            thread.start()
            was_sent()
            time.sleep(1)  # interrupted here at the latest
        except KeyboardInterrupt:
            interruptions += 1
        assert thread.join()
    assert interruptions == len(threads)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "started" not in [each.name for each in threading.enumerate()]


@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit(3), KeyboardInterrupt()])
def test_whatever_ends_a_thread_is_told(error):
    def work():
        raise error

    told = []
    thread = JoinableThread(work, "breaks", told.append)
    thread.start()
    assert thread.join()
    assert told == [error]
