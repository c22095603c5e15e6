"""Poisoned pages in a run: putting them there, and what the guest must say of them afterwards.

Units: RAM pages; gpa in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvmdp.abi import userfaultfd as abi
from kvmdp.errors import UnsupportedError
from kvmdp.machine.guest_abi import MC_ADDRESSES, ParameterBlock
from kvmdp.machine.machine import Machine
from kvmdp.machine.workloads.arithmetic import Pages
from kvmdp.page import PAGE_SIZE
from kvmdp.size import format_size
from kvmdp.trap.uffd.descriptor import supported_features
from kvmdp.trap.uffd.userfaultfd import NO_POISON, UserfaultfdTrap


@dataclass(frozen=True, slots=True)
class PoisonResult:
    """What came of the poisoned pages of a run; gpas, ascending.

    `pages` are those that were poisoned, `expected` those of which the guest must have had a machine check, exactly one
    each: None for a program of the user's own. `machine_checks` and `addresses` are what it says it had.
    """

    pages: list[int]
    expected: list[int] | None
    machine_checks: int
    addresses: list[int]

    @property
    def ok(self) -> bool:
        """Whether the guest had the machine checks it must have had, and no other."""
        return self.expected is None or (
            self.addresses == self.expected and self.machine_checks == len(self.expected)
        )


def check_poison(poisoned: Pages, touched: Pages | None, unit: int) -> None:
    """Raise ValueError if the guest touches more poisoned pages than it can tell of.

    `unit` is in pages: what a trap cannot poison but as a whole. `touched` None is a program of the user's own: nothing
    is expected of it, so there is nothing to refuse.
    """
    if touched is None:
        return
    firsts = np.unique(poisoned // unit)
    told = np.count_nonzero(np.isin(touched // unit, firsts))
    if told > MC_ADDRESSES:
        raise ValueError(
            f"with {len(firsts)} x {format_size(unit * PAGE_SIZE)} poisoned the guest touches {told} poisoned pages, "
            f"and it can tell of {MC_ADDRESSES}: poison fewer, let it touch fewer, or take another trap or granule"
        )


def poison_pages(machine: Machine, pages: Pages, touched: Pages | None) -> Pages:
    """Poison pages before the guest runs; returns them with what the trap had to poison along, ascending.

    `touched` are the pages that the guest accesses, None if that is not known.
    Raises UnsupportedError if the guest could not be told, ValueError as `check_poison`.
    """
    if not len(pages):
        return pages
    if not machine.has_machine_checks:
        raise UnsupportedError(
            "a guest cannot be told of poisoned pages: this kernel's KVM has no recoverable machine checks "
            "(KVM_CAP_MCE, MCG_SER_P); use another kernel"
        )
    if machine.pager.trap.name == UserfaultfdTrap.name and not supported_features() & abi.UFFD_FEATURE_POISON:
        raise UnsupportedError(NO_POISON)
    unit = machine.pager.ledger.unit
    check_poison(pages, touched, unit)
    runs = [machine.pager.poison(page) for page in (np.unique(pages // unit) * unit).tolist()]
    return np.concatenate([np.arange(first, first + count) for first, count in runs])


def poison_result(
    machine: Machine, poisoned: Pages, touched: Pages | None, blocks: Sequence[ParameterBlock]
) -> PoisonResult:
    """Return what the vCPUs' `blocks` say of the `poisoned` pages.

    `touched` are the pages that the guest accesses, None if that is not known.
    """

    def gpas(pages: Pages) -> list[int]:
        return sorted(machine.layout.gpa_of_page(page) for page in pages.tolist())

    addresses: list[int] = []
    for block in blocks:
        addresses += block.mc_addresses[: min(block.mc_count, MC_ADDRESSES)]
    return PoisonResult(
        pages=gpas(poisoned),
        expected=None if touched is None else gpas(np.intersect1d(poisoned, touched)),
        machine_checks=sum(block.mc_count for block in blocks),
        addresses=sorted(addresses),
    )
