"""Port I/O: string instructions come as one exit of many items, and the loopback port gives back what it was given."""

import struct

import numpy as np
import pytest
from harness import SEED, TIMEOUT, TRAPS, all_of_ram, program_machine

from kvmdp.kvm import IoIn, IoOut
from kvmdp.machine.guest_abi import LOOPBACK_PORT
from kvmdp.machine.ports import Loopback, Ports
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.source.synthetic import SyntheticSource

RET = b"\xc3"
REP_OUTSB, REP_OUTSW, REP_OUTSD = b"\xf3\x6e", b"\xf3\x66\x6f", b"\xf3\x6f"
REP_INSB, REP_INSD = b"\xf3\x6c", b"\xf3\x6d"


def mov(register, value):
    """mov r32, imm32, by the register's number."""
    return bytes([0xB8 + register]) + struct.pack("<I", value)


def string(instruction, address, count, port=LOOPBACK_PORT):
    """mov ecx, count; mov edx, port; mov esi, address; mov edi, address; the instruction."""
    return mov(1, count) + mov(2, port) + mov(6, address) + mov(7, address) + instruction


def loopback(vcpus=1):
    ports = Ports()
    Loopback(ports, vcpus)

    def out(data, vcpu=0):
        assert ports.handle(vcpu, IoOut(LOOPBACK_PORT, 1, len(data), memoryview(bytearray(data))))

    def back(length, vcpu=0):
        data = bytearray(length)
        assert ports.handle(vcpu, IoIn(LOOPBACK_PORT, 1, length, memoryview(data)))
        return bytes(data)

    return out, back


def test_what_goes_out_comes_back_in_order():
    out, back = loopback()
    out(b"abc")
    out(b"de")
    assert (back(2), back(2), back(1)) == (b"ab", b"cd", b"e")


def test_where_nothing_is_left_a_read_gives_ones():
    out, back = loopback()
    out(b"ab")
    assert back(4) == b"ab\xff\xff"
    assert back(1) == b"\xff"


def test_what_does_not_fit_is_lost():
    out, back = loopback()
    out(bytes(4000))
    out(b"x" * 200)
    out(b"y")
    assert back(4097) == bytes(4000) + b"x" * 96 + b"\xff"


def test_each_vcpu_has_its_own():
    out, back = loopback(2)
    out(b"a", vcpu=0)
    out(b"b", vcpu=1)
    assert (back(1, vcpu=1), back(1, vcpu=0)) == (b"b", b"a")


def test_a_port_has_one_handler():
    ports = Ports()
    Loopback(ports, 1)
    assert not ports.handle(0, IoIn(0x80, 1, 1, memoryview(bytearray(1))))
    with pytest.raises(ValueError, match="port 0x514 is taken: give the device another"):
        ports.add(LOOPBACK_PORT, lambda vcpu, io: None)


@pytest.mark.kvm
@pytest.mark.parametrize("ring", [3, 0])
@pytest.mark.parametrize("trap", TRAPS)
def test_items_of_every_size_keep_their_bytes_and_their_order(trap, ring):
    # The string instructions cross from an absent page into an absent page, out and in.
    code = string(REP_OUTSB, 0x5FFD, 7) + string(REP_OUTSW, 0x7FFB, 4) + string(REP_OUTSD, 0x9FF9, 5)
    code += string(REP_INSB, 0xBFF6, 15) + string(REP_INSD, 0xDFFA, 5) + RET
    with program_machine(trap, code, ring=ring) as machine:
        machine.run(TIMEOUT)
        pages = SyntheticSource(2 << 20, SEED).pages(np.arange(16)).tobytes()
        sent = pages[0x5FFD:0x6004] + pages[0x7FFB:0x8003] + pages[0x9FF9:0xA00D]
        ram = all_of_ram(machine)[:16].tobytes()
        assert ram[0xBFF6:0xC005] + ram[0xDFFA:0xE00E] == sent
        assert ram[0xC005:0xD000] == pages[0xC005:0xD000]
        assert machine.pager.counters.pages_fetched == 10


@pytest.mark.kvm
def test_kvm_gives_several_items_at_once_and_all_are_served():
    seen = []
    code = string(REP_INSB, 0x3000, 100, port=0x300) + RET
    with program_machine("mmio", code) as machine:

        def serve(vcpu, io):
            seen.append((vcpu, type(io), io.size, io.count, io.data.nbytes))
            io.data[:] = bytes(range(len(io.data)))

        machine.ports.add(0x300, serve)
        machine.run(TIMEOUT)
        assert all(each[:3] == (0, IoIn, 1) and each[3] == each[4] for each in seen)
        counts = [count for *_, count, _ in seen]
        assert sum(counts) == 100
        assert max(counts) > 1
        whole = b"".join(bytes(range(count)) for count in counts)
        assert all_of_ram(machine)[3].tobytes()[:100] == whole


@pytest.mark.kvm
def test_a_handler_that_breaks_ends_the_run_with_a_sentence():
    code = string(REP_INSB, 0x3000, 1, port=0x300) + RET
    with program_machine("mmio", code) as machine:
        machine.ports.add(0x300, lambda vcpu, io: 1 // 0)
        with pytest.raises(GuestError, match="vCPU 0: internal error: ZeroDivisionError"):
            machine.run(TIMEOUT)
