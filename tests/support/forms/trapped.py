"""Forms run on a `Machine`, with pages absent when each begins."""

import contextlib
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from harness import meanwhile

from kvmdp.errors import PagingError
from kvmdp.kvm import Io
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.vcpu_thread import GuestError
from kvmdp.source.synthetic import SyntheticSource

from .exchange import (
    DATA_PORT,
    IDT_PORT,
    NEXT_PORT,
    DataPort,
    Outcome,
    Setter,
    end,
    fatal_outcome,
    outcome_of,
    pages_in,
    scratch_of,
    take_cr2,
)
from .form import MEMORY, PAGE, WINDOW, WINDOW_BYTES, Case
from .known import may_change_elsewhere
from .reference import Reference, blocks_for, whole_ram

_STUCK_SECONDS = 20.0  # longer than the machine's own watchdog takes for the pages of any form
_LOOK_SECONDS = 0.05
_EVERY_SECONDS = 0.002
_EVICTED = "ABCD"
_PAGES = range(WINDOW // PAGE, (WINDOW + WINDOW_BYTES) // PAGE)  # of forms


@dataclass(frozen=True)
class Failure:
    """A case that ended the run; in words."""

    message: str


# What each vCPU left, or why there is nothing.
Result = tuple[Outcome, ...] | Failure


class StuckError(Exception):
    """No form has ended for long."""


class _StoppingError(GuestError):
    """Another vCPU has ended the run."""


@dataclass(frozen=True)
class Numbered:
    """A case, and the number of its form in the program."""

    case: Case
    number: int


@dataclass(frozen=True)
class Setting:
    """What cases are run under: a trap, and how many vCPUs, all at the same time.

    `machine` has further options (`MachineOptions`). Each case has a machine of its own if they are to be `fresh`.
    Pages are `poisoned` instead of absent. They are `evicted` all the time: those that no frame of an event goes to.
    """

    trap: str
    vcpus: int = 1
    machine: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False
    poisoned: bool = False
    evicted: bool = False


def run_cases(
    setting: Setting, reference: Reference, program: bytes, cases: Sequence[Numbered]
) -> tuple[list[Result], int]:
    """Run each case; one that fails costs another machine.

    Returns the results, and in how many cases that ended well the guest came to a page that was absent.
    """
    setter = Setter(program, reference.selectors, reference.avx)
    results: list[Result] = []
    touched = 0
    options = MachineOptions(MEMORY, setting.trap, vcpus=setting.vcpus, program=program, **setting.machine)
    while len(results) < len(cases):
        end = len(results) + 1 if setting.fresh else None
        with Machine(options, SyntheticSource(MEMORY)) as machine:
            machine.set_parameters(blocks_for(reference.ring, setting.vcpus))
            session = _Session(machine, setter, cases[len(results) : end], poisoned=setting.poisoned)
            with _evicting(machine) if setting.evicted else contextlib.nullcontext():
                results += session.run()
            touched += session.touched
            if astray := _astray(machine, may_change_elsewhere(reference.ring)):
                results[-1] = Failure(f"after this or one before it RAM has changed elsewhere: gpa {astray}")
    return results, touched


def _evicting(machine: Machine) -> AbstractContextManager[None]:
    """Evict a page of forms every now and then."""
    random = Random(1)

    def evict(number: int) -> None:
        machine.pager.evict(random.choice(pages_in(_EVICTED)), 1)
        time.sleep(random.random() * _EVERY_SECONDS)

    return meanwhile(evict)


def _astray(machine: Machine, ignored: Collection[int]) -> str:
    """Return where present RAM is not what it was, but for the pages of forms and `ignored` ones."""
    view, image = machine.backing.vmm.view, whole_ram().data.cast("B")
    wrong = [
        page
        for first, count in machine.pager.bitmap.present_runs().tolist()
        for page in range(first, first + count)
        if page not in _PAGES
        and page not in ignored
        and view[page * PAGE : (page + 1) * PAGE] != image[page * PAGE : (page + 1) * PAGE]
    ]
    return ", ".join(hex(machine.layout.gpa_of_page(page)) for page in wrong)


class _Session:
    """Forms on one machine, until one fails. `touched`: in how many cases the guest came to an absent page."""

    def __init__(
        self, machine: Machine, setter: Setter, cases: Sequence[Numbered], *, poisoned: bool
    ) -> None:
        self._machine, self._setter, self._cases = machine, setter, cases
        self._poisons = poisoned
        self._poisoned: list[int] = []  # pages that are
        self._blocks = [thread.parameters for thread in machine.threads]
        self._ports = [DataPort() for _ in self._blocks]
        self._results: list[Result] = []
        self.touched = 0
        self._begun = 0  # cases
        self._since = time.monotonic()
        # All vCPUs meet where one form ends and the next begins: the last to come does what is to be done between.
        self._meeting = threading.Condition()
        self._waiting = 0
        self._rounds = 0
        machine.ports.add(NEXT_PORT, lambda vcpu, io: self._meet())
        machine.ports.add(DATA_PORT, lambda vcpu, io: self._ports[vcpu].serve(io))
        machine.ports.add(IDT_PORT, self._tell_idt)

    def run(self) -> list[Result]:
        """Return the results of the cases up to the first that failed, with that."""
        try:
            self._machine.run(on_tick=self._watch)
        except (GuestError, PagingError, StuckError) as error:
            self._results.append(self._failed(error))
        return self._results

    def _tell_idt(self, vcpu: int, io: Io) -> None:
        base = self._machine.threads[vcpu].vcpu.sregs.idt.base
        io.data[:] = base.to_bytes(4, "little")

    def _watch(self) -> None:
        if time.monotonic() - self._since > _STUCK_SECONDS:
            where = ", ".join(f"{thread.vcpu.regs.rip:#x}" for thread in self._machine.threads)
            raise StuckError(f"no form has ended for {_STUCK_SECONDS:.0f} seconds; RIP {where}")

    def _failed(self, error: Exception) -> Result:
        """Return what there is of the case that ended the run: a form may end in an exception."""
        if not self._begun:
            raise error
        current = self._cases[self._begun - 1]
        ended = [thread for thread in self._machine.threads if thread.parameters.exception_count]
        if not isinstance(error, GuestError) or len(ended) < len(self._blocks):
            return Failure(str(error))
        self._machine.pager.reopen()  # the machine has stopped: what is absent cannot be read otherwise
        ram = self._ram()
        return tuple(
            fatal_outcome(
                block,
                current.case.form,
                current.number,
                ram=ram,
                written=bytes(port.written),
                taken=port.taken,
            )
            for block, port in zip(self._blocks, self._ports, strict=True)
        )

    def _meet(self) -> None:
        """Wait for all vCPUs; in the thread of each."""
        with self._meeting:
            self._waiting += 1
            if self._waiting == len(self._blocks):
                self._waiting = 0
                self._rounds += 1
                self._turn()
                self._meeting.notify_all()
                return
            mine = self._rounds
            while self._rounds == mine:
                self._meeting.wait(_LOOK_SECONDS)
                if any(thread.error is not None for thread in self._machine.threads):
                    raise _StoppingError("another vCPU has ended the run")

    def _turn(self) -> None:
        """Take what the last form has left, and prepare the next. No vCPU is in the guest."""
        self._since = time.monotonic()
        if self._begun:
            self._results.append(self._outcomes(self._cases[self._begun - 1]))
        if self._begun == len(self._cases):
            for block in self._blocks:
                end(block)
            return
        self._prepare(self._cases[self._begun])
        self._begun += 1

    def _outcomes(self, current: Numbered) -> tuple[Outcome, ...]:
        test = self._machine.pager.bitmap.test
        self.touched += self._poisons or any(test(page) for page in pages_in(current.case.absent))
        ram = self._ram()
        return tuple(
            outcome_of(
                thread.parameters,
                current.case.form,
                current.number,
                ram=ram,
                cr2=take_cr2(thread.vcpu),
                written=bytes(port.written),
                taken=port.taken,
            )
            for thread, port in zip(self._machine.threads, self._ports, strict=True)
        )

    def _ram(self) -> bytes:
        """Return what is in the forms' pages, zeros for those that are poisoned."""
        read = self._machine.memory.read
        return b"".join(bytes(PAGE) if page in self._poisoned else read(page * PAGE, PAGE) for page in _PAGES)

    def _prepare(self, following: Numbered) -> None:
        form, pager = following.case.form, self._machine.pager
        ram = self._setter.ram(form, following.number)
        for page in self._poisoned:
            pager.unpoison(page, bytes(PAGE))
        self._poisoned = []
        self._machine.memory.write(WINDOW, ram)
        for page in pages_in(following.case.absent):
            if self._poisons:
                pager.poison(page)
                self._poisoned.append(page)
            else:
                pager.evict(page, 1)
        meet_at = 0
        if len(self._blocks) > 1:
            meet_at = scratch_of(self._blocks[0]).meeting + len(self._blocks)
        for block, port in zip(self._blocks, self._ports, strict=True):
            port.begin()
            self._setter.give(block, form, following.number, meet_at)
