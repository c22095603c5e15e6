"""What the options of `kvmdp run` are, and what they mean for the machine and its work."""

from __future__ import annotations

import argparse

from kvmdp.cli.disk_options import add_disk_options
from kvmdp.cli.images import add_image_options
from kvmdp.cli.lists import given_mode
from kvmdp.errors import UnsupportedError
from kvmdp.jobs.collapse import POLICIES
from kvmdp.jobs.resident_limit import check_limit
from kvmdp.kvm import Kvm
from kvmdp.lab.experiment import usable_memory
from kvmdp.lab.poison import check_poison
from kvmdp.lab.probe import choose_trap, working_traps
from kvmdp.machine.boot import read_program, vector_flags
from kvmdp.machine.options import MachineOptions
from kvmdp.machine.pv_msrs import pv_flags
from kvmdp.machine.workloads import WORKLOADS, WorkloadOptions, check_ring, make_workload
from kvmdp.machine.workloads.poison import Poison
from kvmdp.memory.backings import BACKINGS, backing_class, check_backing_options, check_huge_pages
from kvmdp.memory.layout import HIGH_RAM_BASE, MIN_MEMORY, GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.paging.policy import FaultAround
from kvmdp.peers.handler.source import DEFAULT_TIMEOUT
from kvmdp.size import format_size, parse_size
from kvmdp.source.base import PageSource
from kvmdp.source.registry import SCHEMES
from kvmdp.trap.fits import Together, check, granule_of, named
from kvmdp.trap.kind import TrapKind
from kvmdp.trap.registry import DEVICE_VIEW, TRAPS, parse_trap, trap_class
from kvmdp.trap.slots.partial_slots import DEFAULT_SLOT_MEMORY, check_slot_memory
from kvmdp.trap.uffd.options import UffdOptions

_AUTO = "auto"
_BY_MEMSLOT = named(lambda trap: trap.by_memslot).replace(" or ", " and ")


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
    option(
        "--image",
        metavar="FILE",
        help=f"raw memory image to fetch pages from, or a source by its scheme: {', '.join(SCHEMES)} (default: "
        "synthetic pages)",
    )
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
        default=_AUTO,
        metavar="TRAP",
        help=f"{_AUTO}, {', '.join(TRAPS)} (default: {_AUTO}, the fastest proven one with exits; layered from 8G on); "
        f"with :{DEVICE_VIEW} behind it threads of this process have a view of RAM in which they sleep until a page is "
        f"there ({_BY_MEMSLOT})",
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
        help=f"memory a memslot covers, for {_BY_MEMSLOT} (default: least that makes at most 16384 memslots)",
    )
    option(
        "--slot-memory",
        metavar="SIZE",
        help=f"for {_BY_MEMSLOT}: kernel memory that the memslots of regions with too many granules may take "
        "before the fullest are completed and merged (with --resident-limit: the emptiest shut off) "
        f"(default: {format_size(DEFAULT_SLOT_MEMORY)})",
    )
    option(
        "--readers",
        type=int,
        metavar="N",
        help="userfaultfd, device view: reader threads, 1 to 99 (default: 1)",
    )
    option(
        "--uffd-per-vcpu",
        action="store_true",
        help="userfaultfd, device view: a descriptor for each vCPU's share of RAM (default: one)",
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
    if options.guest is None:
        check_ring(options.workload, options.ring)
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
    readers = 1 if options.readers is None else options.readers
    has_readers = options.readers is not None or options.uffd_per_vcpu
    if not 1 <= readers <= 99:
        raise ValueError(f"--readers {options.readers}: give 1 to 99")
    thp = options.thp == "on"
    check_backing_options(
        options.backing, memory, thp=thp, path=options.backing_file, reserve=options.reserve_hugepages
    )
    backing = backing_class(options.backing)
    name, device_view = parse_trap(options.trap)
    _check_names(options, name)
    mode = given_mode(options)
    if mode is not None and name == _AUTO:
        raise ValueError(
            "--uffd-mode with --trap auto, which takes no trap that has a mode: name the trap, or leave it out"
        )
    if has_readers and name == _AUTO and not device_view:
        raise ValueError(
            "--readers or --uffd-per-vcpu with --trap auto, which takes no trap that has readers: name the trap, or "
            "leave them out"
        )
    chosen = None if name == _AUTO else trap_class(name)
    limited = options.resident_limit is not None
    check(Together(backing, chosen, mode, device_view, limited=limited, readers=has_readers))
    if not options.reserve_hugepages:
        check_huge_pages(options.backing, memory)
    if name == _AUTO:
        name = choose_trap(options.backing, memory, device_view=device_view)
    trap = trap_class(name)
    layout = GuestLayout(memory, work.low_ram_end)
    if layout.cuts(backing.page_size):
        raise ValueError(
            f"RAM's hole at {format_size(layout.low_ram_end)} is in the middle of a huge page of {options.backing} "
            "memory: use hugetlb-2m"
        )
    asked = None if options.granule is None else parse_size(options.granule)
    granule = granule_of(trap, layout, backing, asked, options.fault_around)
    unit = trap.unit(layout, backing, granule)
    if options.poison and options.guest is None:
        workload = make_workload(options.workload, work)
        check_poison(workload.poisoned, workload.touched, unit // PAGE_SIZE)
    limit = None if options.resident_limit is None else parse_size(options.resident_limit)
    if limit is not None:
        retained = memory - usable_memory(memory, options.page_tables, work.low_ram_end)
        check_limit(limit, options.vcpus, options.fault_around, unit // PAGE_SIZE, retained // PAGE_SIZE)
    return MachineOptions(
        memory_bytes=memory,
        low_ram_end=work.low_ram_end,
        resident_limit=limit,
        trap=name,
        device_view=device_view,
        backing=options.backing,
        vcpus=options.vcpus,
        granule=granule,
        fault_around=options.fault_around,
        slot_memory=_slot_memory(options, trap),
        uffd=UffdOptions(readers, options.vcpus if options.uffd_per_vcpu else 1, mode),
        page_tables=options.page_tables,
        program=b"" if options.guest is None else read_program(options.guest),
        thp=thp,
        backing_file=options.backing_file,
        reserve_hugepages=options.reserve_hugepages,
    )


def _check_names(options: argparse.Namespace, trap: str) -> None:
    """Raise ValueError for a trap or workload that there is none of, or workloads that do not go with the rest."""
    if trap != _AUTO and trap not in TRAPS:
        proven = ", ".join(working_traps(options.backing)) or "none"
        raise ValueError(
            f"there is no trap {trap!r}: there are {_AUTO}, {', '.join(TRAPS)}; this host proves {proven}"
        )
    if options.guest is None and options.workload not in WORKLOADS:
        raise ValueError(f"there is no workload {options.workload!r}: choose from {', '.join(WORKLOADS)}")
    if options.poison and options.guest is None and options.workload != Poison.name:
        raise ValueError(
            f"--poison is for the workload poison and for programs of your own: {options.workload} does not survive a "
            "machine check; give --workload poison, or leave it out"
        )


def _slot_memory(options: argparse.Namespace, trap: type[TrapKind]) -> int:
    """Return the kernel memory, in bytes, that memslots of regions in pieces may take. Raises ValueError."""
    if options.slot_memory is None:
        return DEFAULT_SLOT_MEMORY
    if not trap.by_memslot:
        raise ValueError(
            f"--slot-memory is for {_BY_MEMSLOT}: the trap {trap.name} has no memslots for parts of a region; leave it "
            "out"
        )
    memory = parse_size(options.slot_memory)
    check_slot_memory(memory)
    return memory
