"""The gate vCPUs pass: who is kept out, who is kicked, and what happens when one does not come out."""

import threading
import time

import pytest
from fakes import started

from kvmdp.errors import PagingError
from kvmdp.vcpu import gate as gate_module
from kvmdp.vcpu.gate import VcpuGate

SOON = 5


class FakeVcpu:
    """Runs until it is kicked `stubborn` times more than once."""

    def __init__(self, index=0, stubborn=0):
        self.index = index
        self.immediate_exit = False
        self.kicks = 0
        self._stubborn = stubborn
        self._left = threading.Event()

    def kick(self):
        self.kicks += 1
        self.immediate_exit = True
        if self.kicks > self._stubborn:
            self._left.set()

    def run_in(self, gate, entered=None):
        """Enter, stay until kicked, leave; False if the gate let nobody in."""
        if not gate.enter(self):
            return False
        if entered is not None:
            entered.set()
        self._left.wait(SOON)
        self._left.clear()
        gate.leave(self)
        return True


def running(gate, *vcpus):
    """Start a thread for each vCPU; return once all are inside."""
    threads = []
    for vcpu in vcpus:
        entered = threading.Event()
        threads.append(started(lambda vcpu=vcpu, entered=entered: vcpu.run_in(gate, entered)))
        assert entered.wait(SOON)
    return threads


def join(threads):
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()


def test_quiescing_gets_every_vcpu_out_and_lets_none_in():
    gate = VcpuGate()
    vcpus = [FakeVcpu(0), FakeVcpu(1)]
    threads = running(gate, *vcpus)
    late = FakeVcpu(2)
    with gate.quiesced():
        assert not any(gate.is_inside(vcpu) for vcpu in vcpus)
        waiting = started(lambda: late.run_in(gate))
        waiting.join(0.05)
        assert waiting.is_alive()
        assert not gate.is_inside(late)
    while not gate.is_inside(late):
        time.sleep(0.001)
    late.kick()
    join([*threads, waiting])
    assert gate.stops == 1
    assert gate.longest_stop > 0


def test_a_vcpu_that_one_kick_does_not_move_is_kicked_again():
    gate, vcpu = VcpuGate(), FakeVcpu(stubborn=2)
    threads = running(gate, vcpu)
    with gate.quiesced():
        assert vcpu.kicks == 3
    join(threads)


def test_two_who_quiesce_at_once_both_get_their_turn_before_a_vcpu_does():
    gate, vcpu = VcpuGate(), FakeVcpu()
    with gate.quiesced():
        inner = threading.Event()

        def second():
            with gate.quiesced():
                inner.set()

        other = started(second)
        assert inner.wait(SOON)  # it does not wait for the first
        join([other])
        waiting = started(lambda: vcpu.run_in(gate))
        waiting.join(0.05)
        assert waiting.is_alive()  # one has opened, the other not
    while not gate.is_inside(vcpu):
        time.sleep(0.001)
    vcpu.kick()
    join([waiting])
    assert gate.stops == 2


def test_a_vcpu_that_never_comes_out_is_named(monkeypatch):
    monkeypatch.setattr(gate_module, "_PATIENCE_SECONDS", 0.2)
    gate, vcpu = VcpuGate(), FakeVcpu(7, stubborn=1000)
    threads = running(gate, vcpu)
    with pytest.raises(PagingError, match="vCPU 7 did not leave KVM_RUN within"), gate.quiesced():
        pass
    vcpu._left.set()
    join(threads)
    assert gate.enter(vcpu)  # open again
    gate.leave(vcpu)


def test_stopping_gets_everybody_out_and_nobody_in_even_where_the_gate_is_closed():
    gate, inside, outside = VcpuGate(), FakeVcpu(0), FakeVcpu(1)
    threads = running(gate, inside)
    gate.stop()
    join(threads)
    assert not gate.enter(inside)
    assert not gate.enter(outside)
    gate, results = VcpuGate(), []
    with gate.quiesced():
        waiting = started(lambda: results.append(gate.enter(outside)))
        waiting.join(0.05)
        gate.stop()
        join([waiting])
    assert results == [False]


def test_entering_forgets_an_old_kick_and_completing_keeps_the_guest_out():
    gate, vcpu = VcpuGate(), FakeVcpu()
    vcpu.kick()
    assert gate.enter(vcpu)
    assert not vcpu.immediate_exit
    gate.leave(vcpu)
    assert gate.enter(vcpu, only_complete=True)
    assert vcpu.immediate_exit
    gate.leave(vcpu)
    assert not gate.is_inside(vcpu)


def test_who_wants_to_know_is_told_of_each_stop_that_waits_for_a_vcpu():
    gate, vcpu, told = VcpuGate(), FakeVcpu(), []
    gate.tell(lambda: told.append(gate.is_closed))
    with gate.quiesced():
        pass
    assert told == []
    threads = running(gate, vcpu)
    with gate.quiesced():
        pass
    join(threads)
    assert told == [True]
