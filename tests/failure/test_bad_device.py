"""Devices that break the rules: each is cut off with a sentence, and the machine goes on unharmed."""

import time
from pathlib import Path

import pytest
from device_process import SOON, bench
from fakes import PAGES, content, fill, page_of

from kvmdp.errors import BusyError
from kvmdp.page import Outcome, PageFault

SLEEP = "\ntime.sleep(60)"
FAULT = "send(Record(Kind.FAULT, {}, {}, 4096))"

BAD = {
    "garbage": ("notifier.send(os.urandom(64))", "it sent a record of version"),
    "half a record": ("notifier.send(bytes(32))", "it sent a message of 32 bytes, where a record has 64"),
    "too long": ("notifier.send(bytes(500))", "it sent a message of 65 bytes, where a record has 64"),
    "wrong version": (
        "m = bytearray(Record(Kind.BYE).pack(given.epoch)); m[0] = 2; notifier.send(m)",
        "it sent a record of version 2, where version 1 is spoken",
    ),
    "a reserved bit": (
        "m = bytearray(Record(Kind.BYE).pack(given.epoch)); m[48] = 1; notifier.send(m)",
        "it sent a record with reserved bits set",
    ),
    "an unknown kind": (
        "m = bytearray(Record(Kind.BYE).pack(given.epoch)); m[2] = 99; notifier.send(m)",
        "it sent a record with a field out of its range: 99 is not a valid Kind",
    ),
    "wrong epoch": ("send(Record(Kind.BYE), given.epoch + 1)", "it sent a record of session"),
    "not RAM": (FAULT.format(1, 512 * 4096), "4096 bytes at gpa 0x200000, which are not RAM"),
    "huge": (
        "send(Record(Kind.FAULT, 1, (1 << 64) - 4096, (1 << 64) - 4096))",
        "which are not RAM",
    ),
    "not whole pages": ("send(Record(Kind.FAULT, 1, 100, 4096))", "which are not whole pages"),
    "an ACK of nothing": ("send(Record(Kind.ACK, 1))", "an ACK of 1, which is no open question"),
    "a RELEASE of nothing": ("send(Record(Kind.RELEASE, 1))", "a RELEASE more than it sent FAULTs"),
    "a count that falls": (
        "send(Record(Kind.COMPLETED, size=2)); send(Record(Kind.COMPLETED, size=1))",
        "a COMPLETED of 1 requests after one of 2",
    ),
    "a DONE": ("send(Record(Kind.DONE, 1))", "a DONE, which is not a device's to send"),
    "an INVALIDATE": ("send(Record(Kind.INVALIDATE, 1, 0, 4096))", "which is not a device's to send"),
    "a FREEZE": ("send(Record(Kind.FREEZE, 1))", "a FREEZE, which is not a device's to send"),
    "closed": ("notifier.close()", "has closed its notifier without a BYE"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_device_that_breaks_the_rules_is_cut_off(what):
    code, sentence = BAD[what]
    with bench() as here:
        here.pager.mark_present(0, 1)
        child = here.child(code + SLEEP, raw=True)
        said = here.next_report()
        assert said.startswith(f"device process {child.pid} ")
        assert sentence in said
        assert said.endswith(f"until process {child.pid}, which has RAM mapped, has ended: end it")
        # It lives on, with RAM mapped: only its death lets pages go.
        with pytest.raises(BusyError, match=f"end process {child.pid}"):
            here.pager.mark_nonpresent(0, PAGES, timeout=0.01)
        assert here.pager.resolve(PageFault(9)) is Outcome.ADMITTED
        child.process.kill()
        assert here.pager.mark_nonpresent(0, PAGES, timeout=SOON) == 2
        assert here.balanced()
        assert page_of(here.pager, 0) == content(0)


def test_one_that_asks_twice_with_a_token_is_cut_off():
    with bench() as here:
        claim = here.pager.begin(PageFault(1))
        here.child(FAULT.format(7, 4096) + "\n" + FAULT.format(7, 8192) + SLEEP, raw=True)
        assert "a second FAULT with token 7" in here.next_report()
        assert claim.waiters == []
        assert here.balanced()
        fill(here.pager, claim)
        here.pager.commit(claim)


def test_one_that_asks_beyond_its_credits_is_cut_off():
    with bench() as here:
        claim = here.pager.begin(PageFault(1))
        here.child(f"for n in range(given.credits + 1):\n {FAULT.format('n', 4096)}{SLEEP}", raw=True)
        assert "a FAULT beyond its 64 credits" in here.next_report()
        fill(here.pager, claim)
        here.pager.commit(claim)


def test_one_that_never_reads_is_cut_off():
    with bench() as here:
        here.server.freeze(None)  # then each fault is answered at once
        here.child(
            "try:\n for n in range(100000):\n  send(Record(Kind.FAULT, n, 0, 4096))\nexcept OSError: pass"
            + SLEEP,
            raw=True,
        )
        assert "is cut off: it does not read what it is sent" in here.next_report()
        assert here.balanced()


def test_one_that_acknowledges_twice_is_cut_off():
    with bench() as here:
        here.pager.mark_present(0, 1)
        here.child(
            "question = receive()\nfor _ in range(2): send(Record(Kind.ACK, question.token))" + SLEEP,
            raw=True,
        )
        assert here.pager.mark_nonpresent(0, 1, timeout=SOON) == 1
        assert "an ACK of 1, which is no open question" in here.next_report()


def test_one_that_never_acknowledges_is_cut_off():
    with bench(patience=0.2) as here:
        here.pager.mark_present(0, 1)
        child = here.child(SLEEP, raw=True)
        with pytest.raises(BusyError, match=f"end process {child.pid}"):
            here.pager.mark_nonpresent(0, 1)
        assert "is cut off: it did not let go of memory within 0.2 seconds" in here.next_report()
        assert here.pager.bitmap.test(0)
        child.process.kill()
        assert here.pager.mark_nonpresent(0, 1, timeout=SOON) == 1


def test_descriptors_sent_to_the_machine_are_not_kept():
    with bench() as here:
        here.pager.mark_present(0, 1)
        child = here.child(
            """
say("ready")
heard()
socket.send_fds(notifier, [Record(Kind.FAULT, 1, 0, 4096).pack(given.epoch)], [0, 1, 2])
say(receive().kind.name)
heard()""",
            raw=True,
        )
        assert child.hear() == "ready"
        before = len(list(Path("/proc/self/fd").iterdir()))
        child.tell("")
        assert child.hear() == "DONE"
        assert len(list(Path("/proc/self/fd").iterdir())) == before


TRUST = """
def attempt(what, call):
    try:
        call()
        say([what, "done"])
    except OSError as error:
        say([what, "refused"])
ram, bitmap = descriptors.ram, descriptors.bitmap
page = 4096
attempt("map the bitmap to write", lambda: mmap.mmap(bitmap, 64, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))
attempt("write the bitmap", lambda: os.write(bitmap, bytes(8)))
attempt("cut the bitmap", lambda: os.ftruncate(bitmap, 0))
attempt("punch the bitmap", lambda: os.posix_fallocate(bitmap, 0, 1 << 20))
attempt("shrink RAM", lambda: os.ftruncate(ram, page))
attempt("grow RAM", lambda: os.ftruncate(ram, 1 << 30))
for seal in (1, 8, 16):
    for fd in (ram, bitmap):
        attempt(f"seal {seal}", lambda: fcntl.fcntl(fd, 1033, seal))
reopened = os.open(f"/proc/self/fd/{bitmap}", os.O_RDWR)
attempt("write it reopened", lambda: os.write(reopened, bytes(8)))
attempt("map it reopened", lambda: mmap.mmap(reopened, 64, mmap.MAP_SHARED, mmap.PROT_WRITE))
say("end")
"""


def test_a_device_can_change_neither_the_bitmap_nor_the_size_of_ram():
    with bench() as here:
        child = here.child(TRUST, raw=True)
        found = []
        while (line := child.hear()) != "end":
            found.append(line)
        assert len(found) == 14
        assert [what for what, how in found if how != "refused"] == []
        assert here.pager.bitmap.count() == 0


def test_a_device_gets_four_descriptors_and_no_more():
    with bench() as here:
        child = here.child("heard()", raw=True)
        names = {}
        wait_for(lambda: names.update(links(child.pid)) or len(names) >= 7)
        assert sorted(name.split(":")[0] for fd, name in names.items() if fd > 2) == [
            "/memfd",
            "/memfd",
            "socket",
            "socket",
        ]


def links(pid):
    return {int(each.name): str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()}


def wait_for(condition):
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
