"""A device process sleeps while accesses are frozen, until they are thawed or there is nothing to wait for."""

import contextlib
import threading

import pytest
from fakes import started
from remote_devices import EPOCH, device

from kvmdp.errors import PagingError
from kvmdp.peers.wire.records import Kind, Record

SOON = 20


@pytest.mark.parametrize("how", ["thaw", "bye", "the machine goes", "cancel"])
def test_a_device_that_waits_for_the_thaw_goes_on(how):
    with device(1, sent_before=[Record(Kind.FREEZE, 7)]) as (memory, machine):
        waits = threading.Event()
        thread = started(lambda: (waits.set(), memory.await_thaw()))
        assert waits.wait(SOON)
        thread.join(0.05)
        assert thread.is_alive()
        if how == "cancel":
            memory.cancel()
        elif how == "the machine goes":
            machine.close()
        else:
            machine.send(Record(Kind.THAW if how == "thaw" else Kind.BYE).pack(EPOCH))
        thread.join(SOON)
        assert not thread.is_alive()
        with contextlib.nullcontext() if how == "thaw" else pytest.raises(PagingError):
            memory.read(0, 1)


def test_a_device_that_is_not_frozen_does_not_wait():
    with device(1) as (memory, _):
        memory.await_thaw()
