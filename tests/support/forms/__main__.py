"""Prints what differs under a trap: python -m forms --trap mmio --ring 0."""

import argparse
import sys
import time
from pathlib import Path

from kvmdp.memory.backings import BACKINGS

from .form import PAGE
from .named import NAMED
from .survey import chosen, program, survey
from .trapped import Setting


def main() -> int:
    """Return 0 if nothing differs, else 1."""
    parser = argparse.ArgumentParser(
        prog="forms", description="Run instruction forms under a trap and print what differs."
    )
    option = parser.add_argument
    option("--trap", help="memory-fault, marker, mmio, layered or userfaultfd")
    option("--ring", type=int, default=3, choices=(0, 3))
    option("--vcpus", type=int, default=1, choices=(1, 2), help="2: both run each form at the same time")
    option("--rounds", type=int, default=1, help="how often each case is run (default: 1)")
    option(
        "--only", default="*", metavar="PATTERN", help="forms whose names match, as a shell would: 'rep ins*'"
    )
    option("--backing", default="memfd", help="what RAM is made of (default: memfd)")
    option("--resident-limit", type=int, metavar="PAGES", help="keep to so many pages of RAM")
    option("--fresh", action="store_true", help="a machine of its own for each case")
    option("--poisoned", action="store_true", help="pages are poisoned instead of absent")
    option("--evicted", action="store_true", help="pages are evicted while forms run")
    option("--quick", action="store_true", help="only the forms that stand for the others")
    option("--skipped", action="store_true", help="print the forms that cannot be run here, and why")
    option(
        "--assemble",
        metavar="FOLDER",
        help="only write the guest programs there, for KVMDP_PROGRAMS where there is no binutils",
    )
    options = parser.parse_args()
    if options.assemble:
        _assemble(Path(options.assemble))
        return 0
    if not options.trap:
        parser.error("which trap? Give --trap")
    forms = chosen(options.only, quick=options.quick)
    if not forms:
        parser.error(f"no form is named {options.only}")
    setting = _setting(options)
    began = time.perf_counter()
    found = survey(setting, options.ring, forms, options.rounds)
    for name, words in found.different.items():
        print(f"{name}: {words}")
    for name, words in found.known.items():
        print(f"known: {name}: {words}")
    if options.skipped:
        for name, why in found.skipped.items():
            print(f"skipped: {name}: {why}")
    numbers = [
        f"{found.cases} cases",
        f"{found.touched} of them touch an absent page",
        f"{len(found.different)} different",
        f"{len(found.known)} known to be",
        f"{len(found.skipped)} forms skipped",
        f"{time.perf_counter() - began:.1f} s",
    ]
    print(f"{options.trap}, ring {options.ring}, {options.vcpus} vCPU: {', '.join(numbers)}")
    return 1 if found.different else 0


def _setting(options: argparse.Namespace) -> Setting:
    limit = options.resident_limit and options.resident_limit * PAGE
    machine = {"backing": options.backing, "resident_limit": limit}
    if BACKINGS[options.backing].page_size > PAGE:
        machine["reserve_hugepages"] = True
    return Setting(options.trap, options.vcpus, machine, options.fresh, options.poisoned, options.evicted)


def _assemble(folder: Path) -> None:
    (folder / "forms.bin").write_bytes(program())
    for guest in NAMED:
        (folder / f"{guest.name}.bin").write_bytes(guest.program())


sys.exit(main())
