"""A device process whose main thread is interrupted in an access still lets go of memory."""

import pytest
from interruptions import interrupt_everywhere
from remote_devices import EPOCH, device

from kvmdp.page import PAGE_SIZE
from kvmdp.peers.wire.records import RECORD_SIZE, Kind, Record, unpack

SOON = 10


def look_into(memory):
    with memory.view(0, 8) as view:
        view[0] = 1


ACCESSES = {
    "read": lambda memory: memory.read(0, 8),
    "write": lambda memory: memory.write(0, b"8 bytes."),
    "load64": lambda memory: memory.load64(8),
    "store64": lambda memory: memory.store64(8, 1),
    "view": look_into,
}


# At its very exit the traceback keeps a view, as it would any context manager.
@pytest.mark.parametrize(
    ("access", "steps"),
    [*((name, True) for name in ACCESSES), *((name, False) for name in ACCESSES if name != "view")],
)
def test_the_machine_gets_its_ack_while_the_interruption_of_an_access_is_dealt_with(access, steps):
    def once(interrupted):
        with device(4) as (memory, ours):
            ours.settimeout(SOON)

            def ask():
                ours.send(Record(Kind.INVALIDATE, 1, 0, PAGE_SIZE).pack(EPOCH))
                assert unpack(ours.recv(RECORD_SIZE), EPOCH) == Record(Kind.ACK, 1)

            def call():
                try:
                    ACCESSES[access](memory)
                except KeyboardInterrupt:
                    ask()  # while its traceback keeps what the access was at
                    raise

            interrupted(call)

    assert interrupt_everywhere(once, steps) > 1
