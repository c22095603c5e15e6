"""What goes with what: one table, one granule rule, and traps and backings from outside that find their place there."""

import itertools

import pytest
from harness import MEMORY, SEED, TIMEOUT, make_machine, plan, prove, require_trap

from kvmdp.bench.contender import contender
from kvmdp.bench.measure import machine_options
from kvmdp.bench.work import Work
from kvmdp.lab.probe import choose_trap, exit_traps
from kvmdp.machine.machine import Machine
from kvmdp.machine.options import MachineOptions
from kvmdp.memory import backings
from kvmdp.memory.backing import MemfdBacking
from kvmdp.memory.backings import BACKINGS, backing_class
from kvmdp.memory.layout import GuestLayout
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap import registry
from kvmdp.trap.fits import RULES, Together, check, granule_of
from kvmdp.trap.registry import TRAPS, parse_trap, trap_class
from kvmdp.trap.slots.mmio import MmioTrap
from kvmdp.trap.uffd.marker import MarkerTrap

GIB = 1 << 30
SLOT_TRAPS = [name for name, kind in TRAPS.items() if kind.by_memslot]


def combinations():
    """What can be asked for of the traps and backings there are, with up to two things beside."""
    flags = ("device_view", "devices", "handler", "limited", "unarmed", "readers")
    beside = [some for number in (0, 1, 2) for some in itertools.combinations(flags, number)]
    modes = (None, "missing", "minor")
    for kind, ram, mode, more in itertools.product(TRAPS.values(), BACKINGS.values(), modes, beside):
        yield Together(ram, kind, mode, **dict.fromkeys(more, True))


def test_every_rule_is_the_one_that_refuses_something_in_a_sentence_with_a_remedy():
    used = set()
    for it in combinations():
        clashing = [number for number, rule in enumerate(RULES) if rule.clashes(it.trap, it)]
        if not clashing:
            check(it)
            continue
        used.add(clashing[0])
        with pytest.raises(ValueError, match=r"^[^{}\n]*(use|leave) [^{}\n]*$"):
            check(it)
    assert used == set(range(len(RULES)))


def test_what_is_not_chosen_yet_is_not_refused():
    check(Together(backing_class("memfd"), device_view=True, devices=True, handler=True, limited=True))


@pytest.mark.parametrize("trap", TRAPS)
def test_memfd_goes_with_every_trap(trap):
    check(Together(backing_class("memfd"), trap_class(trap), devices=True, limited=True))


# The granule


@pytest.mark.parametrize("trap", SLOT_TRAPS)
@pytest.mark.parametrize(
    ("memory", "backing", "asked", "fault_around", "granule"),
    [
        (64 << 20, "memfd", None, 1, 4096),
        (GIB, "memfd", None, 1, 64 << 10),
        (GIB, "hugetlb-2m", None, 1, 4096),
        (GIB, "private-hugetlb-1g", None, 1, 4096),
        (GIB, "hugetlb-2m", None, 16, 64 << 10),
        (64 << 20, "memfd", None, 32, 128 << 10),
        (GIB, "memfd", 4096, 32, 4096),
        (GIB, "hugetlb-2m", 2 << 20, 1, 2 << 20),
    ],
)
def test_a_memslot_covers_what_the_rule_says_in_a_run_and_in_a_bench(
    trap, memory, backing, asked, fault_around, granule
):
    ram = backing_class(backing)
    assert granule_of(trap_class(trap), GuestLayout(memory), ram, asked, fault_around) == granule
    work = Work(bytes_per_vcpu=memory, backing=backing, granule=asked, fault_around=fault_around)
    assert machine_options(contender(trap, work)).granule == granule


@pytest.mark.parametrize("trap", [name for name in TRAPS if name not in SLOT_TRAPS])
def test_other_traps_have_no_granule_to_choose(trap):
    layout, ram = GuestLayout(GIB), backing_class("memfd")
    assert granule_of(trap_class(trap), layout, ram) is None
    assert granule_of(trap_class(trap), layout, ram, 4096) is None
    with pytest.raises(ValueError, match="a granule is for memory-fault and mmio"):
        granule_of(trap_class(trap), layout, ram, 8192)
    assert machine_options(contender(trap, Work(granule=8192))).granule is None  # meant for the others


@pytest.mark.parametrize("granule", [0, 2048, 12288, 2 << 30])
def test_what_is_no_granule_is_refused(granule):
    with pytest.raises(ValueError, match="give a power of two from 4K to 1G"):
        granule_of(MmioTrap, GuestLayout(GIB), backing_class("memfd"), granule)


# Names


def test_a_name_that_there_is_not_is_told_which_there_are():
    with pytest.raises(ValueError, match="there is no trap 'smoke': choose from marker, memory-fault, mmio"):
        trap_class("smoke")
    with pytest.raises(ValueError, match="there is no backing 'paper': choose from memfd, anonymous"):
        backing_class("paper")


def test_a_trap_is_named_alone_or_with_a_device_view():
    assert parse_trap("mmio") == ("mmio", False)
    assert parse_trap("mmio:device-view") == ("mmio", True)
    for text in ("mmio:", "mmio:view", "mmio:device-view,readers=2"):
        with pytest.raises(ValueError, match="as in mmio:device-view"):
            parse_trap(text)
    with pytest.raises(ValueError, match="give memory-fault:device-view"):
        parse_trap("hybrid-memory-fault")


# From outside


class Mine(MmioTrap):
    """A trap of the user's own, by memslot."""

    name = "mine"


class Paper(MemfdBacking):
    """A backing of the user's own."""

    name = "paper"
    registrable = False


@pytest.fixture
def mine():
    registry.register(Mine)
    yield "mine"
    del TRAPS["mine"]


@pytest.fixture
def paper():
    backings.register(Paper)
    yield "paper"
    del BACKINGS["paper"]


def test_a_name_is_taken_once(mine, paper):
    with pytest.raises(ValueError, match="there is a trap mine already"):
        registry.register(Mine)
    with pytest.raises(ValueError, match="there is a backing paper already"):
        backings.register(Paper)


@pytest.mark.kvm
def test_a_trap_from_outside_is_one_like_the_others(mine):
    require_trap("mmio")
    assert exit_traps()[-1] == mine
    result = prove(mine, "memfd", plan("touch"), granule=64 << 10)
    assert result.counters.pages_fetched == 512
    with pytest.raises(ValueError, match="use the trap memory-fault, mmio or mine"):
        check(Together(backing_class("file"), MarkerTrap))
    assert machine_options(contender(mine, Work())).trap == mine


@pytest.mark.kvm
def test_a_backing_from_outside_is_one_like_the_others(paper):
    prove("mmio", paper, plan("touch"), granule=64 << 10)
    options = MachineOptions(MEMORY, "marker", paper)
    with pytest.raises(ValueError, match="cannot be done with paper memory"):
        Machine(options, SyntheticSource(MEMORY, SEED))
    assert trap_class(choose_trap(paper, MEMORY)).by_memslot
    with make_machine("mmio", paper, workload=plan("checksum", pages=4)) as machine:
        machine.run(TIMEOUT)
