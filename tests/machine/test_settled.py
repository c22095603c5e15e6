"""What is left to be done for an access once KVM's emulator is through with it, whatever happens in between."""

import threading

import numpy as np
import pytest
from harness import MEMORY, SEED, TIMEOUT, program_machine

from kvmdp.abi.kvm_x86 import kvm_segment
from kvmdp.abi.signal import BUS_MCEERR_AR
from kvmdp.kvm import BusError, InternalError
from kvmdp.machine.vcpu_thread import GuestError, GuestTimeoutError
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.jobs import Observer
from kvmdp.source.base import read_pages
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.vcpu.emulated import Emulation, Form
from kvmdp.vcpu.faults import VcpuPaging
from kvmdp.vcpu.instruction import InstructionReader

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


def test_a_page_that_an_event_was_to_be_delivered_to_is_made_present():
    with program_machine("mmio", b"\xc3") as machine:
        paging = machine.threads[0]._paging
        undelivered = InternalError(3, (0, 0x400, 0xE, 7 * PAGE_SIZE + 8, 0), b"")
        assert paging.handle(undelivered) is None
        assert machine.pager.bitmap.test(7)
        # Again and again on a page that is present: it is not the page that it fails for.
        ends = [paging.handle(undelivered) for _ in range(100)]
        assert ends[0] is None
        assert ends[-1] is undelivered
        outside = InternalError(3, (0, 0x400, 0xE, MEMORY + 8, 0), b"")
        assert paging.handle(outside) is outside


# lgdt [gdtr]; mov rbx,rsp; mov esp,0x3010; call far [target]; mov rsp,rbx; mov eax,[0x300c]; xor edx,edx; ret
# target: 8:0xd0100015; gdtr: 23, gdt; gdt: null, code, data
FAR_CALL = bytes.fromhex(
    "0f011521000000 4889e3 bc10300000 ff1d0d000000 4889dc 8b04250c300000 31d2 c3"
    "150010d0 0800 1700 320010d000000000 0000000000000000 ffff0000009baf00 ffff00000093cf00"
)


@pytest.mark.parametrize("has_ldt", [False, True])
def test_a_far_call_is_taken_back_where_it_cannot_have_come_from_another_segment(has_ldt):
    with program_machine("mmio", FAR_CALL, ring=0) as machine:
        vcpu = machine.threads[0].vcpu
        if has_ldt:  # as a CPU has one at its reset
            system = vcpu.sregs
            system.ldt = kvm_segment(limit=0xFFFF, type=2, present=1)
            vcpu.set_sregs(system)
        machine.run(TIMEOUT)
        assert machine.threads[0].emulated == ({Form.FAR_CALL: 1} if has_ldt else {})
        assert machine.threads[0].parameters.checksum == 8 or has_ldt


# lea rax,[1f]; mov [rdi+0x190],rax (BLOCK_MC_RESUME); pcmpeqd xmm0,xmm0; movdqu xmm0,[0x5000]; 1: movq rax,xmm0;
# xor edx,edx; ret
LOAD_VECTOR = bytes.fromhex("488d0514000000 48898790010000 660f76c0 f30f6f042500500000 66480f7ec0 31d2 c3")


def test_vector_registers_are_as_before_if_a_page_is_poisoned_after_its_load_was_taken_back(monkeypatch):
    retry = VcpuPaging._retry

    def poison_and_retry(paging, page):
        machine.pager.poison(page)
        retry(paging, page)

    monkeypatch.setattr(VcpuPaging, "_retry", poison_and_retry)
    with program_machine("mmio", LOAD_VECTOR) as machine:
        machine.run(TIMEOUT)
        block = machine.threads[0].parameters
        assert (block.mc_count, hex(block.checksum)) == (1, hex((1 << 64) - 1))


def test_a_far_call_whose_pointer_has_been_taken_away_since_counts_as_one_that_may_be_wrong(monkeypatch):
    code_at = InstructionReader.code_at

    def without_pointers(reader, rip, length=15):
        return b"" if length == 6 else code_at(reader, rip, length)

    monkeypatch.setattr(InstructionReader, "code_at", without_pointers)
    with program_machine("mmio", FAR_CALL, ring=0) as machine:
        machine.run(TIMEOUT)
        assert machine.threads[0].emulated == {Form.FAR_CALL: 1}


# mov edx,0x300; mov edi,0x5ffe; mov ecx,4; rep insb; mov eax,[0x5ffe]; xor edx,edx; ret
INPUT_ACROSS = bytes.fromhex("ba00030000 bffe5f0000 b904000000 f36c 8b0425fe5f0000 31d2 c3")


def count_up(machine):
    """Have the port answer with 1, 2, 3...; returns the list of the bytes that it has given."""
    given = []

    def serve(vcpu, io):
        for index in range(io.data.nbytes):
            given.append(len(given) + 1)
            io.data[index] = given[-1]

    machine.ports.add(0x300, serve)
    return given


def test_string_input_goes_to_pages_of_which_each_is_taken_away_when_the_other_comes():
    comes = []

    def rob(fault, claim, began):
        comes.append(fault.page)
        assert len(comes) < 100, "the input gets nowhere"
        if not given:
            machine.pager.shut_off(11 - fault.page, 1)

    with program_machine("mmio", INPUT_ACROSS) as machine:
        given = count_up(machine)
        machine.pager.jobs.add(Observer(rob))
        machine.run(TIMEOUT)
        assert (given, hex(machine.threads[0].parameters.checksum)) == ([1, 2, 3, 4], "0x4030201")


def test_a_machine_stops_whose_string_input_waits_for_a_page_that_another_thread_fetches():
    fetching, stopping = threading.Event(), threading.Event()

    class Slow(SyntheticSource):
        def fetch(self, request, destination):
            fetching.set()
            assert stopping.wait(TIMEOUT)
            super().fetch(request, destination)

    with program_machine("mmio", INPUT_ACROSS, source=Slow(MEMORY, SEED)) as machine:
        given = count_up(machine)
        other = threading.Thread(target=lambda: machine.pager.mark_present(5, 1))
        other.start()
        try:
            assert fetching.wait(TIMEOUT)
            with pytest.raises(GuestTimeoutError):
                machine.run(0.2)
        finally:
            stopping.set()
            other.join()
        assert given == []


STEPPED = {
    # pushfq; or byte [rsp+1],1; popfq; mov eax,[0x6000]; ret
    "load": ("9c 804c240101 9d 8b042500600000 c3", "#DB"),
    # mov esp,0x6000; pushfq; or byte [rsp+1],1; popfq; retf, to where there is nothing
    "far return": ("bc00600000 9c 804c240101 9d cb", "#GP"),
}


@pytest.mark.parametrize(("code", "end"), STEPPED.values(), ids=STEPPED)
def test_a_load_that_was_taken_back_is_no_step(code, end, monkeypatch):
    seen = []
    retry, finish = VcpuPaging._retry, Emulation.finish

    def look_and_retry(paging, page):
        seen.append((page, hex(machine.threads[0].vcpu.registers.debug.dr6)))
        retry(paging, page)

    def finish_and_look(emulation):
        following = finish(emulation)
        _ = emulation._vcpu.events  # has KVM put the step that it means to raise into DR6 (Linux 7.3)
        return following

    monkeypatch.setattr(VcpuPaging, "_retry", look_and_retry)
    monkeypatch.setattr(Emulation, "finish", finish_and_look)
    with program_machine("mmio", bytes.fromhex(code)) as machine:
        before = machine.threads[0].vcpu.registers.debug.dr6
        with pytest.raises(GuestError, match=end):
            machine.run(TIMEOUT)
    assert seen == [(6, hex(before))]
