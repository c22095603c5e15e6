"""A secluded thread's descriptors: no child has them, it has none of others', and nothing of it is left behind."""

import contextlib
import errno
import gc
import os
import select
import signal
import threading
import time
import warnings

import pytest

from kvmdp import secluded
from kvmdp.secluded import SecludedThread

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded.*fork:DeprecationWarning"
)  # that is the point


@pytest.fixture
def given():
    """The reading and the writing end of a pipe; the thread gets the second."""
    reader, writer = os.pipe()
    yield reader, writer
    for descriptor in (reader, writer):
        with contextlib.suppress(OSError):  # the test has closed it
            os.close(descriptor)


@pytest.fixture
def thread(given):
    secluded_thread = SecludedThread(given[1], "secluded")
    yield secluded_thread
    secluded_thread.close()
    secluded_thread.close()


def has_no_writer(reader):
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    return poll.poll(0) == [(reader, select.POLLHUP)]


@contextlib.contextmanager
def child():
    """A child with a copy of every descriptor that this thread could give it."""
    pid = os.fork()
    if not pid:
        signal.pause()
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_child_that_is_forked_meanwhile_has_no_copy_of_what_the_thread_opened(thread):
    opened, forked, closed = threading.Event(), threading.Event(), []

    def work():
        reader, writer = os.pipe()
        opened.set()
        assert forked.wait(10)
        os.close(writer)
        closed.append(has_no_writer(reader))
        os.close(reader)

    worker = threading.Thread(target=thread.do, args=(work,))
    worker.start()
    assert opened.wait(10)
    with child():
        forked.set()
        worker.join()
    assert closed == [True]


def test_the_thread_keeps_nothing_of_others_open(thread):
    reader, writer = os.pipe()
    before, write_before = os.pipe()
    with contextlib.closing(SecludedThread(reader, "another")) as other:
        other.do(lambda: None)
        os.close(write_before)
        assert has_no_writer(before)
        os.close(writer)
        assert has_no_writer(reader)
    for descriptor in (reader, before):
        os.close(descriptor)


def test_the_thread_has_the_descriptor_it_was_given_until_it_is_closed(given):
    reader, writer = given
    thread = SecludedThread(writer, "secluded")
    os.close(writer)
    thread.do(lambda: os.write(writer, b"here"))
    assert os.read(reader, 10) == b"here"
    assert not has_no_writer(reader)
    thread.close()
    assert has_no_writer(reader)


def test_what_the_work_raises_comes_out_and_the_thread_goes_on(thread):
    with pytest.raises(ZeroDivisionError):
        thread.do(lambda: 1 / 0)
    done = []
    thread.do(lambda: done.append(threading.current_thread().name))
    assert done == ["secluded"]


def test_work_of_several_threads_is_done_one_at_a_time(thread):
    numbers, inside = [], []

    def work(number):
        inside.append(number)
        time.sleep(0.001)
        numbers.append(inside.pop())
        assert inside == []

    callers = [threading.Thread(target=thread.do, args=(lambda n=n: work(n),)) for n in range(20)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(numbers) == list(range(20))


def test_an_interruption_comes_out_when_the_work_has_ended(thread):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = []

    def work():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.2)
        ended.append(True)

    try:
        with pytest.raises(KeyboardInterrupt):
            thread.do(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == [True]
    thread.do(lambda: None)


def test_a_thread_that_has_ended_is_waited_for_by_no_caller(given):
    thread = SecludedThread(given[1], "secluded")
    asked, go_on = threading.Event(), threading.Event()
    endings = []

    def work():
        asked.set()
        assert go_on.wait(10)

    def call():
        try:
            thread.do(work)
            endings.append("done")
        except RuntimeError as error:
            endings.append(str(error))

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    assert asked.wait(10)
    closer = threading.Thread(target=thread.close)
    closer.start()
    time.sleep(0.05)
    go_on.set()
    for each in (*callers, closer):
        each.join()
    call()
    assert len(endings) == 3
    assert "done" in endings
    assert "has ended" in endings[-1]


def test_a_child_is_told_that_it_has_no_such_thread_and_can_close(thread):
    pid = os.fork()
    if not pid:
        status = 1
        try:
            thread.do(lambda: None)
        except RuntimeError:
            thread.close()
            status = 0 if gc.isenabled() else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    thread.do(lambda: None)


def test_a_child_forked_in_the_middle_of_work_collects_its_garbage(thread):
    begun, forked = threading.Event(), threading.Event()

    def work():
        begun.set()
        assert forked.wait(10)

    worker = threading.Thread(target=thread.do, args=(work,))
    worker.start()
    assert begun.wait(10)
    pid = os.fork()
    if not pid:
        os._exit(not gc.isenabled())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    forked.set()
    worker.join()
    assert gc.isenabled()


def test_garbage_with_a_descriptor_is_never_cleared_away_in_the_thread(thread):
    class Owner:
        def __init__(self, file):
            self.file, self.itself = file, self

    thresholds = gc.get_threshold()
    gc.collect()
    gc.set_threshold(500, 1, 1)  # reached by the work, and not before
    files = [open(os.devnull, "rb", buffering=0) for _ in range(20)]  # noqa: SIM115
    numbers = [file.fileno() for file in files]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            while files:
                Owner(files.pop())
            thread.do(lambda: [[] for _ in range(1000)])
            gc.collect()
    finally:
        gc.set_threshold(*thresholds)
    for number in numbers:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


def test_where_a_table_of_its_own_is_refused_nothing_is_left_and_the_error_says_so(given, monkeypatch):
    def refuse(*_arguments, what):
        raise OSError(errno.EPERM, f"{what}: {os.strerror(errno.EPERM)}")

    monkeypatch.setattr(secluded, "syscall", refuse)
    with pytest.raises(PermissionError, match="close_range: Operation not permitted"):
        SecludedThread(given[1], "secluded")
    os.fstat(given[1])
    assert "secluded" not in [each.name for each in threading.enumerate()]
