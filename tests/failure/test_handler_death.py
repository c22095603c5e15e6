"""A guest whose pages come from a handler in another process, which is killed: exact, or paused with a message."""

import os
import random
import signal
import threading
import time

import pytest
from command import Running, require_trap
from handlers import MEMORY, SEED, HandlerProcess

from kvmdp.machine.experiment import run_workload
from kvmdp.machine.machine import Machine, MachineOptions
from kvmdp.machine.workloads import WorkloadOptions, make_workload
from kvmdp.paging.fault import Origin, Outcome, PageFault
from kvmdp.source.handler import HandlerSource
from kvmdp.source.synthetic import SyntheticSource

pytestmark = pytest.mark.kvm

PAGE = 4096
PAGES = MEMORY // PAGE
TRAPS = ("marker", "memory-fault", "mmio", "userfaultfd")
SLOW = ("--synthetic", f"{MEMORY},{SEED}", "--latency", "1ms")
# Every moment takes the start of two processes or more.
MOMENTS = int(os.environ.get("KVMDP_KILLS", "3"))


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
        handler.await_word("has gone")
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
                SyntheticSource(MEMORY, SEED).fill(7 * PAGE, memoryview(expected))
                assert machine.memory.read(7 * PAGE, PAGE) == expected
        finally:
            source.close()
        handler.await_word("0 vCPU, 1 device, 0 host faults")


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_killed_handler_is_replaced_and_the_guest_is_exact(moment, socket_path):
    said = []
    seconds = random.Random(moment).uniform(0.05, 0.3)
    with HandlerProcess(socket_path, *SLOW) as first:
        results = []
        guest = threading.Thread(target=lambda: results.append(run(socket_path, "checksum", "marker", said)))
        guest.start()
        first.await_word("has come")
        time.sleep(seconds)
        first.end()
        with HandlerProcess(socket_path, *SLOW) as second:
            guest.join()
            second.end(signal.SIGINT)
    (result,) = results
    assert result.ok
    assert result.pages_checked == result.counters.pages_fetched == PAGES
    for text in said:
        assert text.startswith((f"paused: handler {first.pid} has died", f"going on: handler {second.pid}"))


def command(path, timeout):
    return ("run", "--trap", "marker", "--handler", path, "--handler-timeout", timeout)


def test_without_another_handler_the_run_ends_with_a_sentence(socket_path):
    with (
        HandlerProcess(socket_path, *SLOW[:2], "--latency", "20ms") as handler,
        Running(*command(socket_path, 0.5)) as guest,
    ):
        handler.await_word("has come")
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
        handler.await_word("has come")
        handler.process.send_signal(signal.SIGSTOP)
        guest.process.send_signal(signal.SIGINT)
        assert guest.finish().status == 130
