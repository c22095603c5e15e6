"""Calls that threads have made while every vCPU is out: each once, in a stop that threads that come together share."""

import threading

import pytest
from fakes import started
from test_gate import SOON, FakeVcpu, join, running

from kvmdp.errors import PagingError
from kvmdp.vcpu import gate as gate_module
from kvmdp.vcpu.gate import VcpuGate


def await_turns(gate, number):
    """Return once so many threads wait for their call to be made."""
    while len(gate._turns) < number:
        threading.Event().wait(0.001)


def test_a_call_is_made_with_every_vcpu_outside():
    gate, vcpus, seen = VcpuGate(), [FakeVcpu(0), FakeVcpu(1)], []
    threads = running(gate, *vcpus)
    gate.while_stopped(lambda: seen.append([gate.is_inside(vcpu) for vcpu in vcpus]))
    join(threads)
    assert seen == [[False, False]]
    assert gate.stops == 1


def test_a_call_with_nobody_inside_is_no_stop():
    gate, made = VcpuGate(), []
    gate.while_stopped(lambda: made.append(1))
    assert (made, gate.stops) == ([1], 0)


def test_threads_that_come_during_a_stop_share_it():
    gate, vcpu, made = VcpuGate(), FakeVcpu(), []
    threads = running(gate, vcpu)

    def lead():
        others = [started(lambda n=n: gate.while_stopped(lambda: made.append(n))) for n in (1, 2, 3)]
        await_turns(gate, 3)
        threads.extend(others)
        made.append(0)

    gate.while_stopped(lead)
    join(threads)
    assert sorted(made) == [0, 1, 2, 3]
    assert made[0] == 0
    assert gate.stops == 1


def test_an_error_is_that_of_the_thread_whose_call_it_was():
    gate, errors, made = VcpuGate(), [], []

    def fails():
        raise ValueError("mine")

    def other():
        try:
            gate.while_stopped(fails)
        except ValueError as error:
            errors.append(str(error))

    threads = []

    def lead():
        threads.append(started(other))
        threads.append(started(lambda: gate.while_stopped(lambda: made.append(1))))
        await_turns(gate, 2)

    gate.while_stopped(lead)
    join(threads)
    assert (errors, made) == (["mine"], [1])


def test_the_call_of_a_leader_that_fails_does_not_take_the_others_along():
    gate, threads, made = VcpuGate(), [], []

    def lead():
        threads.append(started(lambda: gate.while_stopped(lambda: made.append(1))))
        await_turns(gate, 1)
        raise ValueError("the leader's")

    with pytest.raises(ValueError, match="the leader's"):
        gate.while_stopped(lead)
    join(threads)
    assert made == [1]
    gate.while_stopped(lambda: made.append(2))
    assert made == [1, 2]


def test_a_vcpu_that_never_comes_out_fails_each_call_and_none_is_made(monkeypatch):
    monkeypatch.setattr(gate_module, "_PATIENCE_SECONDS", 0.2)
    gate, vcpu, made, failed = VcpuGate(), FakeVcpu(7, stubborn=1000), [], []
    threads = running(gate, vcpu)

    def call(number):
        try:
            gate.while_stopped(lambda: made.append(number))
        except PagingError as error:
            failed.append(str(error))

    callers = [started(lambda n=n: call(n)) for n in range(3)]
    join(callers)
    assert made == []
    assert len(failed) == 3
    assert all("vCPU 7 did not leave KVM_RUN" in text for text in failed)
    vcpu._left.set()
    join(threads)


def test_a_vcpu_that_comes_out_by_itself_is_not_kicked(monkeypatch):
    monkeypatch.setattr(gate_module, "_GRACE_SECONDS", SOON)
    gate, vcpu, made = VcpuGate(), FakeVcpu(), []
    threads = running(gate, vcpu)
    caller = started(lambda: gate.while_stopped(lambda: made.append(1)))
    while not gate.is_closed:
        threading.Event().wait(0.001)
    vcpu._left.set()  # as if it had an exit of its own
    join([caller, *threads])
    assert (made, vcpu.kicks) == ([1], 0)


def test_a_vcpu_that_used_its_moment_for_nothing_gets_none_the_next_time(monkeypatch):
    monkeypatch.setattr(gate_module, "_GRACE_SECONDS", 0.05)
    gate, vcpu, waits = VcpuGate(), FakeVcpu(), []
    wait = gate._changed.wait
    monkeypatch.setattr(gate._changed, "wait", lambda timeout: (waits.append(timeout), wait(timeout))[1])
    for stop in range(2):
        threads = running(gate, vcpu)
        gate.while_stopped(lambda: None)
        join(threads)
        assert sum(timeout < gate_module._REKICK_SECONDS for timeout in waits) == 1, f"in stop {stop}"


def test_a_caller_that_is_interrupted_takes_its_call_back():
    gate, made, interrupted = VcpuGate(), [], []
    led, go_on = threading.Event(), threading.Event()

    def lead():
        led.set()
        assert go_on.wait(SOON)

    leader = started(lambda: gate.while_stopped(lead))
    assert led.wait(SOON)

    class InterruptedLock:
        """The lock of a turn whose thread gets a KeyboardInterrupt while it waits."""

        def acquire(self):
            raise KeyboardInterrupt

    def caller():
        turn = gate_module._Turn

        class Turn(turn):
            def __init__(self, work):
                super().__init__(work)
                self.woken = InterruptedLock()

        gate_module._Turn = Turn
        try:
            gate.while_stopped(lambda: made.append(1))
        except KeyboardInterrupt:
            interrupted.append(True)
        finally:
            gate_module._Turn = turn

    join([started(caller)])
    go_on.set()
    join([leader])
    assert (made, interrupted) == ([], [True])


def test_counts_are_exact_with_many_threads_and_vcpus():
    gate, rounds, counted = VcpuGate(), 200, [0]
    stop = threading.Event()

    class Spinning(FakeVcpu):
        def kick(self):
            self.immediate_exit = True

    def spin(vcpu):
        while not stop.is_set():
            if gate.enter(vcpu):
                while not vcpu.immediate_exit and not stop.is_set():
                    threading.Event().wait(0.0001)
                gate.leave(vcpu)

    def add():
        before = counted[0]  # two calls at once would lose one
        assert not any(gate.is_inside(vcpu) for vcpu in vcpus)
        counted[0] = before + 1

    def call():
        for _ in range(rounds):
            gate.while_stopped(add)

    vcpus = [Spinning(0), Spinning(1)]
    running_vcpus = [started(lambda vcpu=vcpu: spin(vcpu)) for vcpu in vcpus]
    callers = [started(call) for _ in range(4)]
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    stop.set()
    join(running_vcpus)
    assert counted == [4 * rounds]
