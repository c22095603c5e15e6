"""What the options of `kvmdp run` are, and what they mean for the machine and its work."""

from __future__ import annotations

import argparse
from typing import get_args

from kvmdp.cli.disk_options import add_disk_options
from kvmdp.cli.images import add_image_options
from kvmdp.errors import UnsupportedError
from kvmdp.jobs.collapse import POLICIES
from kvmdp.jobs.resident_limit import check_frees, check_limit
from kvmdp.kvm import Kvm
from kvmdp.lab.experiment import usable_memory
from kvmdp.lab.poison import check_poison
from kvmdp.lab.probe import choose_trap, working_traps
from kvmdp.machine.boot import read_program, vector_flags
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.pv_msrs import pv_flags
from kvmdp.machine.workloads import WORKLOADS, WorkloadOptions, make_workload
from kvmdp.machine.workloads.poison import Poison
from kvmdp.memory.backings import BACKINGS, check_backing_options, check_huge_pages
from kvmdp.memory.layout import HIGH_RAM_BASE, MIN_MEMORY, GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.policy import FaultAround
from kvmdp.peers.handler.source import DEFAULT_TIMEOUT
from kvmdp.size import format_size, parse_size
from kvmdp.source.base import PageSource
from kvmdp.trap.registry import ALL_TRAPS, SLOT_TRAPS, check_backing, exit_trap_of
from kvmdp.trap.slots.memory_fault import MemoryFaultTrap
from kvmdp.trap.slots.partial_slots import DEFAULT_SLOT_MEMORY
from kvmdp.trap.slots.ram_slots import check_granule, least_granule
from kvmdp.trap.slots.slot_trap import SlotOptions, Split
from kvmdp.trap.uffd.userfaultfd import UffdOptions, check_mode, parse_mode


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them all."""
    _add_page_options(parser.add_argument_group("pages"))
    _add_machine_options(parser.add_argument_group("machine"))
    _add_memory_options(parser.add_argument_group("memory"))
    _add_trap_options(parser.add_argument_group("traps"))
    _add_work_options(parser.add_argument_group("work"))
    add_disk_options(parser.add_argument_group("disk"))
    option = parser.add_argument
    option("--trace", metavar="FILE", help="write one record a fault to FILE (default: none)")
    option(
        "--detect-leaks",
        action="store_true",
        help="find accesses that bypass the pager; the run is supervised for it (default: no)",
    )
    option("--timeout", type=float, metavar="S", help="give up after S seconds (default: never)")
    option("--json", metavar="FILE", help="write the result as JSON to FILE, - is stdout (default: no JSON)")


def _add_page_options(group: argparse._ArgumentGroup) -> None:
    option = group.add_argument
    option("--image", metavar="FILE", help="raw memory image to fetch pages from (default: synthetic pages)")
    add_image_options(group)
    option("--handler", metavar="PATH", help="socket of a kvmdp handler to fetch pages from (default: none)")
    option(
        "--handler-timeout",
        type=float,
        default=DEFAULT_TIMEOUT,
        metavar="S",
        help=f"wait S seconds for an answer of the handler, or for another one (default: {DEFAULT_TIMEOUT:g})",
    )
    option("--memory", metavar="SIZE", help="RAM, 2M to 256G (default: 64M, or the image's size)")
    option(
        "--latency",
        default="0",
        metavar="TIME",
        help="of a simulated network to the source, as 30us (default: 0)",
    )
    option(
        "--bandwidth", default="0", metavar="RATE", help="of that network, as 10Gbit (default: 0, no limit)"
    )


def _add_machine_options(group: argparse._ArgumentGroup) -> None:
    option = group.add_argument
    option(
        "--trap",
        default="auto",
        metavar="TRAP",
        help=f"auto, {', '.join(ALL_TRAPS)} (default: auto, the fastest proven one with exits; layered from 8G on)",
    )
    option("--vcpus", type=int, default=1, metavar="N", help="vCPUs, 1 to 16 (default: 1)")
    option(
        "--ring", type=int, default=3, metavar="R", help="privilege ring of the workload, 3 or 0 (default: 3)"
    )
    option(
        "--page-tables",
        default="boot",
        choices=("boot", "paged"),
        help="where the guest's lie: in the boot slot, or paged, in RAM's last pages (default: boot)",
    )


def _add_memory_options(group: argparse._ArgumentGroup) -> None:
    option = group.add_argument
    option(
        "--backing",
        default="memfd",
        metavar="KIND",
        help=f"what RAM is made of: {', '.join(BACKINGS)} (default: memfd)",
    )
    option(
        "--backing-file",
        metavar="PATH",
        help="file: where RAM is to be, a new file (default: a temporary one)",
    )
    option(
        "--thp",
        default="off",
        choices=("on", "off"),
        help="memfd, anonymous, file: let the kernel put pages together into transparent huge pages (default: off)",
    )
    option(
        "--reserve-hugepages",
        action="store_true",
        help="hugetlb: reserve the huge pages that are missing, give them back at the end; as root (default: no)",
    )
    option(
        "--resident-limit",
        metavar="SIZE",
        help="evict pages when more than SIZE of RAM are in memory (default: no limit)",
    )
    option(
        "--fault-around",
        type=int,
        default=1,
        metavar="N",
        help="pages fetched a fault, a power of two to 512 (default: 1)",
    )
    option(
        "--collapse",
        default="off",
        choices=POLICIES,
        help="when present pages are put together into huge ones: never, as each 2 MiB fill, in the background, or at "
        "the end (default: off)",
    )


def _add_trap_options(group: argparse._ArgumentGroup) -> None:
    option = group.add_argument
    option(
        "--granule",
        metavar="SIZE",
        help="memory a memslot covers, for memory-fault and mmio, hybrid or not (default: least that "
        "makes at most 16384 memslots)",
    )
    option(
        "--split",
        choices=get_args(Split),
        help="how memory-fault cuts a region of RAM that has too many granules for a memslot each, when a page of it "
        "is touched: around the page, or into granules (default: gap)",
    )
    option(
        "--slot-memory",
        metavar="SIZE",
        help="for memory-fault and mmio: kernel memory that the memslots of regions with too many granules may take "
        "before the fullest are completed and merged (with --resident-limit: the emptiest shut off) "
        f"(default: {format_size(DEFAULT_SLOT_MEMORY)})",
    )
    option(
        "--readers",
        type=int,
        default=1,
        metavar="N",
        help="userfaultfd, hybrids: reader threads, 1 to 99 (default: 1)",
    )
    option(
        "--uffd-per-vcpu",
        action="store_true",
        help="userfaultfd, hybrids: a descriptor for each vCPU's share of RAM (default: one)",
    )
    option(
        "--uffd-mode",
        metavar="MODE",
        help="userfaultfd: missing (filled by UFFDIO_COPY) or minor (filled in place, mapped by UFFDIO_CONTINUE) "
        "(default: minor; missing on anonymous)",
    )


def _add_work_options(group: argparse._ArgumentGroup) -> None:
    option = group.add_argument
    option(
        "--workload",
        default="checksum",
        metavar="W",
        help=f"what the guest does: {', '.join(WORKLOADS)} (default: checksum)",
    )
    option(
        "--guest",
        metavar="FILE",
        help="flat binary to run instead, see guest/README.md (default: the workload)",
    )
    option(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="number that decides synthetic pages and random orders (default: 0)",
    )
    option("--pages", type=int, metavar="N", help="use only the first N pages of RAM (default: all)")
    option(
        "--order",
        default="sequential",
        choices=("sequential", "strided", "random"),
        help="touch: in which order (default: sequential)",
    )
    option(
        "--stride",
        type=int,
        default=16,
        metavar="N",
        help="touch: pages from one to the next if strided (default: 16)",
    )
    option("--write", action="store_true", help="touch: write (default: read)")
    option("--overlap", action="store_true", help="touch: every vCPU on all pages (default: a share each)")
    option(
        "--touches",
        type=int,
        metavar="N",
        help="touch: accesses a vCPU makes (default: one for each of its pages)",
    )
    option(
        "--poison",
        type=int,
        default=0,
        metavar="N",
        help="poison, programs: N pages that give a machine check, chosen by the seed (default: 0)",
    )
    option(
        "--iterations", type=int, default=1, metavar="N", help="atomic: passes over the pages (default: 1)"
    )
    option(
        "--operation",
        default="add",
        choices=("add", "inc", "xadd", "cmpxchg"),
        help="atomic: which instruction (default: add)",
    )


def plan(options: argparse.Namespace, source: PageSource, low_ram_end: int) -> tuple[int, WorkloadOptions]:
    """Return the size of RAM and the workload's options, for RAM whose hole begins at `low_ram_end`.

    Raises ValueError.
    """
    if options.memory is not None:
        memory = parse_size(options.memory)
        if source.size > memory:
            hint = ""
            if source.size - memory == HIGH_RAM_BASE - low_ram_end:
                hint = ", or --image-layout physical if RAM's hole is in the file"
            raise ValueError(
                f"the image has {format_size(source.size)}, more than --memory {options.memory}: "
                f"give at least as much{hint}"
            )
    else:
        memory = max(source.size, MIN_MEMORY)
    GuestLayout(memory, low_ram_end)
    if options.timeout is not None and not options.timeout > 0:
        raise ValueError(f"--timeout {options.timeout:g}: give more than 0 seconds")
    with Kvm() as kvm:
        vector, pv = vector_flags(kvm), pv_flags(kvm)
    if options.workload == "clock" and not pv:
        raise UnsupportedError(
            "the workload clock needs kvmclock, and an MSR filter to intercept it (KVM_CAP_X86_MSR_FILTER, "
            "KVM_CAP_X86_USER_SPACE_MSR), which this kernel's KVM lacks: use Linux 5.10 or later"
        )
    return memory, WorkloadOptions(
        memory_bytes=usable_memory(memory, options.page_tables, low_ram_end),
        low_ram_end=low_ram_end,
        vcpus=options.vcpus,
        ring=options.ring,
        seed=options.seed,
        pages=options.pages,
        order=options.order,
        stride=options.stride,
        write=options.write,
        overlap=options.overlap,
        touches=options.touches,
        iterations=options.iterations,
        operation=options.operation,
        vector=vector,
        pv=pv,
        poison=options.poison,
    )


def machine_options(options: argparse.Namespace, memory: int, work: WorkloadOptions) -> MachineOptions:
    """Check what concerns the machine, and the pages to poison, and choose the trap. Raises ValueError."""
    FaultAround(options.fault_around)
    if not 1 <= options.readers <= 99:
        raise ValueError(f"--readers {options.readers}: give 1 to 99")
    thp = options.thp == "on"
    check_backing_options(
        options.backing, memory, thp=thp, path=options.backing_file, reserve=options.reserve_hugepages
    )
    _check_names(options)
    mode = None if options.uffd_mode is None else parse_mode(options.uffd_mode)
    if mode is not None and options.trap != "userfaultfd":
        raise ValueError("--uffd-mode is for the trap userfaultfd: give --trap userfaultfd, or leave it out")
    check_backing(options.trap, BACKINGS[options.backing])
    check_mode(mode, BACKINGS[options.backing])
    if options.resident_limit is not None:
        check_frees(BACKINGS[options.backing])
    if not options.reserve_hugepages:
        check_huge_pages(options.backing, memory)
    trap = choose_trap(options.backing, memory) if options.trap == "auto" else options.trap
    layout = GuestLayout(memory, work.low_ram_end)
    if layout.cuts(BACKINGS[options.backing].page_size):
        raise ValueError(
            f"RAM's hole at {format_size(layout.low_ram_end)} is in the middle of a huge page of {options.backing} "
            "memory: use hugetlb-2m"
        )
    granule = _granule(options, trap, layout)
    # What the trap flips as one, in bytes.
    unit = granule if trap in SLOT_TRAPS and granule else BACKINGS[options.backing].page_size
    if options.poison and options.guest is None:
        workload = make_workload(options.workload, work)
        check_poison(workload.poisoned, workload.touched, unit // PAGE_SIZE)
    limit = None if options.resident_limit is None else parse_size(options.resident_limit)
    if limit is not None:
        retained = memory - usable_memory(memory, options.page_tables, work.low_ram_end)
        check_limit(
            limit // PAGE_SIZE, options.vcpus, options.fault_around, unit // PAGE_SIZE, retained // PAGE_SIZE
        )
    return MachineOptions(
        memory_bytes=memory,
        low_ram_end=work.low_ram_end,
        resident_limit=limit,
        trap=trap,
        backing=options.backing,
        vcpus=options.vcpus,
        granule=granule,
        fault_around=options.fault_around,
        slots=_slot_options(options, trap),
        uffd=UffdOptions(options.readers, options.vcpus if options.uffd_per_vcpu else 1, mode),
        page_tables=options.page_tables,
        program=b"" if options.guest is None else read_program(options.guest),
        thp=thp,
        backing_file=options.backing_file,
        reserve_hugepages=options.reserve_hugepages,
    )


def _check_names(options: argparse.Namespace) -> None:
    """Raise ValueError for a trap or workload that there is none of, or workloads that do not go with the rest."""
    if options.trap != "auto" and options.trap not in ALL_TRAPS:
        proven = ", ".join(working_traps(options.backing)) or "none"
        raise ValueError(
            f"there is no trap {options.trap!r}: there are auto, {', '.join(ALL_TRAPS)}; this host proves {proven}"
        )
    if options.guest is None and options.workload not in WORKLOADS:
        raise ValueError(f"there is no workload {options.workload!r}: choose from {', '.join(WORKLOADS)}")
    if options.poison and options.guest is None and options.workload != Poison.name:
        raise ValueError(
            f"--poison is for the workload poison and for programs of your own: {options.workload} does not survive a "
            "machine check; give --workload poison, or leave it out"
        )


def _granule(options: argparse.Namespace, trap: str, layout: GuestLayout) -> int | None:
    """Return the granule in bytes, None for a trap that has none of its own to choose. Raises ValueError."""
    granule = None if options.granule is None else parse_size(options.granule)
    if trap in SLOT_TRAPS:
        if granule is None:
            # What is fetched together is one memslot: the fewer flips the better.
            least = least_granule(layout, BACKINGS[options.backing].page_size)
            granule = max(least, options.fault_around * PAGE_SIZE)
        check_granule(granule, layout)
    elif granule not in (None, PAGE_SIZE):
        raise ValueError(f"--granule is for memory-fault and mmio: the trap {trap} works by the host's pages")
    return granule


def _slot_options(options: argparse.Namespace, trap: str) -> SlotOptions:
    """Return how memslots are cut. Raises ValueError for what the trap has no use for."""
    if options.split is not None and exit_trap_of(trap) != MemoryFaultTrap.name:
        raise ValueError(
            f"--split is for memory-fault: the trap {trap} stops no vCPU to cut a region; leave it out"
        )
    if options.slot_memory is not None and trap not in SLOT_TRAPS:
        raise ValueError(
            f"--slot-memory is for memory-fault and mmio: the trap {trap} has no memslots for parts of a region; leave "
            "it out"
        )
    memory = DEFAULT_SLOT_MEMORY if options.slot_memory is None else parse_size(options.slot_memory)
    return SlotOptions(options.split or "gap", memory)
