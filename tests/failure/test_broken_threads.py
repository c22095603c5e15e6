"""A thread of the product that breaks, at any point, ends the run with its sentence: nothing waits for it in vain."""

import ast
from pathlib import Path

import pytest
from fakes import pager_of
from handlers import HandlerProcess, scripted
from harness import LOOP_FOREVER, make_machine, plan, program_machine
from remote_devices import EPOCH, device, readers
from test_bad_handler import bound, fill

import kvmdp
from kvmdp.errors import PagingError
from kvmdp.jobs.collapse import Collapser
from kvmdp.jobs.resident_limit import ResidentLimit
from kvmdp.kvm import KvmError, Vcpu
from kvmdp.machine.disk import DiskDevice
from kvmdp.machine.disk_ports import DiskThread
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.page import Access
from kvmdp.peers.handler.source import HandlerSource
from kvmdp.peers.owed_acks import OwedAcks
from kvmdp.peers.requests import FaultRequests, PeerCounters
from kvmdp.peers.wire.records import Kind, Record
from kvmdp.source.base import SourceError

SOON = 20
# Its end is noticed elsewhere: another process counts its beats.
UNWATCHED = {"cli/supervise.py"}


def test_no_thread_is_made_that_does_not_say_who_hears_of_its_end():
    root = Path(kvmdp.__file__).parent
    makers = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in (
                "Thread",
                "start_new_thread",
                "ThreadPoolExecutor",
            ):
                makers.add(str(path.relative_to(root)))
    assert makers == {"thread.py"} | UNWATCHED


def raising(error):
    def fail(*_arguments, **_options):
        raise error

    return fail


@pytest.mark.kvm
def test_a_vcpu_pinned_to_a_cpu_that_is_not_there_ends_the_run():
    message = r"vCPU 0 cannot be pinned to host CPU 1000: .*; pin it to one of 0"
    with (
        make_machine("mmio", pin=(1000,), workload=plan("touch")) as machine,
        pytest.raises(GuestError, match=message),
    ):
        machine.run()


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KvmError(22, "KVM_SET_SIGNAL_MASK"), "^KVM_SET_SIGNAL_MASK failed: Invalid argument$"),
        (RuntimeError("odd"), r"vCPU 1: internal error: RuntimeError\('odd'\)"),
        (SystemExit(3), r"vCPU 1: internal error: SystemExit\(3\)"),
    ],
)
def test_a_vcpu_whose_thread_breaks_before_the_guest_ends_the_run(monkeypatch, error, message):
    attach = Vcpu.attach_thread
    monkeypatch.setattr(
        Vcpu, "attach_thread", lambda self: attach(self) if self.index == 0 else raising(error)()
    )
    with program_machine("mmio", LOOP_FOREVER, vcpus=2) as machine, pytest.raises(GuestError, match=message):
        machine.run()


@pytest.mark.kvm
@pytest.mark.parametrize("error", [RuntimeError("odd"), SystemExit(3)])
def test_a_limit_whose_thread_breaks_ends_the_run(monkeypatch, error):
    monkeypatch.setattr(ResidentLimit, "_keep_to_it", raising(error))
    with program_machine("mmio", LOOP_FOREVER, resident_limit=1 << 20) as machine:
        machine.limit._exceeded.set()
        with pytest.raises(PagingError, match="the resident limit cannot be kept: "):
            machine.run()


@pytest.mark.kvm
def test_a_collapse_whose_thread_breaks_ends_the_run(monkeypatch):
    monkeypatch.setattr(Collapser, "_look_again", raising(SystemExit(3)))
    with (
        program_machine("mmio", LOOP_FOREVER) as machine,
        Collapser(machine.pager, "background"),
        pytest.raises(PagingError, match="pages could not be put together: internal error: SystemExit"),
    ):
        machine.run()


@pytest.mark.kvm
def test_a_disk_whose_thread_breaks_ends_the_run(monkeypatch):
    monkeypatch.setattr(DiskDevice, "serve", raising(RuntimeError("odd")))
    with program_machine("mmio", LOOP_FOREVER) as machine, DiskThread(machine, None) as disk:
        disk._rung(0, 0)
        with pytest.raises(PagingError, match="the disk's thread broke: internal error: RuntimeError"):
            machine.run()


def test_the_faults_of_a_device_whose_thread_breaks_pause_the_machine():
    with pager_of() as pager:
        requests = FaultRequests(
            pager, PeerCounters(), raising(RuntimeError("odd")), lambda error: None, "device-1-faults"
        )
        requests.start()
        requests.submit(1, 0, 1, Access.READ, 0)
        assert requests.join(SOON)
        assert str(pager.error) == "the thread device-1-faults broke: internal error: RuntimeError('odd')"
        requests.close()


def test_a_device_whose_receiver_breaks_waits_for_nothing_more(monkeypatch):
    with device(1) as (memory, machine):
        threads, errors = readers(memory, (1,))
        monkeypatch.setattr(OwedAcks, "payable", raising(RuntimeError("odd")))
        machine.send(Record(Kind.THAW).pack(EPOCH))
        threads[0].join(SOON)
        assert [str(error) for error in errors] == [
            "taking the machine's records broke: internal error: RuntimeError('odd')"
        ]
        monkeypatch.undo()


def test_a_source_whose_supervisor_breaks_fails_the_fetches_that_wait(monkeypatch, socket_path):
    monkeypatch.setattr(HandlerSource, "_take", raising(RuntimeError("odd")))

    def session(notifier, terms, ram):
        notifier.recv(64)
        notifier.send(Record(Kind.THAW).pack(terms.epoch))
        while notifier.recv(64):
            pass

    with (
        scripted(socket_path, session),
        bound(socket_path) as (source, memory),
        pytest.raises(SourceError, match=r"serving it broke: internal error: RuntimeError\('odd'\)"),
    ):
        fill(source, memory, 3)


BREAKS = "from kvmdp.source.synthetic import SyntheticSource\ndef fetch(*_): raise {}\nSyntheticSource.fetch = fetch"


@pytest.mark.parametrize(
    ("raised", "said", "reason"),
    [
        ("RuntimeError('odd')", "the fault on gpa 0x3000 failed: RuntimeError('odd')", "see what it printed"),
        (
            "SystemExit(3)",
            "serving it broke: internal error: SystemExit(3); it was cut off",
            "has closed its session",
        ),
    ],
)
def test_a_handler_whose_source_breaks_says_so_and_lives_on(socket_path, raised, said, reason):
    with HandlerProcess(socket_path, prelude=BREAKS.format(raised)) as handler:
        for _ in range(2):
            with (
                bound(socket_path, timeout=0.5) as (source, memory),
                pytest.raises(SourceError, match=reason),
            ):
                fill(source, memory, 3)
            assert handler.says(said)
            handler.said = ""
        handler.end()
        assert "Traceback" not in handler.said
