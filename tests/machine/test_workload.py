"""What the host expects of each workload, and that the guest does exactly that on memory that is always present."""

from itertools import pairwise

import numpy as np
import pytest
from plain_guest import PlainGuest, random_ram

from kvmdp.kvm import InternalError
from kvmdp.machine.guest_abi import Report, VectorFlag
from kvmdp.machine.workloads import (
    WORKLOADS,
    Program,
    WorkloadOptions,
    combined_checksum,
    make_workload,
    register,
)
from kvmdp.machine.workloads.base import Share
from kvmdp.memory.layout import LOW_RAM_END
from kvmdp.page import PAGE_SIZE

MEMORY = 2 << 20
PAGES = MEMORY // PAGE_SIZE
SEED = 12345

VARIANTS = [
    ("checksum", {}),
    ("checksum", {"pages": 37}),
    ("touch", {}),
    ("touch", {"write": True}),
    ("touch", {"order": "strided", "stride": 7, "touches": 1000}),
    ("touch", {"order": "strided", "stride": 7, "touches": 50, "write": True}),
    ("touch", {"order": "random"}),
    ("touch", {"order": "random", "write": True, "overlap": True}),
    ("touch", {"order": "random", "overlap": True, "touches": 100}),
    ("touch", {"overlap": True, "write": True}),
    ("fill", {}),
    ("fill", {"pages": 100}),
    ("atomic", {"iterations": 5}),
    ("atomic", {"operation": "inc"}),
    ("atomic", {"operation": "xadd", "pages": 64, "iterations": 20}),
    ("atomic", {"operation": "cmpxchg", "pages": 2, "iterations": 500}),
    ("copy", {}),
    ("copy", {"pages": 41}),
    ("execute", {}),
    ("vector", {}),
    ("vector", {"vector": VectorFlag.AVX}),
    ("vector", {"vector": VectorFlag.AVX | VectorFlag.AVX2}),
    ("string", {"pages": 64}),
    ("string", {"pages": 23}),
    ("disk", {"pages": 100}),
    ("disk", {"pages": 47}),
]


def plan(name, **options):
    return make_workload(name, WorkloadOptions(memory_bytes=MEMORY, seed=SEED, **options))


def check_run(machine, workload, before, pages):
    """Run, and compare what the guest left with what the host expects; `before` is the content of `pages`."""

    def image(numbers):
        return before[np.searchsorted(pages, numbers)]

    ends = machine.run()
    if any(isinstance(end, InternalError) and end.is_emulation_failure for end in ends):
        pytest.skip("this host emulates ring 0, without vector instructions: run in ring 3")
    assert ends == [Report.DONE] * len(ends)
    assert [block.checksum for block in machine.blocks] == workload.expected_checksums(image)
    after = machine.ram[pages]
    assert np.array_equal(after, workload.expected_pages(image, pages))
    changed = pages[(after != before).any(axis=1)]
    assert np.isin(changed, workload.touched).all()
    assert all(block.progress > 0 and block.accesses > 0 for block in machine.blocks)


@pytest.mark.kvm
@pytest.mark.parametrize("ring", [3, 0])
@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_guest_does_what_the_host_expects(name, options, vcpus, ring):
    workload = plan(name, vcpus=vcpus, ring=ring, **options)
    before = random_ram(workload.patches, MEMORY)
    with PlainGuest(MEMORY, workload.blocks) as machine:
        if options.get("vector", VectorFlag.NONE) & ~machine.vector_flags:
            pytest.skip(f"this host's guests have no {options['vector']!r}")
        machine.ram[:] = before
        check_run(machine, workload, before, np.arange(PAGES))


@pytest.mark.kvm
@pytest.mark.parametrize(("name", "options"), [variant for variant in VARIANTS if variant[0] != "execute"])
def test_guest_touches_the_pages_it_says_and_no_other(name, options):
    workload = plan(name, vcpus=2, **options)
    with PlainGuest(MEMORY, workload.blocks) as machine:
        if options.get("vector", VectorFlag.NONE) & ~machine.vector_flags:
            pytest.skip(f"this host's guests have no {options['vector']!r}")
        assert machine.pages_in_memory().size == 0
        assert machine.run() == [Report.DONE] * 2
        assert np.array_equal(machine.pages_in_memory(), workload.touched)


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["atomic", "touch"])
def test_sixteen_vcpus(name):
    workload = plan(name, vcpus=16, **({"write": True, "overlap": True} if name == "touch" else {}))
    before = random_ram([], MEMORY)
    with PlainGuest(MEMORY, workload.blocks) as machine:
        machine.ram[:] = before
        check_run(machine, workload, before, np.arange(PAGES))


@pytest.mark.kvm
@pytest.mark.parametrize("name", sorted(set(WORKLOADS) - {"clock"}))  # clock is offered nothing here
def test_pages_on_both_sides_of_the_hole(name):
    share = Share(LOW_RAM_END // PAGE_SIZE - 10, 24)

    class AcrossTheHole(WORKLOADS[name]):
        def _make_shares(self, least=1):
            return [share]

    memory = (3 << 30) + MEMORY
    workload = AcrossTheHole(WorkloadOptions(memory_bytes=memory, seed=SEED))
    pages = share.pages
    assert np.isin(workload.touched, pages).all()
    with PlainGuest(memory, workload.blocks) as machine:
        machine.ram[pages] = random_ram([], len(pages) * PAGE_SIZE)
        for offset, data in workload.patches:
            machine.ram.reshape(-1).view(np.uint8)[offset : offset + len(data)] = np.frombuffer(
                data, np.uint8
            )
        check_run(machine, workload, machine.ram[pages], pages)


@pytest.mark.parametrize("vcpus", [1, 2, 7])
def test_checksum_is_the_formula_over_all_ram(vcpus):
    words = random_ram([], MEMORY).reshape(-1)
    weights = 2 * np.arange(len(words), 0, -1, dtype=np.uint64) - np.uint64(1)
    expected = int((words * weights).sum(dtype=np.uint64))
    pages = words.reshape(PAGES, -1)
    workload = plan("checksum", vcpus=vcpus)
    assert combined_checksum(workload.expected_checksums(lambda numbers: pages[numbers])) == expected


@pytest.mark.parametrize("name", ["checksum", "fill", "touch", "copy", "execute", "vector"])
def test_shares_are_disjoint_and_together_everything(name):
    blocks = plan(name, vcpus=5).blocks
    assert blocks[0].first_page == 0
    for block, following in pairwise(blocks):
        assert following.first_page == block.first_page + block.page_count
    assert blocks[-1].first_page + blocks[-1].page_count == PAGES
    assert {block.page_count for block in blocks} == {PAGES // 5, PAGES // 5 + 1}


@pytest.mark.parametrize("pages", [1, 2, 3, 64, 97, PAGES])
def test_atomic_takes_every_page_once_a_pass(pages):
    for block in plan("atomic", vcpus=16, pages=pages).blocks:
        order = (block.start + block.stride * np.arange(pages)) % pages
        assert block.start < pages
        assert 1 <= block.stride <= pages
        assert sorted(order) == list(range(pages))


def test_touched_pages_of_a_partial_stride():
    workload = plan("touch", order="strided", stride=5, pages=12, touches=4)
    assert list(workload.touched) == [0, 1, 5, 10]


def test_copy_leaves_the_odd_page_alone():
    assert list(plan("copy", pages=7).touched) == [0, 1, 2, 3, 4, 5]


def test_execute_patches_cross_pages():
    patches = plan("execute", pages=4).patches
    assert len(patches) == 4 + 3
    crossing = [at for at, data in patches if at // PAGE_SIZE != (at + len(data) - 1) // PAGE_SIZE]
    assert crossing == [page * PAGE_SIZE + 4091 for page in range(3)]


def test_expectation_of_some_pages_in_any_order():
    pages = random_ram([], MEMORY)
    some = np.array([300, 7, 299, 0, 511])
    for name in WORKLOADS:
        workload = plan(name, vcpus=2, vector=VectorFlag.AVX, write=True)
        everything = workload.expected_pages(lambda numbers: pages[numbers], np.arange(PAGES))
        assert np.array_equal(workload.expected_pages(lambda numbers: pages[numbers], some), everything[some])


def test_seed_makes_the_work():
    options = WorkloadOptions(memory_bytes=MEMORY, seed=SEED)
    other = WorkloadOptions(memory_bytes=MEMORY, seed=SEED + 1)
    nothing = np.zeros((PAGES, 512), dtype=np.uint64)
    for name in ("fill", "execute"):
        checksums = [
            make_workload(name, o).expected_checksums(lambda numbers: nothing[numbers])
            for o in (options, other)
        ]
        assert checksums[0] != checksums[1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dance", {}, "unknown workload 'dance': give one of checksum, touch,"),
        (
            "touch",
            {"order": "backwards"},
            "unknown order 'backwards': give one of sequential, strided, random",
        ),
        ("touch", {"touches": 0}, "0 touches"),
        ("touch", {"touches": (1 << 64) + 1}, "18446744073709551617 touches: give 1 to 18446744073709551615"),
        ("touch", {"order": "strided", "stride": 0}, "a stride of 0 pages: give 1 to 512"),
        ("touch", {"order": "strided", "stride": 300, "vcpus": 2}, "a stride of 300 pages: give 1 to 256"),
        ("atomic", {"iterations": 0}, "0 iterations"),
        ("atomic", {"operation": "sub"}, "unknown operation 'sub': give one of add, inc, xadd, cmpxchg"),
        (
            "copy",
            {"pages": 3, "vcpus": 2},
            "3 pages are too few for copy, which needs 2 pages for each of 2 vCPUs",
        ),
        (
            "checksum",
            {"pages": 5, "vcpus": 6},
            "5 pages are too few for checksum, which needs 1 page for each of 6 vCPUs",
        ),
        ("checksum", {"pages": 0}, "0 pages: the guest has 1 to 512"),
        ("checksum", {"pages": 513}, "513 pages: the guest has 1 to 512"),
        ("checksum", {"vcpus": 17}, "17 vCPUs: the guest runs with 1 to 16"),
        ("checksum", {"ring": 1}, "ring 1: the guest runs in ring 3 or 0"),
    ],
)
def test_what_cannot_be_done_is_said(name, options, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        plan(name, **options)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"name": "fill", "program": b"\xc3"}, "there is a workload fill already: give yours another name"),
        ({"name": "program", "program": b"\xc3"}, "there is a workload program already"),
        ({"name": "own", "number": 0}, "the workload own has no code: give its class a `program`"),
    ],
)
def test_a_workload_from_outside_needs_a_name_and_code_of_its_own(attributes, message):
    names = list(WORKLOADS)
    with pytest.raises(ValueError, match=message):
        register(type("Own", (WORKLOADS["fill"],), {"number": 0, **attributes}))
    assert list(WORKLOADS) == names


def test_program_is_told_of_all_ram():
    blocks = Program(WorkloadOptions(memory_bytes=MEMORY, vcpus=3, seed=SEED)).blocks
    assert [(block.workload, block.first_page, block.page_count) for block in blocks] == [(0, 0, PAGES)] * 3
