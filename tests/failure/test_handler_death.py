"""A guest whose pages come from a handler in another process, which is killed: exact, or paused with a message."""

import random
import signal
import threading

import pytest
from command import Running, require_trap
from effort import by_effort
from handlers import MEMORY, SEED, HandlerProcess

from kvmdp.errors import PagingError
from kvmdp.lab.experiment import run_workload
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.workloads import WorkloadOptions, make_workload
from kvmdp.page import Origin, Outcome, PageFault
from kvmdp.peers.handler.source import HandlerSource
from kvmdp.source.request import FetchRequest
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm

PAGE = 4096
PAGES = MEMORY // PAGE
TRAPS = ("marker", "memory-fault", "mmio", "userfaultfd")
SLOW = ("--synthetic", f"{MEMORY},{SEED}", "--latency", "1ms")
# Every moment takes the start of two processes or more.
MOMENTS = by_effort(1, 3, 50)


def plan(name, vcpus=2):
    return make_workload(name, WorkloadOptions(memory_bytes=MEMORY, vcpus=vcpus, seed=SEED))


def run(path, name, trap, said=None):
    source = HandlerSource(str(path), 30, (said if said is not None else []).append)
    try:
        return run_workload(
            MachineOptions(MEMORY, trap, vcpus=2),
            plan(name),
            source,
            reference=SyntheticSource(MEMORY, SEED),
            timeout=60,
        )
    finally:
        source.close()


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("name", ["checksum", "execute"])
def test_every_trap_is_exact_with_one_fetch_a_page(trap, name, socket_path):
    require_trap(trap)
    with HandlerProcess(socket_path) as handler:
        result = run(socket_path, name, trap)
        assert handler.says("has gone")
        status = handler.end(signal.SIGINT)
    assert result.ok
    assert result.pages_checked == result.counters.pages_fetched == result.pages_present > 0
    assert f"{result.counters.claims} vCPU, 0 device, 0 host faults" in handler.said
    assert status == 130


def test_a_device_fault_arrives_as_one(socket_path):
    with HandlerProcess(socket_path) as handler:
        source = HandlerSource(str(socket_path))
        try:
            with Machine(MachineOptions(MEMORY, "marker"), source) as machine:
                outcomes = []
                device = threading.Thread(
                    target=lambda: outcomes.append(machine.pager.resolve(PageFault(7, Origin.DEVICE, 3)))
                )
                device.start()
                device.join()
                assert outcomes == [Outcome.ADMITTED]
                expected = bytearray(PAGE)
                SyntheticSource(MEMORY, SEED).fetch(FetchRequest(7 * PAGE), memoryview(expected))
                assert machine.memory.read(7 * PAGE, PAGE) == expected
        finally:
            source.close()
        assert handler.says("0 vCPU, 1 device, 0 host faults")


DYING = """
import os, signal, threading
from kvmdp.source.synthetic import SyntheticSource
fetch, mutex, taken = SyntheticSource.fetch, threading.Lock(), 0
def fetch_until(self, request, destination):
    global taken
    with mutex:
        taken += 1
        last = taken == {faults}
    if last:
        if {filled} > 0:
            fetch(self, request, destination)
        if {filled} == 1:
            destination[2048:] = bytes(b"junk") * 512
        os.kill(os.getpid(), signal.SIGKILL)
    fetch(self, request, destination)
SyntheticSource.fetch = fetch_until
"""


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_killed_handler_is_replaced_and_the_guest_is_exact(moment, socket_path):
    trap = TRAPS[moment // 3 % len(TRAPS)]
    require_trap(trap)
    # Which fault is its last; and how much of that it does: nothing, a page of which half is wrong, all but the answer.
    dying = DYING.format(faults=random.Random(moment).randint(1, PAGES), filled=moment % 3)
    said, results = [], []
    with HandlerProcess(socket_path, prelude=dying) as first:
        guest = threading.Thread(target=lambda: results.append(run(socket_path, "checksum", trap, said)))
        guest.start()
        assert first.process.wait(60) == -signal.SIGKILL
        with HandlerProcess(socket_path) as second:
            guest.join()
            second.end(signal.SIGINT)
    (result,) = results
    assert result.ok
    assert result.pages_checked == result.counters.pages_fetched == PAGES
    paused, going_on = said
    assert paused.startswith(f"paused: handler {first.pid} has died; gpa 0x")
    assert going_on.startswith(f"going on: handler {second.pid} has taken over, ")
    assert going_on.endswith(" sent again")


def command(path, timeout):
    return ("run", "--trap", "marker", "--handler", path, "--handler-timeout", timeout)


def test_without_another_handler_the_run_ends_with_a_sentence(socket_path):
    with (
        HandlerProcess(socket_path, *SLOW[:2], "--latency", "20ms") as handler,
        Running(*command(socket_path, 0.5)) as guest,
    ):
        assert handler.says("has come")
        handler.end()
        done = guest.finish()
    assert done.status == 1
    assert f"paused: handler {handler.pid} has died; gpa 0x" in done.err
    assert (
        f"process {handler.pid} has died, and within 0.5 seconds no other has taken its place" in done.error
    )


def test_an_interrupt_ends_the_pause_at_once(socket_path):
    with (
        HandlerProcess(socket_path, *SLOW[:2], "--latency", "20ms") as handler,
        Running(*command(socket_path, 3600)) as guest,
    ):
        assert handler.says("has come")
        handler.process.send_signal(signal.SIGSTOP)
        guest.process.send_signal(signal.SIGINT)
        assert guest.finish().status == 130


def test_a_successor_with_another_image_is_not_taken(socket_path):
    said = []
    with HandlerProcess(socket_path, prelude=DYING.format(faults=1, filled=0)) as first:
        errors = []

        def guest():
            try:
                run(socket_path, "checksum", "marker", said)
            except PagingError as error:
                errors.append(str(error))

        thread = threading.Thread(target=guest)
        thread.start()
        first.process.wait(60)
        with HandlerProcess(socket_path, "--synthetic", f"{2 * MEMORY},{SEED}") as second:
            thread.join()
            assert errors[0].endswith(
                f"process {second.pid} has taken the handler's place with an image of {2 * MEMORY} bytes, where the "
                f"machine began with an image of {MEMORY} bytes"
            )
            assert second.says("was given up")
    assert said[0].startswith(f"paused: handler {first.pid} has died")
