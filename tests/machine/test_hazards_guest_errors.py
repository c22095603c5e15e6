"""What a guest does wrong ends the run with one sentence that says what and where, under every trap."""

import pytest
from harness import LOOP_FOREVER, TIMEOUT, TRAPS, program_machine

from kvmdp.abi import libc
from kvmdp.abi.mman import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_NONE
from kvmdp.machine.vcpu_thread import GuestError, GuestTimeoutError

pytestmark = [pytest.mark.kvm, pytest.mark.parametrize("trap", TRAPS)]

BEYOND = (2 << 20) + 4096  # of RAM this large the guest maps the rest of the last 2 MiB as well


def message_of(trap, code, *, ring=3, **options):
    with program_machine(trap, bytes.fromhex(code), ring=ring, **options) as machine:
        with pytest.raises(GuestError) as caught:
            machine.run(TIMEOUT)
        assert machine.threads[0].exits.total() > 0
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ring", [3, 0])
def test_an_address_that_is_not_mapped(trap, ring):
    # mov eax,[0x40000000]
    message = message_of(trap, "8b042500000040", ring=ring)
    assert message.startswith("vCPU 0: guest exception #PF at RIP 0xd0100000, error code ")
    assert message.endswith("it touched address 0x40000000, which is not mapped")


def test_a_read_beyond_ram(trap):
    # mov eax,[0x201008]
    message = message_of(trap, "8b042508102000", memory_bytes=BEYOND)
    assert (
        message == "vCPU 0: the guest read 4 bytes at gpa 0x201008, which is outside RAM, at RIP 0xd0100000"
    )


def test_a_write_beyond_ram(trap):
    # mov [0x201008],ax
    message = message_of(trap, "6689042508102000", memory_bytes=BEYOND)
    assert message.startswith("vCPU 0: the guest wrote 2 bytes at gpa 0x201008, which is outside RAM")


def test_an_access_of_which_only_the_second_half_is_beyond_ram(trap):
    # mov rax,[0x200ffc]: the last 4 bytes of RAM and 4 behind them
    message = message_of(trap, "488b0425fc0f2000", memory_bytes=BEYOND)
    assert message.startswith("vCPU 0: the guest read 4 bytes at gpa 0x201000, which is outside RAM")


def test_a_port_that_is_not_there(trap):
    # mov edx,0x80; out dx,al
    message = message_of(trap, "ba80000000ee")
    assert message.startswith(
        "vCPU 0: port I/O (out, 1 bytes) on port 0x80, where this machine has nothing, at RIP"
    )


def test_a_halt_without_a_report(trap):
    assert message_of(trap, "f4", ring=0).startswith(
        "vCPU 0: the guest halted without a report, at RIP 0xd0100"
    )


def test_a_privileged_instruction_in_ring_3(trap):
    assert message_of(trap, "f4").startswith("vCPU 0: guest exception #GP at RIP 0xd0100000")


def test_one_vcpu_that_fails_ends_the_run_of_all(trap):
    # test esi,esi; jz $ (vCPU 0 loops); ud2 (vCPU 1)
    with (
        program_machine(trap, bytes.fromhex("85f6 74fe 0f0b"), vcpus=2) as machine,
        pytest.raises(GuestError, match="vCPU 1: guest exception #UD at RIP 0xd0100004"),
    ):
        machine.run(TIMEOUT)


def test_an_endless_loop_is_ended_by_the_time_given(trap):
    with (
        program_machine(trap, LOOP_FOREVER) as machine,
        pytest.raises(
            GuestTimeoutError, match=r"within 0\.05 seconds \(vCPU 0 at RIP 0xd0100000\): give it more"
        ),
    ):
        machine.run(0.05)


def test_memory_that_the_host_has_no_page_for(trap):
    if trap == "marker":
        pytest.skip("its view is userfaultfd's too, which fails first: use memory-fault or mmio")
    with program_machine(trap, bytes.fromhex("8b042508500000")) as machine:  # mov eax,[0x5008]
        machine.memory.read(0x5000, 1)
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
        libc.mmap(4096, PROT_NONE, flags, address=machine.backing.guest.hva + 0x5000)
        with pytest.raises(GuestError) as caught:
            machine.run(TIMEOUT)
    assert str(caught.value).startswith(
        "vCPU 0: KVM_RUN failed with EFAULT: the host gives KVM no page for memory"
    )
    assert str(caught.value).endswith("at RIP 0xd0100000")
