"""What is left to be done for an access once KVM's emulator is through with it, whatever happens in between."""

import numpy as np
import pytest
from harness import MEMORY, SEED, TIMEOUT, program_machine

from kvmdp.abi.signal import BUS_MCEERR_AR
from kvmdp.kvm import BusError
from kvmdp.memory.layout import PAGE_SIZE
from kvmdp.paging.emulated import Emulation
from kvmdp.source.base import read_pages
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm

# mov rax, 0x1122334455667788; mov [0x5ffd], rax; ret
STORE_ACROSS = bytes.fromhex("48b88877665544332211 48890425fd5f0000 c3")


def test_a_store_is_kept_if_kvm_comes_out_for_something_else_in_the_end(monkeypatch):
    finish_store = Emulation.finish_store

    def and_a_bus_error(emulation, store):
        stores, _ = finish_store(emulation, store)
        return stores, BusError(machine.backing.guest.hva + 7 * PAGE_SIZE, BUS_MCEERR_AR)

    monkeypatch.setattr(Emulation, "finish_store", and_a_bus_error)
    with program_machine("mmio", STORE_ACROSS) as machine:
        machine.run(TIMEOUT)
        expected = bytearray(read_pages(SyntheticSource(MEMORY, SEED), np.array([5, 6])).tobytes())
        expected[0xFFD:0x1005] = bytes.fromhex("8877665544332211")
        assert machine.memory.read(5 * PAGE_SIZE, 2 * PAGE_SIZE) == expected
        assert machine.pager.bitmap.test(7)
