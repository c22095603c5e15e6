"""What every workload has: options, a share of the pages for each vCPU, expectations. What a program has of that.

Units: pages are RAM page numbers (order of the RAM file, 4096 bytes each); offsets in bytes of the RAM file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvmdp.machine.guest_abi import (
    MAGIC,
    MAX_VCPUS,
    MC_ADDRESSES,
    VERSION,
    ParameterBlock,
    PvFlag,
    VectorFlag,
)
from kvmdp.machine.workloads.arithmetic import Bools, Pages, SequenceChecksum, Words
from kvmdp.memory.layout import LOW_RAM_END, check_low_ram_end
from kvmdp.page import PAGE_SHIFT

__all__ = [
    "PageReader",
    "Share",
    "Task",
    "Workload",
    "WorkloadOptions",
    "checksum_of",
    "in_chunks",
]

# Returns the content of RAM pages before the run, patches applied: uint64[n, 512] for n page numbers.
PageReader = Callable[[Pages], Words]

_CHUNK_PAGES = 1024


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """What the user may choose; each workload uses what concerns it.

    `low_ram_end`: where RAM's hole begins, as the machine has it.
    `pages`: use only that many, from the first on; None is all of RAM.
    `order` (sequential, strided, random), `stride` (pages), `write`, `overlap` (all vCPUs on all pages, instead of
    a share each), `touches` (for each vCPU; None is one for each of its pages): touch.
    `iterations` (passes), `operation` (add, inc, xadd, cmpxchg): atomic.
    `vector`, what may be used beyond SSE2: vector, and programs.
    `pv`, what KVM may be made to write: clock, which leaves out what is not offered.
    `poison`, how many pages are to be poisoned before it begins, chosen by `seed`: poison, and programs.
    """

    memory_bytes: int
    low_ram_end: int = LOW_RAM_END
    vcpus: int = 1
    ring: int = 3
    seed: int = 0
    pages: int | None = None
    order: str = "sequential"
    stride: int = 16
    write: bool = False
    overlap: bool = False
    touches: int | None = None
    iterations: int = 1
    operation: str = "add"
    vector: VectorFlag = VectorFlag.NONE
    pv: PvFlag = PvFlag.NONE
    poison: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for what no workload can do."""
        check_low_ram_end(self.low_ram_end)
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise ValueError(f"{self.vcpus} vCPUs: the guest runs with 1 to {MAX_VCPUS}")
        if self.ring not in (0, 3):
            raise ValueError(f"ring {self.ring}: the guest runs in ring 3 or 0")
        if self.pages is not None and not 1 <= self.pages <= self.memory_bytes >> PAGE_SHIFT:
            raise ValueError(f"{self.pages} pages: the guest has 1 to {self.memory_bytes >> PAGE_SHIFT}")
        most = min(self.pages or self.memory_bytes >> PAGE_SHIFT, MC_ADDRESSES)
        if not 0 <= self.poison <= most:
            raise ValueError(
                f"{self.poison} pages to poison: give 0 to {most}, what the guest has and can tell of"
            )

    def ends_at_hole(self, pages: Pages) -> Bools:
        """Tell of each of `pages` whether the next page lies on the other side of RAM's hole."""
        return np.asarray(pages == (self.low_ram_end >> PAGE_SHIFT) - 1)


@dataclass(frozen=True, slots=True)
class Share:
    """The pages of one vCPU."""

    first: int
    count: int

    @property
    def pages(self) -> Pages:
        """The page numbers, ascending."""
        return np.arange(self.first, self.first + self.count)

    def holds(self, pages: Pages) -> Bools:
        """Tell of each of `pages` whether it is one of them."""
        return (pages >= self.first) & (pages < self.first + self.count)


class Task:
    """What the vCPUs of one machine are told to do.

    Of the class: `name`; `number`, its place in the table of guest/workloads.S; `program`, a flat binary for the
    program area (guest/README.md), if its code is not in that table: then `number` is 0.
    Attributes: `options`; `blocks`, the parameter block of each vCPU; `patches`, (offset in RAM, bytes) to be applied
    to the source; `touched`, the distinct RAM pages that the guest will access, ascending, None if that is not known;
    `disk_bytes`, how large a disk it needs, 0 for none; `poisoned`, the distinct RAM pages to poison before it begins.
    A run that poisons them puts all the pages there that became poisoned with them.
    """

    name: str
    number: int = 0
    program: bytes = b""

    def __init__(self, options: WorkloadOptions, shares: Sequence[Share]) -> None:
        self.options = options
        self.blocks = [_block(options, self.number, share) for share in shares]
        self.patches: list[tuple[int, bytes]] = []
        self.touched: Pages | None = None
        self.disk_bytes = 0
        self.poisoned: Pages = np.empty(0, dtype=np.int64)


class Workload(Task, ABC):
    """A task of which the host knows what must come of it.

    Of the class: `most_pages`, how many it uses at most without `pages` among the options (None: all of RAM);
    `needs_cpu`, whether it has instructions that KVM's emulator lacks.
    Attributes: `shares`, the pages of each vCPU.
    """

    most_pages: int | None = None
    needs_cpu: bool = False
    touched: Pages

    def __init__(self, options: WorkloadOptions) -> None:
        self.options = options
        self.shares = self._make_shares()
        super().__init__(options, self.shares)
        self.touched = np.concatenate([share.pages for share in self.shares])

    @abstractmethod
    def expected_checksums(self, image: PageReader) -> list[int]:
        """Return the checksum that each vCPU must leave if RAM held `image` before the run."""

    @abstractmethod
    def expected_pages(self, image: PageReader, pages: Pages) -> Words:
        """Return what `pages` must hold after the run: uint64[len(pages), 512]."""

    def _pages(self) -> int:
        """Return how many pages of RAM the workload uses."""
        if self.options.pages is not None:
            return self.options.pages
        everything = self.options.memory_bytes >> PAGE_SHIFT
        return everything if self.most_pages is None else min(everything, self.most_pages)

    def _make_shares(self, least: int = 1) -> list[Share]:
        """Deal out the pages, the remainder to the first vCPUs; ValueError if one gets less than `least`."""
        vcpus = self.options.vcpus
        count, remainder = divmod(self._pages(), vcpus)
        if count < least:
            needed = f"{least} page{'s' * (least > 1)}" + (f" for each of {vcpus} vCPUs" if vcpus > 1 else "")
            raise ValueError(f"{self._pages()} pages are too few for {self.name}, which needs {needed}")
        shares = []
        first = 0
        for vcpu in range(vcpus):
            share = Share(first, count + (vcpu < remainder))
            shares.append(share)
            first += share.count
        return shares


def in_chunks(pages: Pages) -> Iterator[Pages]:
    """Yield `pages` in pieces small enough that a few arrays of their content take little memory."""
    for start in range(0, len(pages), _CHUNK_PAGES):
        yield pages[start : start + _CHUNK_PAGES]


def checksum_of(pages: Pages, words: Callable[[Pages], Words], tail_words: int = 0) -> int:
    """Return the checksum of the words that `words` returns of `pages`, which it is asked for in chunks.

    It is their share in the checksum of a sequence that has `tail_words` more.
    """
    checksum = SequenceChecksum()
    for chunk in in_chunks(pages):
        checksum.add(words(chunk))
    return checksum.value(tail_words)


def _block(options: WorkloadOptions, number: int, share: Share) -> ParameterBlock:
    return ParameterBlock(
        magic=MAGIC,
        version=VERSION,
        vcpus=options.vcpus,
        ring=options.ring,
        workload=number,
        flags=options.vector,
        seed=options.seed,
        first_page=share.first,
        page_count=share.count,
        low_ram_end=options.low_ram_end,
    )
