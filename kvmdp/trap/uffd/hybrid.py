"""The hybrid traps: vCPUs fault by an exit trap, user space by userfaultfd on a view of its own.

This is the arrangement of the series that the design comes from: KVM_RUN exits where a vCPU would have slept, and
userfaultfd stays for all other accesses. The exit trap is one that works by memslot, whose guest view carries no
markers; it and the device view (`kvmdp.trap.uffd.device_view`, which argues the races) know nothing of each other.

Shared memory only: a device view is a further mapping of the same pages.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence

from kvmdp.paging.ports import ForTraps
from kvmdp.trap.inspect import InspectedTrap, Picture
from kvmdp.trap.uffd.device_view import DeviceFaults, DeviceView


class HybridTrap:
    """An exit trap for the guest beside a device view for user space; owns both.

    `latencies` is empty, because it is about vCPUs, whose faults are exits: a device can time its own accesses.
    """

    latencies: Sequence[array[int]] = ()

    def __init__(self, name: str, vcpus: InspectedTrap, devices: DeviceFaults) -> None:
        self.name = name
        self._vcpus = vcpus
        self._devices = devices

    @property
    def device_view(self) -> DeviceView:
        """Guest RAM for threads of this process."""
        return self._devices.view

    @property
    def granule(self) -> int:
        """Bytes that the exit trap flips as one."""
        return self._vcpus.granule

    @property
    def needs_quiesce(self) -> bool:
        """What the exit trap needs: the device view's own part is exact without."""
        return self._vcpus.needs_quiesce

    @property
    def fill_view(self) -> memoryview:
        """The VMM view."""
        return self._vcpus.fill_view

    @property
    def ram_view(self) -> memoryview:
        """The VMM view."""
        return self._vcpus.ram_view

    @property
    def populate(self) -> Callable[[int, int], None] | None:
        """What the exit trap needs."""
        return self._vcpus.populate

    @property
    def memslots(self) -> int:
        """How many memslots RAM takes now."""
        return self._vcpus.memslots

    def arm(self, pager: ForTraps) -> None:
        """Make absent pages trap on both sides."""
        self._devices.arm(pager)
        self._vcpus.arm(pager)

    def disarm(self) -> None:
        """Make RAM plain memory on both sides."""
        self._vcpus.disarm()
        self._devices.disarm()

    def admit(self, first: int, count: int) -> None:
        """Let the guest in; a device that sleeps on the page is let in by its reader, or woken by the claim's end."""
        self._vcpus.admit(first, count)

    def revoke(self, first: int, count: int) -> None:
        """Shut out both: when this returns nobody can store into the pages any more."""
        self._devices.drop(first, count)
        self._vcpus.revoke(first, count)

    def forget(self, first: int, count: int) -> None:
        """Free the memory behind pages that neither side has mapped."""
        self._vcpus.forget(first, count)

    @property
    def collapses(self) -> bool:
        """What the exit trap can do."""
        return self._vcpus.collapses

    def collapse(self, first: int, count: int) -> bool:
        """Put together what vCPUs use; the device view is entered page by page, as devices touch it."""
        return self._vcpus.collapse(first, count)

    def reassert(self, first: int, count: int) -> bool:
        """Do what the exit trap does: a reader that finds a page unmapped maps it."""
        return self._vcpus.reassert(first, count)

    def picture(self) -> Picture:
        """What the exit trap has set up."""
        return self._vcpus.picture()

    def release_sleepers(self) -> None:
        """End the device view: whoever sleeps on an absent page wakes to an error."""
        self._devices.release()

    def settle(self, timeout: float) -> bool:
        """Do what the exit trap does: a device may be at a page for as long as the source takes."""
        return self._vcpus.settle(timeout)

    def hold_sleepers(self, absent: Iterable[tuple[int, int]]) -> None:
        """Do nothing but for the exit trap: a device view that has ended stays so."""
        self._vcpus.hold_sleepers(absent)

    def close(self) -> None:
        """End the device view, wait until no device is in an access, give everything back."""
        self._devices.close()
        self._vcpus.close()
