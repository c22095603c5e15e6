"""Devices in other processes: what they read and write, what is taken from under them, how they end."""

import threading
import time

import pytest
from device_process import SOON, bench
from fakes import PAGES, content, fill, in_threads, page_of, source_error

from kvmdp.errors import BusyError
from kvmdp.memory.backing import AnonymousBacking
from kvmdp.memory.mapping import Mapping
from kvmdp.page import Outcome, PageFault
from kvmdp.peers.peers import DeviceServer
from kvmdp.peers.wire.records import Kind


def test_a_device_reads_and_writes_what_is_absent():
    with bench() as here:
        child = here.child(
            """
say(memory.read(5 * 4096 - 8, 16).hex())
memory.write(7 * 4096 + 100, b"written")
memory.store64(8 * 4096, 0x1122334455667788)
say(memory.load64(8 * 4096))
with memory.view(9 * 4096, 8192) as view:
    view[4090:4100] = b"0123456789"
say(memory.readv([(7 * 4096 + 100, 7), (9 * 4096 + 4090, 10)]).decode())
memory.writev([(11 * 4096, 3), (13 * 4096, 3)], b"abcdef")
memory.close()
"""
        )
        assert child.hear() == (content(4)[:8] + content(5)[:8]).hex()
        assert child.hear() == 0x1122334455667788
        assert child.hear() == "written0123456789"
        child.done()
        assert page_of(here.pager, 7)[100:107] == b"written"
        assert page_of(here.pager, 13)[:4] == b"def" + content(13)[:1]
        assert child.session.wait_ended(SOON)
        assert here.balanced()
        assert here.sentences == []
        fetched = [page for first, count in here.source.fills for page in range(first, first + count)]
        assert sorted(fetched) == [4, 5, 7, 8, 9, 10, 11, 13]


def test_what_is_no_ram_is_the_devices_own_mistake():
    with bench() as here:
        child = here.child(
            """
for call in (lambda: memory.read(512 * 4096 - 1, 2), lambda: memory.load64(4), lambda: memory.write(-1, b"x")):
    try:
        call()
        say("nothing")
    except ValueError as error:
        say(str(error))
say(memory.read(0, 1)[0])
"""
        )
        assert child.hear() == "gpa 0x200000 is not guest RAM"
        assert "not a multiple of 8" in child.hear()
        assert "not guest RAM" in child.hear()
        assert child.hear() == content(0)[0]


def test_a_poisoned_page_is_an_error_of_its_own_and_the_session_goes_on():
    with bench() as here:
        here.pager.poison(5)
        child = here.child(
            """
try:
    memory.read(5 * 4096, 1)
except PoisonedError as error:
    say(str(error))
say(memory.read(6 * 4096, 1)[0])
"""
        )
        assert child.hear() == "the page at gpa 0x5000 is poisoned: what was in it is lost"
        assert child.hear() == content(6)[0]


def test_nowait_touches_nothing_absent():
    with bench() as here:
        here.pager.mark_present(0, 1)
        child = here.child(
            """
say(memory.read(0, 1, nowait=True)[0])
try:
    memory.read(4095, 2, nowait=True)
except BusyError as error:
    say(str(error))
"""
        )
        assert child.hear() == content(0)[0]
        assert "0x1000" in child.hear()
        assert here.server.counters.requests == 0


def test_a_fault_of_many_pages_is_answered_when_all_are_present():
    with bench() as here:
        child = here.child(
            "send(Record(Kind.FAULT, 1, 4096, 100 * 4096)); say(receive().outcome.name)", raw=True
        )
        assert child.hear() == "ADMITTED"
        assert here.pager.bitmap.test_range(1, 100)
        assert here.pager.bitmap.count() == 100


def test_a_parked_fault_goes_on_when_the_claim_has_ended():
    with bench() as here:
        claim = here.pager.begin(PageFault(2))
        child = here.child("say(memory.read(2 * 4096, 1)[0])")
        wait_for(lambda: claim.waiters)
        fill(here.pager, claim)
        here.pager.commit(claim)
        assert child.hear() == content(2)[0]
        assert here.nobody_waits()


def test_release_cancels_a_parked_fault():
    with bench() as here:
        claim = here.pager.begin(PageFault(2))
        child = here.child(
            """
send(Record(Kind.FAULT, 77, 2 * 4096, 4096))
heard()
send(Record(Kind.RELEASE, 77))
answer = receive()
say([answer.token, answer.outcome.name])
""",
            raw=True,
        )
        wait_for(lambda: claim.waiters)
        child.tell("release")
        assert child.hear() == [77, "CANCELLED"]
        assert claim.waiters == []
        assert here.balanced()
        fill(here.pager, claim)
        here.pager.commit(claim)


def test_a_time_out_and_a_cancellation_are_said_and_leave_no_waiter():
    with bench() as here:
        claim = here.pager.begin(PageFault(2))
        child = here.child(
            """
memory._timeout = 0.05
try:
    memory.read(2 * 4096, 1)
except BusyError as error:
    say(str(error))
memory._timeout = None
heard()
threading.Timer(0.05, memory.cancel).start()
try:
    memory.read(2 * 4096, 1)
except CancelledError as error:
    say(str(error))
"""
        )
        assert "gpa 0x2000 was not made present within 0.05 seconds" in child.hear()
        wait_for(lambda: not claim.waiters and here.balanced())
        child.tell("go on")
        assert "called off" in child.hear()
        wait_for(lambda: not claim.waiters and here.balanced())
        fill(here.pager, claim)
        here.pager.commit(claim)


def test_pages_are_taken_away_while_a_device_writes_and_no_write_is_lost():
    with bench() as here:
        child = here.child(
            """
def add(worker):
    for _ in range(400):
        page = random.randrange(8)
        with memory.view(page * 4096 + 8 * worker, 8) as view:
            words = view.cast("Q")
            words[0] += 1
            words.release()
        counts[worker] += 1
counts = [0, 0]
threads = [threading.Thread(target=add, args=(worker,)) for worker in range(2)]
before = sum(memory.load64(8 * 4096 * 0 + page * 4096 + 8 * w) for page in range(8) for w in range(2))
say("ready")
[each.start() for each in threads]; [each.join() for each in threads]
say(counts)
"""
        )
        child.hear()
        stop = threading.Event()

        def revoke():
            while not stop.is_set():
                here.pager.mark_nonpresent(0, 8)

        def listen():
            try:
                assert child.hear() == [400, 400]
            finally:
                stop.set()

        in_threads(revoke, listen)
        total = sum(
            int.from_bytes(page_of(here.pager, page)[8 * worker : 8 * worker + 8], "little")
            - int.from_bytes(content(page)[:8], "little")
            for page in range(8)
            for worker in range(2)
        )
        assert total == 800
        assert here.pager.counters.pages_revoked > 0
        assert here.balanced()
        assert here.server.counters.invalidates == here.server.counters.acks


def test_a_view_keeps_its_pages_until_it_is_closed():
    with bench() as here:
        child = here.child(
            """
with memory.view(4096, 4096) as view:
    say("open")
    heard()
    view[0] = 99
say("closed")
"""
        )
        child.hear()
        with pytest.raises(BusyError, match="does not let go of memory"):
            here.pager.mark_nonpresent(0, 4, timeout=0.05)
        assert here.pager.bitmap.test(1)
        child.tell("close")
        assert child.hear() == "closed"
        assert here.pager.mark_nonpresent(0, 4, timeout=SOON) == 1
        assert page_of(here.pager, 1)[0] == 99


def test_frozen_devices_touch_nothing_until_they_are_thawed():
    with bench() as here:
        child = here.child(
            """
def attempt():
    try:
        say(memory.read(0, 1)[0])
    except FrozenError:
        say("frozen")
while heard():
    attempt()
"""
        )
        child.tell("read")
        assert child.hear() == content(0)[0]
        here.server.freeze(time.monotonic() + SOON)
        child.tell("read")
        assert child.hear() == "frozen"
        here.server.thaw()
        while True:  # THAW is not acknowledged
            child.tell("read")
            if child.hear() != "frozen":
                break


def test_who_comes_while_accesses_are_frozen_is_told_as_it_begins():
    with bench() as here:
        here.server.freeze(None)
        child = here.child("say(receive().kind.name)", raw=True)
        assert child.hear() == "FREEZE"


def test_the_doorbell_rings_once_until_it_is_answered():
    with bench() as here:
        child = here.child(
            """
for turn in (1, 2):
    rung = memory.wait_doorbell()
    say([rung.number, rung.gpa])
    heard()
    memory.completed(turn)
say(memory.wait_doorbell())
"""
        )
        for _ in range(100):  # more than the queue holds: a bell that is rung already is not sent again
            child.session.ring(1, 0x3000)
        assert child.hear() == [1, 0x3000]
        child.tell("done")
        assert child.hear() == [1, 0x3000]
        child.tell("done")
        here.server.close()
        assert child.hear() is None


def test_a_device_hears_the_end_of_the_machine():
    with bench() as here:
        child = here.child(
            """
say("ready")
while memory.over is None:
    time.sleep(0.001)
try:
    memory.read(0, 1)
except PagingError as error:
    say(str(error))
memory.close()
"""
        )
        child.hear()
        here.server.close()
        assert child.hear() == "the machine has ended the session"
        child.done()


def test_two_full_queues_do_not_hold_each_other_up():
    with bench() as here:
        child = here.child(
            """
for page in range(given.credits):
    send(Record(Kind.FAULT, page + 1, page * 4096, 4096))
    send(Record(Kind.RELEASE, page + 1))
say("sent")
heard()
dones = acks = 0
while dones < given.credits or acks < given.credits:
    record = receive()
    if record.kind is Kind.DONE:
        dones += 1
    else:
        send(Record(Kind.ACK, record.token))
        acks += 1
say([dones, acks])
""",
            raw=True,
        )
        child.hear()
        credits = child.session.credits
        tokens = [child.session.ask(Kind.INVALIDATE, 4096 * page, 4096) for page in range(credits)]
        wait_for(here.balanced)
        child.tell("read")
        for token in tokens:
            child.session.await_ack(token, time.monotonic() + SOON)
        assert child.hear() == [credits, credits]
        assert here.sentences == []


def test_a_killed_device_is_noticed_and_replaced():
    with bench() as here:
        claim = here.pager.begin(PageFault(2))
        child = here.child("memory.read(2 * 4096, 1)")
        wait_for(lambda: claim.waiters)
        child.process.kill()
        assert here.next_report() == f"device process {child.pid} has died"
        assert claim.waiters == []
        fill(here.pager, claim)
        here.pager.commit(claim)
        assert here.pager.mark_nonpresent(0, PAGES, timeout=SOON) == 1
        other = here.child("say(memory.read(2 * 4096, 1)[0])")
        assert other.hear() == content(2)[0]
        assert other.session.epoch > child.session.epoch


def test_a_failed_source_is_a_failure_for_the_device():
    with bench() as here:

        def fail(first, count):
            raise source_error(first, count)

        here.source.before = fail
        child = here.child(
            """
try:
    memory.read(4096, 1)
except PagingError as error:
    say(str(error))
"""
        )
        assert "gpa 0x1000 cannot be made present: failed" in child.hear()
        assert here.pager.resolve(PageFault(1)) is Outcome.FAILED


def test_anonymous_memory_is_refused():
    refusal = pytest.raises(ValueError, match="cannot be handed to another process: use the backing memfd")
    with bench() as here, AnonymousBacking(here.layout.memory_bytes) as backing, refusal:
        DeviceServer(here.layout, backing, here.pager, print)


def test_a_trap_that_fills_elsewhere_is_refused():
    with bench() as here, Mapping.anonymous(here.layout.memory_bytes) as staging:
        here.trap.fill_view = staging.view
        with pytest.raises(
            ValueError, match="the trap userfaultfd, in the mode missing, fills pages where no other"
        ):
            DeviceServer(here.layout, here.backing, here.pager, print)


@pytest.mark.parametrize("how", ["select", "poll", "epoll", "asyncio"])
def test_the_notifier_can_be_polled(how):
    waits = {
        "select": "import select; ready = bool(select.select([notifier], [], [], 20)[0])",
        "poll": "import select; p = select.poll(); p.register(notifier, 1); ready = bool(p.poll(20000))",
        "epoll": "import select; p = select.epoll(); p.register(notifier, 1); ready = bool(p.poll(20))",
        "asyncio": """
import asyncio
async def main():
    notifier.setblocking(False)
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(notifier, 65), 20)
message = asyncio.run(main())
ready, receive = True, lambda: unpack(message, given.epoch)""",
    }
    with bench() as here:
        child = here.child(
            f"send(Record(Kind.FAULT, 9, 0, 4096))\n{waits[how]}\nsay([ready, receive().kind.name])", raw=True
        )
        assert child.hear() == [True, "DONE"]


def test_the_notifier_can_be_passed_on():
    with bench() as here:
        child = here.child(
            """
ours, theirs = socket.socketpair()
if os.fork() == 0:
    _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
    passed = socket.socket(fileno=fds[0])
    passed.send(Record(Kind.FAULT, 5, 0, 4096).pack(given.epoch))
    os._exit(0)
socket.send_fds(ours, [b"x"], [notifier.fileno()])
say(receive().token)
""",
            raw=True,
        )
        assert child.hear() == 5


def wait_for(condition):
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
