"""What holds of every trap, however it works: `kvmdp.paging.ports.Trap` says so, and this goes by its words.

A new trap gets here by itself, from the registry. The fake that other tests use has to keep the same rules. No vCPU
runs: whether one may enter a page is read from the memslots and the page table that the trap has set up.
"""

import contextlib
import threading

import pytest
from fakes import FakeTrap

from kvmdp.abi import pagemap
from kvmdp.errors import UnsupportedError
from kvmdp.kvm import Kvm
from kvmdp.memory.backings import BACKINGS, create_backing
from kvmdp.memory.bitmap import PresentBitmap
from kvmdp.memory.layout import GuestLayout
from kvmdp.memory.mapping import Mapping
from kvmdp.page import PAGE_SIZE, REGION, Outcome
from kvmdp.paging.jobs import Jobs
from kvmdp.trap.create import create_trap
from kvmdp.trap.fits import Together, check
from kvmdp.trap.registry import TRAPS, parse_trap
from kvmdp.trap.slots.slot_map import Kind
from kvmdp.trap.uffd.options import UffdOptions
from kvmdp.vcpu.gate import VcpuGate

MEMORY = 8 << 20
PAGES = MEMORY // PAGE_SIZE
GRANULE = 16 << 10  # few memslots
FAKE = "fake"


class Presence:
    """What a trap is armed with: the bitmap is the test's, and no page is ever claimed."""

    def __init__(self, bitmap):
        self.bitmap = bitmap
        self.gate = VcpuGate()
        self.jobs = Jobs(threading.RLock(), lambda: True)
        self.errors = []
        self.abort = self.errors.append

    def hold(self, page):
        return self.bitmap.test(page)

    def release(self, page):
        pass

    def note_discarded(self, first, count):
        raise AssertionError(f"{count} pages from {first} on were not discarded")

    def resolve_or_park(self, fault, _waiter, _count=1):
        return Outcome.PRESENT if self.bitmap.test(fault.page) else None


def content(page, salt=0):
    return bytes((page % 251 + 1 + salt,)) * PAGE_SIZE


class Rig:
    """A trap, and the memory that it is the trap of; pages come and go as the pager would have them."""

    def __init__(self, trap, memory):
        self.trap = trap
        self.unit = trap.granule // PAGE_SIZE
        self.bitmap = PresentBitmap(PAGES)
        self.presence = Presence(self.bitmap)
        self._memory = memory

    def arm(self):
        self.trap.arm(self.presence)

    def fill(self, first, count, salt=0):
        """Put content in place, as a source does."""
        if self.trap.populate is not None:
            self.trap.populate(first * PAGE_SIZE, count * PAGE_SIZE)
        for page in range(first, first + count):
            self.trap.fill_view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = content(page, salt)

    def admit(self, first, count):
        self.bitmap.set_range(first, count)
        self.trap.admit(first, count)

    def bring(self, first, count, salt=0):
        self.fill(first, count, salt)
        self.admit(first, count)

    def revoke(self, first, count):
        self.bitmap.clear_range(first, count)
        with self.presence.gate.quiesced():
            self.trap.revoke(first, count)

    def absent_runs(self):
        return ((first, count) for first, count in self.bitmap.absent_runs().tolist())

    def may_enter(self, page):
        """Whether a vCPU may, without a trap."""
        if isinstance(self.trap, FakeTrap):
            return bool(self.trap.entered[page])
        picture = self.trap.picture()
        kinds = [block.kind for block in picture.blocks if block.first <= page < block.end]
        if kinds != [Kind.OPEN]:
            return False
        if picture.view is None or page // REGION in picture.plain:
            return True
        entry = int(pagemap.entries(picture.view.hva + page * PAGE_SIZE, 1)[0])
        return entry & pagemap.MAPPED != 0

    def entered(self):
        """The first pages of all units that a vCPU may enter."""
        return [page for page in range(0, PAGES, self.unit) if self.may_enter(page)]

    def guest_sees(self, page):
        """What is in a page that a vCPU may enter: through the view that never traps, which shows the same memory.

        The guest view would do, but for a page that has gone from the page table since: a load of ours would sleep with
        the interpreter's lock, which the reader needs.
        """
        return bytes(self._memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])

    def close(self):
        self.trap.close()
        self.bitmap.close()
        assert self.presence.errors == []


@contextlib.contextmanager
def fake_rig():
    with Mapping.anonymous(MEMORY) as memory:
        rig = Rig(FakeTrap(PAGES, GRANULE, memory), memory.view)
        yield rig
        rig.close()


@contextlib.contextmanager
def real_rig(name, backing, mode):
    name, device_view = parse_trap(name)
    layout = GuestLayout(MEMORY)
    reserve = BACKINGS[backing].page_size > PAGE_SIZE
    # The memory is unmapped last: KVM would have to take it out of the guest first.
    with contextlib.ExitStack() as memory, Kvm() as kvm, kvm.create_vm() as vm:
        try:
            ram = memory.enter_context(create_backing(backing, MEMORY, vm, reserve=reserve))
            granule = GRANULE if TRAPS[name].by_memslot else None
            reads = TRAPS[name].takes_uffd_options or device_view
            options = UffdOptions(2, 2, mode) if reads else UffdOptions(mode=mode)
            trap = create_trap(name, vm, layout, ram, granule, options, device_view=device_view)
        except UnsupportedError as error:
            pytest.skip(str(error))
        rig = Rig(trap, ram.vmm.view)
        try:
            yield rig
        finally:
            rig.close()


def ways(device_views):
    """Every trap on every backing that it goes with, in each of its modes, with each of `device_views`."""
    for name, kind in TRAPS.items():
        for backing, ram in BACKINGS.items():
            for mode in (None, "missing") if kind.takes_uffd_options else (None,):
                for device_view in device_views:
                    if ram.page_size > MEMORY // 4 or not goes(Together(ram, kind, mode, device_view)):
                        continue
                    trap = f"{name}:device-view" if device_view else name
                    marks = [pytest.mark.kvm]
                    if not kind.exits or device_view:
                        marks.append(pytest.mark.userfaultfd)
                    if ram.page_size > PAGE_SIZE:
                        marks += [pytest.mark.hugepages, pytest.mark.root]
                    id_ = "-".join(filter(None, (trap, backing, mode)))
                    yield pytest.param((trap, backing, mode), id=id_, marks=marks)


def goes(together):
    try:
        check(together)
    except ValueError:
        return False
    return True


@pytest.fixture(params=[pytest.param((FAKE, "", None), id=FAKE), *ways((False, True))])
def rig(request):
    """A rig that is not armed yet."""
    name, backing, mode = request.param
    with fake_rig() if name == FAKE else real_rig(name, backing, mode) as rig:
        yield rig


@pytest.fixture
def armed(rig):
    """A rig that is armed, with all of RAM absent."""
    rig.arm()
    return rig


def test_it_says_what_it_is(rig):
    trap = rig.trap
    assert trap.name
    assert trap.granule >= PAGE_SIZE
    assert trap.granule & (trap.granule - 1) == 0
    assert len(trap.fill_view) == MEMORY
    assert trap.populate is None or callable(trap.populate)
    assert isinstance(trap.needs_quiesce, bool)
    assert isinstance(trap.collapses, bool)


def test_armed_with_nothing_present_every_page_traps(armed):
    assert armed.entered() == []


def test_a_page_that_is_admitted_is_seen_with_its_bytes_and_no_other_is(armed):
    unit = armed.unit
    armed.bring(unit, unit)
    assert armed.entered() == [unit]
    assert all(armed.guest_sees(page) == content(page) for page in range(unit, 2 * unit))


def test_several_units_come_at_once_and_in_any_order(armed):
    unit = armed.unit
    armed.bring(2 * unit, 2 * unit)
    armed.bring(0, unit)
    assert armed.entered() == [0, 2 * unit, 3 * unit]
    for page in (0, 2 * unit, 4 * unit - 1):
        assert armed.guest_sees(page) == content(page)
    assert armed.trap.memslots >= 0


def test_what_is_revoked_traps_and_comes_back_with_its_bytes(armed):
    unit = armed.unit
    armed.bring(0, 3 * unit)
    armed.revoke(unit, unit)
    assert armed.entered() == [0, 2 * unit]
    assert armed.guest_sees(0) == content(0)
    assert bytes(armed.trap.fill_view[unit * PAGE_SIZE : (unit + 1) * PAGE_SIZE]) == content(unit)
    armed.admit(unit, unit)
    assert armed.entered() == [0, unit, 2 * unit]
    assert all(armed.guest_sees(page) == content(page) for page in range(3 * unit))


def test_what_is_forgotten_comes_back_with_other_bytes(armed):
    unit = armed.unit
    armed.bring(0, 2 * unit)
    armed.revoke(0, unit)
    armed.trap.forget(0, unit)
    assert armed.entered() == [unit]
    armed.bring(0, unit, salt=3)
    assert armed.guest_sees(0) == content(0, salt=3)
    assert armed.guest_sees(unit) == content(unit)


def test_what_is_present_already_when_it_is_armed_does_not_trap(rig):
    unit = rig.unit
    rig.arm()
    rig.bring(0, PAGES)
    rig.trap.disarm()
    assert rig.guest_sees(PAGES - 1) == content(PAGES - 1)
    rig.arm()
    assert all(rig.guest_sees(page) == content(page) for page in (0, unit, PAGES - 1))
    rig.revoke(unit, unit)
    assert not rig.may_enter(unit)
    rig.admit(unit, unit)
    assert rig.guest_sees(unit) == content(unit)


def test_disarmed_all_of_ram_is_plain_memory(armed):
    armed.bring(0, PAGES)
    armed.trap.disarm()
    assert all(armed.guest_sees(page) == content(page) for page in range(PAGES))


def test_reasserting_a_page_that_lacks_nothing_changes_nothing(armed):
    unit = armed.unit
    armed.bring(0, unit)
    assert not armed.trap.reassert(0, unit)
    assert armed.entered() == [0]
    assert armed.guest_sees(0) == content(0)


def test_what_is_put_together_stays_present_and_may_go_page_by_page(armed):
    armed.bring(0, PAGES)
    if not armed.trap.collapses:
        pytest.skip("this trap puts nothing together here")
    unit, first = armed.unit, REGION
    armed.trap.collapse(first, REGION)
    assert all(armed.may_enter(page) for page in range(0, PAGES, unit))
    assert all(armed.guest_sees(page) == content(page) for page in range(first, first + REGION))
    armed.revoke(first + unit, unit)
    assert not armed.may_enter(first + unit)
    assert armed.guest_sees(first) == content(first)
    armed.admit(first + unit, unit)
    assert armed.guest_sees(first + unit) == content(first + unit)


def test_after_a_stop_absent_pages_trap_again_and_present_ones_do_not(armed):
    unit = armed.unit
    armed.bring(0, unit)
    armed.trap.release_sleepers()
    assert armed.trap.settle(10)
    armed.trap.hold_sleepers(armed.absent_runs())
    assert armed.entered() == [0]
    armed.bring(unit, unit)
    assert armed.guest_sees(unit) == content(unit)


def test_nothing_is_under_way_while_no_vcpu_runs(armed):
    armed.bring(0, armed.unit)
    assert armed.trap.settle(10)
    assert sum(map(len, armed.trap.latencies)) == 0


@pytest.mark.parametrize("way", list(ways((True,))))
def test_devices_find_what_is_present_where_they_have_a_view(way):
    with real_rig(*way) as rig:
        rig.arm()
        view = rig.trap.device_view
        rig.bring(0, rig.unit)
        assert view.read(0, PAGE_SIZE) == content(0)
        view.write(8, b"a device")
        assert rig.guest_sees(0)[8:16] == b"a device"
        rig.trap.release_sleepers()
        assert view.ended


@pytest.mark.parametrize("way", list(ways((False,))))
def test_there_is_no_view_that_was_not_asked_for(way):
    with real_rig(*way) as rig:
        assert rig.trap.device_view is None


@pytest.mark.parametrize("is_armed", [True, False], ids=["armed", "never armed"])
def test_closing_it_again_does_nothing(rig, is_armed):
    if is_armed:
        rig.arm()
    rig.trap.close()
    rig.trap.close()
