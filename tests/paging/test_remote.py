"""RemoteMemory against a machine that the test plays itself, at the other end of the notifier."""

import contextlib
import os
import threading

import pytest
from fakes import PAGES

from kvmdp.memory.backing import MemfdBacking
from kvmdp.memory.bitmap import PresentBitmap
from kvmdp.memory.layout import PAGE_SIZE
from kvmdp.paging.fault import CancelledError, FrozenError, PagingError
from kvmdp.paging.remote import RemoteMemory
from kvmdp.wire.handover import Descriptors, Handover, Role
from kvmdp.wire.notifier import notifier_pair
from kvmdp.wire.records import RECORD_SIZE, Kind, Record, unpack

SOON = 20
EPOCH = 3


@contextlib.contextmanager
def device(credits, *, sent_before=()):
    """Yield a RemoteMemory, page 0 of which is present, and the machine's end of its notifier."""
    size = PAGES * PAGE_SIZE
    ours, theirs, _ = notifier_pair(credits)
    with ours, MemfdBacking(size) as backing, contextlib.closing(PresentBitmap(PAGES)) as bitmap:
        bitmap.set_range(0, 1)
        for record in sent_before:
            ours.send(record.pack(EPOCH))
        given = Handover(EPOCH, Role.DEVICE, credits, PAGES, ((0, size, 0),))
        passed = Descriptors(os.dup(backing.fd), os.dup(bitmap.fd), theirs.detach())
        with RemoteMemory(given, passed) as memory:
            yield memory, ours


def readers(memory, pages):
    """Start a thread a page that reads it; returns them and the errors they end with."""
    errors = []

    def read(page):
        try:
            memory.read(page * PAGE_SIZE, 1)
        except PagingError as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(page,), daemon=True) for page in pages]
    for thread in threads:
        thread.start()
    return threads, errors


@pytest.mark.parametrize("how", ["the machine goes", "cancel"])
def test_nobody_waits_for_a_credit_when_the_session_is_over(how):
    with device(1) as (memory, machine):
        threads, errors = readers(memory, (1, 2, 3))
        assert unpack(machine.recv(RECORD_SIZE), EPOCH).kind is Kind.FAULT
        if how == "cancel":
            memory.cancel()
        else:
            machine.close()
        for thread in threads:
            thread.join(SOON)
            assert not thread.is_alive()
        assert len(errors) == 3
        assert {type(error) for error in errors} == {CancelledError if how == "cancel" else PagingError}


def test_a_freeze_sent_before_the_hand_over_counts_before_the_first_access():
    with device(1, sent_before=[Record(Kind.FREEZE, 7)]) as (memory, machine):
        with pytest.raises(FrozenError):
            memory.read(0, 1)
        assert unpack(machine.recv(RECORD_SIZE), EPOCH).token == 7
        machine.send(Record(Kind.THAW).pack(EPOCH))
        machine.send(Record(Kind.DOORBELL).pack(EPOCH))
        assert memory.wait_doorbell(SOON)
        assert memory.read(0, 1) == b"\0"


def test_an_invalidate_outside_ram_ends_the_session():
    with device(1) as (memory, machine):
        threads, errors = readers(memory, (1,))
        machine.send(Record(Kind.INVALIDATE, 1, 1 << 40, PAGE_SIZE).pack(EPOCH))
        threads[0].join(SOON)
        assert "a record that makes no sense (gpa 0x10000000000 is not guest RAM)" in str(errors[0])
