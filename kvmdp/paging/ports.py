"""The ports of the core: what it needs of others, and what it offers those that it calls. Others implement them.

    Quiescer      keeps the vCPUs out of KVM_RUN           `kvmdp.vcpu.gate`
    Trap          makes absent pages trap                  `kvmdp.trap`
    Peers         processes that access RAM by themselves  `kvmdp.peers`
    ForReaders    of the pager, for threads that read the kernel's faults and must not wait
    ForMemslots   of the pager, for traps that rearrange memslots behind a fault

Units: RAM pages, unless a name says bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from kvmdp.errors import PagingError
from kvmdp.memory.bitmap import PresentBitmapView
from kvmdp.page import Outcome, PageFault
from kvmdp.paging.claim import Waiter
from kvmdp.paging.jobs import Jobs


class Quiescer(Protocol):
    """Keeps every vCPU out of KVM_RUN: some changes to guest memory are exact only then."""

    @property
    def is_closed(self) -> bool:
        """Whether the vCPUs are kept out, or about to be."""
        ...

    def quiesced(self) -> AbstractContextManager[None]:
        """Keep every vCPU out of KVM_RUN for the time of the block."""
        ...

    def tell(self, closing: Callable[[], None]) -> None:
        """Call `closing` whenever the vCPUs are about to be kept out and one is in KVM_RUN, after `is_closed` says so.

        `closing` must not block.
        """
        ...

    def while_stopped(self, work: Callable[[], None]) -> None:
        """Call `work` while every vCPU is out of KVM_RUN, in a stop that threads share.

        `work` waits for nothing but the kernel, so for no claim on memslots either.
        """
        ...


class Presence(Protocol):
    """What the pager tells every trap."""

    @property
    def gate(self) -> Quiescer:
        """What keeps the vCPUs out of KVM_RUN."""
        ...

    @property
    def bitmap(self) -> PresentBitmapView:
        """Which pages are present."""
        ...

    def hold(self, page: int) -> bool:
        """Pin a page that is present and admitted; False if it is not. Undo with `release`."""
        ...

    def release(self, page: int) -> None:
        """Undo one `hold`."""
        ...

    def abort(self, error: PagingError) -> None:
        """Fail all faults from now on: the trap can no longer serve them."""
        ...


class ForReaders(Presence, Protocol):
    """What the pager does for threads that read the kernel's faults: a vCPU asleep in one waits for them."""

    def resolve_or_park(self, fault: PageFault, waiter: Waiter) -> Outcome | None:
        """Resolve a fault without ever waiting for a claim.

        Returns None if the page has a claim, or a pause concerns it: then `waiter` is notified when that has ended.
        """
        ...

    @property
    def jobs(self) -> Jobs:
        """What runs beside the guest; a reader asks its `may_admit` before a fault."""
        ...

    def note_discarded(self, first: int, count: int) -> None:
        """Take note that the bytes of these pages have gone, or are going: they read as zeros from now on."""
        ...


class ForMemslots(Presence, Protocol):
    """What the pager does for a trap that rearranges memslots when pages have come or gone."""

    @property
    def jobs(self) -> Jobs:
        """What runs beside the guest, for a trap to add a job to."""
        ...

    def complete(self, first: int, count: int) -> Outcome:
        """Make the unclaimed pages of a range present, and pass over the rest. Waits for no claim.

        PRESENT, or the outcome that ended it (FAILED, CANCELLED).
        """
        ...

    def shut_off(self, first: int, count: int) -> None:
        """Make a range absent, up to the first page that has a claim or a pin; keep its bytes. Waits for no claim."""
        ...


class ForTraps(ForReaders, ForMemslots, Protocol):
    """What a trap is armed with: the pager."""


class Peers(Protocol):
    """Processes that access RAM by themselves wherever its bit is set."""

    def invalidate(self, first: int, count: int, deadline: float | None) -> None:
        """Return when no peer accesses these pages any more; their bits are cleared.

        `deadline` is of time.monotonic. Raises BusyError if a peer does not let go.
        """
        ...

    def freeze(self, deadline: float | None) -> None:
        """Return when no peer accesses RAM before `thaw`; one that comes meanwhile is told too.

        Raises BusyError if a peer does not let go; `thaw` follows.
        """
        ...

    def thaw(self) -> None:
        """Let the peers go on."""
        ...


class Trap(Protocol):
    """Makes absent pages trap.

    The pager calls `admit` and `revoke` under a claim on exactly these pages, from any thread, for different
    pages at the same time; `arm` and `disarm` with every vCPU out of KVM_RUN, no claim left and no job at work.
    """

    @property
    def name(self) -> str:
        """What the user calls it."""
        ...

    @property
    def granule(self) -> int:
        """Bytes that become present or absent as one; a power of two, a page or more."""
        ...

    @property
    def needs_quiesce(self) -> bool:
        """Whether every vCPU must be out of KVM_RUN while pages are revoked."""
        ...

    @property
    def fill_view(self) -> memoryview:
        """All of RAM as bytes: where the content of an absent page is to be put before it is admitted."""
        ...

    @property
    def ram_view(self) -> memoryview:
        """All of RAM as bytes: where the content of a present page is."""
        ...

    @property
    def populate(self) -> Callable[[int, int], None] | None:
        """What is to be called before bytes are put into `fill_view` (offset and length of them), if anything is.

        Where the host may refuse memory at its first touch, the store would end the process; this raises ShortageError.
        """
        ...

    @property
    def memslots(self) -> int:
        """How many memslots RAM takes now."""
        ...

    @property
    def latencies(self) -> Sequence[array[int]]:
        """Nanoseconds from event to wake of vCPUs' faults served by threads of the trap's own, an array a thread."""
        ...

    def arm(self, pager: ForTraps) -> None:
        """Make every page trap that is not present in `pager.bitmap`; RAM may have been plain before."""
        ...

    def disarm(self) -> None:
        """Make RAM plain memory; every page is present."""
        ...

    def admit(self, first: int, count: int) -> None:
        """Let the guest into absent pages whose content is in place."""
        ...

    def revoke(self, first: int, count: int) -> None:
        """Shut the guest out of present pages and keep their bytes, so that `admit` brings them back."""
        ...

    def forget(self, first: int, count: int) -> None:
        """Give up the bytes of pages that are revoked, and the memory behind them where it can be freed.

        What is read there afterwards is undefined. The pages are claimed, and no access is at them.
        """
        ...

    @property
    def collapses(self) -> bool:
        """Whether `collapse` can do anything, with this memory and on this kernel; else it is not called."""
        ...

    def collapse(self, first: int, count: int) -> bool:
        """Put present pages, whole regions of 2 MiB, together into as large pieces as can be; True if it has.

        Called under a claim on these pages; vCPUs may run, and views of the pages may be open.
        """
        ...

    def reassert(self, first: int, count: int) -> bool:
        """Mend what made present pages trap, if this trap knows how that can be; True if it found any such thing."""
        ...

    def release_sleepers(self) -> None:
        """Wake every vCPU that sleeps in the kernel on an absent page: the machine is stopping."""
        ...

    def settle(self, timeout: float) -> bool:
        """Wait until threads of the trap's own have counted what they did for vCPUs; False after `timeout` seconds.

        With every vCPU out of KVM_RUN for good, and the pager cancelled.
        """
        ...

    def hold_sleepers(self, absent: Iterable[tuple[int, int]]) -> None:
        """Undo `release_sleepers`, with every vCPU out of KVM_RUN: the machine runs again.

        `absent` has the runs of absent pages, (first, count), each of which is claimed until the next is asked for.
        """
        ...

    def close(self) -> None:
        """Stop what serves the trap and give back what it holds; memslots go with the VM."""
        ...
