"""Random sequences of what can be done to a guest's pages, on a machine and on a simple model of one at the same time.

The model has the bytes of every page, whether they are lost, where they are, and what the pager has to have counted;
one rule for each operation, page by page. After each step the machine has to agree with it about all of RAM.

A vCPU runs all the time: it asks a port for an address, and what to store there, and answers with what it loads, or
that it has had a machine check instead.
"""

import queue
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from harness import MEMORY, SEED, TIMEOUT, program_machine

from kvmdp.errors import BusyError, PagingError, PoisonedError
from kvmdp.kvm import BusError, InternalError, IoIn, MemoryFault, MmioRead, MmioWrite
from kvmdp.lab.invariants import violations
from kvmdp.page import PAGE_SIZE, Outcome
from kvmdp.paging.claim import Counters, State
from kvmdp.source.base import read_pages
from kvmdp.source.image import WritableImageSource
from kvmdp.source.request import FetchRequest
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.slots import partial_slots as partial_regions
from kvmdp.trap.slots import ram_slots as slots

PAGES = MEMORY // PAGE_SIZE
IMAGE = read_pages(SyntheticSource(MEMORY, SEED), np.arange(PAGES)).tobytes()
STEPS = 30
REGION = 64  # pages, where memslots are cut and merged by regions
SOURCE, PRESENT, BACKED, ZERO, SINK, POISON = (
    State.SOURCE,
    State.PRESENT,
    State.BACKED,
    State.ZERO,
    State.SINK,
    State.POISON,
)
IN_RAM = (PRESENT, BACKED)
COUNTED_AS = {
    SOURCE: "pages_fetched",
    ZERO: "pages_zeroed",
    SINK: "pages_refetched",
    BACKED: "pages_backed",
}
FAULT_EXITS = (BusError, InternalError, MemoryFault, MmioRead, MmioWrite)

PORT = 0x300
MACHINE_CHECK_PORT = PORT + 1
END = 0xFFFFFFFF
# lea rax, [4f]; mov [rdi + 0x190], rax: where a machine check goes on
# 1: mov edx, PORT; in eax, dx; mov ecx, eax; cmp ecx, -1; je 3f; in eax, dx; test eax, eax; jz 2f; mov [rcx], eax
# 2: mov eax, [rcx]; out dx, eax; jmp 1b; 3: xor eax, eax; ret
# 4: mov edx, MACHINE_CHECK_PORT; out dx, eax; jmp 1b
PROGRAM = bytes.fromhex(
    "488d052300000048898790010000 ba00030000ed89c183f9ff740ced85c0740289018b01efebe731c0c3 ba01030000efebdc"
)


@dataclass
class MachineCheck:
    """The vCPU's answer if an access gave one, with what the guest was told."""

    gpa: int


class GuestWord:
    """Loads and stores by the machine's vCPU, for the time of a `with` block."""

    def __init__(self, machine):
        self._machine = machine
        self._asked, self._answers = queue.SimpleQueue(), queue.SimpleQueue()
        self._error = None
        self._thread = threading.Thread(target=self._run)
        machine.ports.add(PORT, self._serve)
        machine.ports.add(MACHINE_CHECK_PORT, self._serve_machine_check)

    def _serve(self, _vcpu, io):
        if isinstance(io, IoIn):
            io.data[:] = self._asked.get().to_bytes(4, "little")
        else:
            self._answers.put(int.from_bytes(io.data, "little"))

    def _serve_machine_check(self, _vcpu, _io):
        block = self._machine.threads[0].parameters
        self._answers.put(MachineCheck(block.mc_addresses[block.mc_count - 1]))

    def _run(self):
        try:
            self._machine.run(TIMEOUT)
        except Exception as error:
            self._error = error
            self._answers.put(None)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace):
        self._asked.put(END)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def access(self, gpa, value=0):
        """Store `value` unless it is 0; returns what is loaded then, and how many exits for paging that took.

        A machine check instead of what is loaded, if that came.
        """
        before = self._exits()
        self._asked.put(gpa)
        self._asked.put(value)
        answer = self._answers.get(timeout=TIMEOUT)
        if answer is None:
            raise self._error
        return answer, self._exits() - before

    def _exits(self):
        return sum(self._machine.threads[0].exits[each] for each in FAULT_EXITS)


class Model:
    """What a machine's memory has to be."""

    def __init__(self, unit, extents, content):
        self.unit = unit
        self.ram = bytearray(MEMORY)
        self.ram[: len(content)] = content
        self.states = bytearray([ZERO]) * PAGES
        for offset, length in extents:
            first, count = offset // PAGE_SIZE, length // PAGE_SIZE
            self.states[first : first + count] = bytes([SOURCE]) * count
        self.enabled = True
        self.counted = Counter()

    def units(self, first, count):
        """The first page of each unit that holds pages of a run."""
        return range(first // self.unit * self.unit, first + count, self.unit)

    def pages(self, first, count):
        for low in self.units(first, count):
            yield from range(low, low + self.unit)

    def admit(self, first, count, *, faults):
        """Pages become present one after the other; False if one cannot: those behind it are left alone."""
        for low in self.units(first, count):
            if self.states[low] == POISON:
                return False
            if self.states[low] != PRESENT:
                self.counted["claims"] += faults
                self._admit_unit(low)
        return True

    def _admit_unit(self, low):
        for page in range(low, low + self.unit):
            self.counted["pages_admitted"] += 1
            if self.states[page] in COUNTED_AS:
                self.counted[COUNTED_AS[State(self.states[page])]] += 1
            self.states[page] = PRESENT

    def heal(self, page, content):
        low = page // self.unit * self.unit
        self.ram[low * PAGE_SIZE : (low + self.unit) * PAGE_SIZE] = content
        self._admit_unit(low)

    def take(self, first, count, away, state, counter=None):
        """Pages whose state is in `away` are in `state` now; returns how many."""
        taken = 0
        for page in self.pages(first, count):
            if self.states[page] in away:
                taken += 1
                self.counted["pages_revoked"] += self.states[page] == PRESENT
                self.states[page] = state
                if state == ZERO:
                    self.ram[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)
        if counter is not None:
            self.counted[counter] += taken
        return taken


class RandomSequence:
    """One sequence, from its seed, in an image that is made in `folder`. `steps` says what has been done."""

    def __init__(self, seed, trap, backing, folder):
        self.chance = random.Random(seed)
        self.trap, self.backing = trap, backing
        self.steps = []
        self.machine_checks = 0
        self.in_regions = False
        self.memslots = []  # how many there were after each step
        self._image = folder / "image"

    def run(self):
        with pytest.MonkeyPatch.context() as patches:
            granule = self._choose_granule(patches) if self._works_by_slot() else None
            self._run_machine(granule)

    def _choose_granule(self, patches):
        """Half of the machines take RAM for so large that not every granule has a memslot: cut and merged by regions.

        Of regions there are to be some, with neighbours, in so little RAM.
        """
        if self.chance.random() < 0.5:
            patches.setattr(slots, "MAX_GRANULE_SLOTS", 16)
            for module in (slots, partial_regions):
                patches.setattr(module, "REGION", REGION)
            self.in_regions = True
        return self.chance.choice((PAGE_SIZE, PAGE_SIZE, 4 * PAGE_SIZE))

    def _run_machine(self, granule):
        self._make_image()
        source = WritableImageSource(self._image)
        try:
            options = {"source": source, "granule": granule}
            with program_machine(self.trap, PROGRAM, self.backing, **options) as machine:
                self.machine, self.pager, self.memory = machine, machine.pager, machine.memory
                self.source = source
                self.model = Model(machine.pager.ledger.unit, source.extents(), self._image.read_bytes())
                with GuestWord(machine) as self.guest:
                    self._run()
        finally:
            source.close()

    def _works_by_slot(self):
        return self.trap in ("memory-fault", "mmio")

    def _make_image(self):
        """A file with holes that may end before RAM does."""
        size = self.chance.choice((PAGES, PAGES, PAGES - 101)) * PAGE_SIZE
        with self._image.open("wb") as file:
            file.truncate(size)
            for first in range(0, size, 64 * PAGE_SIZE):
                if self.chance.random() < 0.8:
                    file.seek(first)
                    file.write(IMAGE[first : min(first + 48 * PAGE_SIZE, size)])

    def _run(self):
        self.check()
        names, weights = zip(*OPERATIONS.items(), strict=True)
        for _ in range(STEPS):
            name = self.chance.choices(names, weights)[0]
            if not self.model.enabled and self.chance.random() < 0.2:
                name = "enable"
            self.steps.append(name)
            getattr(self, name)()
            self.check()

    def note(self, *what):
        self.steps[-1] += f" {what}"

    def run_of_pages(self, most=64):
        first = self.chance.randrange(PAGES)
        count = min(self.chance.choice((1, 2, 5, self.chance.randint(1, most))), PAGES - first)
        self.note(first, count)
        return first, count

    def some_page(self, *states):
        """A page in one of these states, if there is any."""
        pages = [page for page in range(PAGES) if not states or self.model.states[page] in states]
        page = self.chance.choice(pages) if pages else None
        self.note(page)
        return page

    # Operations

    def read(self):
        first, count = self.run_of_pages(16)
        if self.model.admit(first, count, faults=True):
            at = first * PAGE_SIZE
            assert self.memory.read(at, count * PAGE_SIZE) == self.model.ram[at : at + count * PAGE_SIZE]
        else:
            with pytest.raises(PoisonedError):
                self.memory.read(first * PAGE_SIZE, count * PAGE_SIZE)

    def write(self):
        first, count = self.run_of_pages(16)
        at = first * PAGE_SIZE + self.chance.randrange(PAGE_SIZE)
        data = self.chance.randbytes(self.chance.randint(1, (first + count) * PAGE_SIZE - at))
        if self.model.admit(first, (at + len(data) - 1) // PAGE_SIZE - first + 1, faults=True):
            self.memory.write(at, data)
            self.model.ram[at : at + len(data)] = data
        else:
            with pytest.raises(PoisonedError):
                self.memory.write(at, data)

    def vcpu(self):
        """A load, or a store and a load, of the vCPU; the one or the other of a poisoned page is a machine check."""
        page = self.some_page(*self.chance.choice(((), (POISON,))))
        if page is None:
            return
        at = page * PAGE_SIZE + 4 * self.chance.randrange(PAGE_SIZE // 4)
        value = self.chance.choice((0, self.chance.randrange(1, 1 << 32)))
        if self.model.states[page] == POISON:
            assert self.guest.access(at, value)[0] == MachineCheck(page * PAGE_SIZE)
            self.machine_checks += 1
            return
        absent = self.model.states[page] != PRESENT
        self.model.admit(page, 1, faults=True)
        if value:
            self.model.ram[at : at + 4] = value.to_bytes(4, "little")
        found, exits = self.guest.access(at, value)
        self._await_readers()
        assert found == int.from_bytes(self.model.ram[at : at + 4], "little")
        if self.trap != "userfaultfd":
            assert (exits > 0) == absent, (
                f"{exits} exits for a page that was {'absent' if absent else 'present'}"
            )

    def _await_readers(self):
        """A userfaultfd reader wakes the vCPU with the page, and then has to end its claim."""
        deadline = time.monotonic() + TIMEOUT
        while self.pager.ledger.claims and time.monotonic() < deadline:
            time.sleep(0.0005)

    def mark_present(self):
        first, count = self.run_of_pages()
        outcome = Outcome.PRESENT if self.model.admit(first, count, faults=False) else Outcome.POISONED
        assert self.pager.mark_present(first, count) is outcome

    def mark_nonpresent(self):
        self._take(self.pager.mark_nonpresent, (PRESENT,), BACKED)

    def evict(self):
        self._take(self.pager.evict, IN_RAM, SINK, "pages_evicted")

    def write_back(self):
        self._take(self.pager.write_back, IN_RAM, SOURCE, "pages_evicted")

    def _is_behind_the_image(self, method, first, count):
        end = self.model.units(first, count)[-1] + self.model.unit
        return method == self.pager.write_back and end * PAGE_SIZE > self.source.size

    def discard(self):
        self._take(self.pager.discard, (*IN_RAM, SOURCE, SINK), ZERO, "pages_discarded")

    def _take(self, method, away, state, counter=None):
        first, count = self.run_of_pages()
        if self._is_behind_the_image(method, first, count):
            with pytest.raises(PagingError, match="ends at"):
                method(first, count)
        elif self.model.enabled:
            assert method(first, count) == self.model.take(first, count, away, state, counter)
        else:
            with pytest.raises(PagingError, match="switched off"):
                method(first, count)

    def busy(self):
        """A view is open: nothing of its page can be taken away."""
        page = self.some_page(SOURCE, PRESENT, BACKED, ZERO, SINK)
        if page is None or not self.model.enabled:
            return
        self.model.admit(page, 1, faults=True)
        take = self.chance.choice(
            (self.pager.mark_nonpresent, self.pager.evict, self.pager.write_back, self.pager.discard)
        )
        problem = PagingError if self._is_behind_the_image(take, page, 1) else BusyError
        with self.memory.view(page * PAGE_SIZE, 8), pytest.raises(problem):
            take(page, 1, timeout=0)

    def poison(self):
        page = self.some_page()
        unit = page // self.model.unit * self.model.unit, self.model.unit
        if not self.model.enabled:
            problem = "switched off"
        elif self.model.states[page] == POISON:
            problem = "poisoned already"
        else:
            everywhere = (*IN_RAM, SOURCE, SINK, ZERO)
            self.model.take(page, 1, everywhere, POISON, "pages_discarded")
            assert self.pager.poison(page) == unit
            return
        with pytest.raises(PagingError, match=problem):
            self.pager.poison(page)

    def unpoison(self):
        page = self.some_page(*self.chance.choice(((), (POISON,))))
        if page is not None:
            self._heal(page)

    def _heal(self, page):
        content = self.chance.randbytes(16) * (self.model.unit * PAGE_SIZE // 16)
        if self.model.states[page] == POISON:
            self.pager.unpoison(page, content)
            self.model.heal(page, content)
        else:
            with pytest.raises(PagingError, match="not poisoned"):
                self.pager.unpoison(page, content)

    def disable(self):
        """As it is; everything made present before, half of the time."""
        model = self.model
        if self.chance.random() < 0.5:
            self._have_all_present()
        if not model.enabled or model.states == bytes([PRESENT]) * PAGES:
            self.pager.disable()
            model.enabled = False
        else:
            with pytest.raises(PagingError, match="are absent"):
                self.pager.disable()

    def _have_all_present(self):
        self.note("all present")
        for page in range(0, PAGES, self.model.unit):
            if self.model.states[page] == POISON:
                self._heal(page)
        assert self.model.admit(0, PAGES, faults=False)
        assert self.pager.mark_present(0, PAGES) is Outcome.PRESENT

    def collapse(self):
        """Huge pages, one memslot: of all of RAM or nothing. Whatever goes later takes it apart again."""
        if self.chance.random() < 0.7:
            self._have_all_present()
        done = self.pager.collapse(0, PAGES)
        assert done in (0, PAGES)
        if not self.model.enabled or self.model.states != bytes([PRESENT]) * PAGES:
            assert done == 0

    def enable(self):
        self.pager.enable()
        self.model.enabled = True

    # The machine against the model

    def check(self):
        pager, model = self.pager, self.model
        ledger, states = pager.ledger, model.states
        assert ledger.states == states, _difference(ledger.states, states)
        assert ledger.claims == []
        assert ledger.resident == sum(map(states.count, IN_RAM))
        assert pager.enabled == model.enabled
        assert pager.error is None
        assert self.machine.threads[0].parameters.mc_count == self.machine_checks
        assert violations(pager) == []
        self.memslots.append(pager.trap.memslots)
        bits = bytearray(PAGES)
        for first, count in pager.bitmap.present_runs().tolist():
            bits[first : first + count] = b"\1" * count
        assert bits == bytes(state == PRESENT for state in states)
        counted = {name: getattr(pager.counters, name) for name in Counters.__slots__}
        assert counted == {name: model.counted[name] for name in Counters.__slots__}
        for first, end in _runs(states):
            if states[first] != POISON:
                wanted = model.ram[first * PAGE_SIZE : end * PAGE_SIZE]
                found = self.bytes_of(first, end - first)
                if found != wanted:
                    found, wanted = (
                        np.frombuffer(each, np.uint8).reshape(-1, PAGE_SIZE) for each in (found, wanted)
                    )
                    wrong = first + np.flatnonzero((found != wanted).any(axis=1))
                    raise AssertionError(
                        f"pages {wrong.tolist()}, {State(states[first]).name}, have other bytes"
                    )
        self._peek()

    def bytes_of(self, first, count):
        """The bytes of pages in one state, wherever they are, and they stay there."""
        offset, length = first * PAGE_SIZE, count * PAGE_SIZE
        found = bytearray(length)
        match self.model.states[first]:
            case State.PRESENT:
                found[:] = self.machine.backing.vmm.view[offset : offset + length]
            case State.BACKED:
                found[:] = self.pager.trap.fill_view[offset : offset + length]
            case State.SINK:
                self.pager.sink.fetch(FetchRequest(offset), memoryview(found))
            case State.SOURCE:
                self.source.fetch(FetchRequest(offset), memoryview(found))
        return found

    def _peek(self):
        """An access that is not to wait gets what is present, and nothing else."""
        page = self.chance.randrange(PAGES)
        at = page * PAGE_SIZE
        if self.model.states[page] == PRESENT:
            assert self.memory.read(at, 64, nowait=True) == self.model.ram[at : at + 64]
        else:
            with pytest.raises(BusyError):
                self.memory.read(at, 64, nowait=True)


# How often each is drawn
OPERATIONS = {
    "read": 3,
    "write": 3,
    "vcpu": 4,
    "mark_present": 2,
    "mark_nonpresent": 3,
    "evict": 3,
    "write_back": 2,
    "discard": 2,
    "busy": 1,
    "poison": 1,
    "unpoison": 1,
    "collapse": 1,
    "disable": 1,
    "enable": 0.5,
}


def _runs(states):
    """(first, end) of each run of pages in one state."""
    first = 0
    for page in range(1, PAGES + 1):
        if page == PAGES or states[page] != states[first]:
            yield first, page
            first = page


def _difference(found, wanted):
    wrong = [page for page in range(PAGES) if found[page] != wanted[page]]
    page = wrong[0]
    return f"{len(wrong)} pages from {page} on: {State(found[page]).name}, not {State(wanted[page]).name}"
