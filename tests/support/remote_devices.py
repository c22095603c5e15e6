"""A device's memory, with the machine's end of its notifier in the hands of the test."""

import contextlib
import os
import threading

from fakes import PAGES

from kvmdp.errors import PagingError
from kvmdp.memory.backing import MemfdBacking
from kvmdp.memory.bitmap import PresentBitmap
from kvmdp.page import PAGE_SIZE
from kvmdp.peers.remote import RemoteMemory
from kvmdp.peers.wire.handover import Descriptors, Handover, Role
from kvmdp.peers.wire.notifier import notifier_pair

EPOCH = 3


@contextlib.contextmanager
def device(credits, **options):
    """Yield a RemoteMemory, page 0 of which is present, and the machine's end of its notifier."""
    with device_and_ram(credits, **options) as (memory, machine, _bitmap, _ram):
        yield memory, machine


@contextlib.contextmanager
def device_and_ram(credits, *, sent_before=(), regions=None, machine=None, timeout=None):
    """Yield a RemoteMemory, the machine's end of its notifier, the machine's bitmap and its view of RAM."""
    size = PAGES * PAGE_SIZE
    ours, theirs, _ = notifier_pair(credits)
    with ours, MemfdBacking(size) as backing, contextlib.closing(PresentBitmap(PAGES)) as bitmap:
        bitmap.set_range(0, 1)
        for record in sent_before:
            ours.send(record.pack(EPOCH))
        given = Handover(EPOCH, Role.DEVICE, credits, PAGES, regions or ((0, size, 0),))
        passed = Descriptors(os.dup(backing.fd), os.dup(bitmap.fd), theirs.detach())
        with RemoteMemory(given, passed, machine=machine, timeout=timeout) as memory:
            yield memory, ours, bitmap, backing.vmm.view


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
