"""`kvmdp probe`: what this host can do, and for what it cannot, the one command that mends it."""

from __future__ import annotations

import argparse
from typing import Any

from kvmdp.cli.output import EXIT_LACKING, EXIT_OK, check_json_target
from kvmdp.cli.paths import check_distinct, writes
from kvmdp.cli.result_files import ResultFiles
from kvmdp.kvm import Kvm, KvmError
from kvmdp.lab.probe import ACCESSES, NO_HUGE_PAGE, capabilities, proofs, userfaultfd_facts, works
from kvmdp.machine.hostinfo import host_facts, huge_page_pools
from kvmdp.memory.backings import BACKINGS
from kvmdp.memory.hugepages import how_to_reserve
from kvmdp.size import format_size
from kvmdp.trap.registry import TRAPS

SCHEMA = "kvmdp.probe/1"
_REFUSED, _UNTESTED = (
    "-",
    "untested",
)  # cells of the table; the first is a trap that is not made for such memory
_BACKING = "memfd"  # of a run that names none
_UFFD = "userfaultfd for kernel faults"
_DEFAULT_MEMORY = 64 << 20  # RAM of a run that names no size: huge pages for it are enough for a proof, too


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "probe",
        allow_abbrev=False,
        help="what this host can do",
        description="Prove each trap with a micro guest on this host. Exit status 0 if one works, else 4.",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the result as JSON to FILE, - is stdout (default: no JSON)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Probe, print, return the exit status."""
    check_distinct(writes("--json", options.json))
    check_json_target(options.json)
    document = probe_document()
    if options.json != "-":
        print_document(document)
    files = ResultFiles()
    files.json(options.json, document)
    return files.settle(EXIT_OK if document["ok"] else EXIT_LACKING)


def probe_document() -> dict[str, Any]:
    """Return all that is to be known, as the JSON document has it."""
    document: dict[str, Any] = {"schema": SCHEMA, "ok": False, "host": host_facts()}
    try:
        with Kvm() as kvm:
            document["capabilities"] = capabilities(kvm)
        found = {trap: {backing: proofs(trap, backing) for backing in BACKINGS} for trap in TRAPS}
    except KvmError as error:
        document["error"] = str(error)
        document["verdict"] = f"no trap works here: {error}"
        document["missing"] = [{"what": "/dev/kvm", "why": error.call, "remedy": error.remedy}]
        return document
    document["traps"] = {
        trap: {
            backing: {
                proof.access: {
                    "ok": proof.ok,
                    "status": proof.status,
                    "exits": proof.exits,
                    "error": proof.error,
                }
                for proof in trap_proofs
            }
            for backing, trap_proofs in backings.items()
        }
        for trap, backings in found.items()
    }
    document["working"] = [
        trap
        for trap, kind in TRAPS.items()
        if kind.exits and any(works(trap, backing) for backing in BACKINGS)
    ]
    document["ok"] = bool(document["working"])
    document["userfaultfd"] = userfaultfd_facts()
    document["hugepages"] = [{"size_bytes": size, **counts} for size, counts in huge_page_pools().items()]
    document["verdict"] = _verdict(document["working"])
    document["missing"] = _missing(document)
    return document


def _verdict(working: list[str]) -> str:
    """Return in a line what to use on this host; `working` are the exit-style traps that are proven."""
    others = [trap for trap in TRAPS if trap not in working and any(works(trap, name) for name in BACKINGS)]
    count = f"{len(working) + len(others)} of {len(TRAPS)} traps work here"
    if not working:
        return f"use none: {count}" if not others else f"use {others[0]}, which has no exits: {count}"
    best = next((trap for trap in working if works(trap, _BACKING)), None)
    if best is None:
        backing = next(name for name in BACKINGS if works(working[0], name))
        return f"use {working[0]} on {backing}: {count}"
    return f"use {best}: {count}"


def _missing(document: dict[str, Any]) -> list[dict[str, str]]:
    """Return what this host lacks, each with why it is lacking and the command that mends it; no command twice."""
    failed = _failed(document["traps"])
    uffd = document["userfaultfd"]
    missing = []
    if not uffd["kernel_faults"]:
        traps = failed.pop(f"{uffd['error']}: {uffd['remedy']}", [])
        missing.append(_lack([*traps, _UFFD], uffd["error"], uffd["remedy"]))
    missing += [_lack(traps, why, "") for why, traps in failed.items()]
    not_run = _not_run(document["traps"])
    for pool in document["hugepages"]:
        size = pool["size_bytes"]
        untested = [
            name
            for name, why in not_run.items()
            if why.startswith(NO_HUGE_PAGE) and BACKINGS[name].page_size == size
        ]
        if pool["total"] and not untested:
            continue
        for name in untested:
            del not_run[name]
        what = f"{format_size(size)} huge pages"
        if untested:
            what += f", for a proof on {' and '.join(untested)}"
        why = "none is free" if pool["total"] else "none are reserved"
        count = max(_DEFAULT_MEMORY // size, 1)
        enough = (
            f"{count} more {'is' if count == 1 else 'are'} enough for a run on {format_size(count * size)}"
        )
        missing.append(_lack([what], f"{why}; {enough} (needs root)", how_to_reserve(size, count)))
    for name, why in not_run.items():
        reason, _, remedy = why.partition(": ")
        missing.append(_lack([f"a proof on {name}"], reason, remedy))
    return missing


def _lack(what: list[str], why: str, remedy: str) -> dict[str, str]:
    return {"what": "; ".join(what), "why": why, "remedy": remedy}


def _failed(traps: dict[str, Any]) -> dict[str, list[str]]:
    """Return which traps have failed, in words, by the reason."""
    found: dict[str, dict[str, list[str]]] = {}
    for trap, backings in traps.items():
        for backing, accesses in backings.items():
            errors: dict[str, list[str]] = {}
            for access, proof in accesses.items():
                if proof["status"] == "failed":
                    errors.setdefault(proof["error"], []).append(access)
            for error, which in errors.items():
                some = "" if len(which) == len(accesses) else f" ({', '.join(which)})"
                found.setdefault(error, {}).setdefault(trap, []).append(backing + some)
    return {
        why: [f"trap {trap} on {', '.join(backings)}" for trap, backings in each.items()]
        for why, each in found.items()
    }


def _not_run(traps: dict[str, Any]) -> dict[str, str]:
    """Return the backings on which some trap was not tried at all, with the reason."""
    found: dict[str, str] = {}
    for backings in traps.values():
        for backing, accesses in backings.items():
            proofs_of = list(accesses.values())
            if all(proof["status"] == "not run" for proof in proofs_of):
                found.setdefault(backing, proofs_of[0]["error"])
    return found


def print_document(document: dict[str, Any]) -> None:
    """Print the result for people: what to use, what works, what is missing, and last what the host is."""
    print(document["verdict"])
    if "error" not in document:
        _print_table(document["traps"])
        _print_missing(document["missing"])
    print()
    _print_host(document)


def _print_table(traps: dict[str, Any]) -> None:
    """Print a row a backing on which something was tried, and a column a trap."""
    backings = list(next(iter(traps.values())))
    rows = {backing: {trap: _cell(traps[trap][backing]) for trap in traps} for backing in backings}
    shown = {
        backing: cells for backing, cells in rows.items() if not set(cells.values()) <= {_REFUSED, _UNTESTED}
    }
    print(f"\n{'backing':<20}{''.join(f'{trap:<14}' for trap in traps)}".rstrip())
    for backing, cells in shown.items():
        print(f"{backing:<20}{''.join(f'{cell:<14}' for cell in cells.values())}".rstrip())
    *accesses, last = ACCESSES
    kinds = f"{', '.join(accesses)} and {last}"
    print(f"exact: every {kinds} access to absent memory trapped and got the source's bytes.")
    for why in _left_out(traps):
        print(f"exact, N of {len(ACCESSES)}: the other accesses were left out, for {why}.")
    print("`-` marks an unsupported combination; below the table, probe says what each untested one lacks.")


def _left_out(traps: dict[str, Any]) -> list[str]:
    """Return why some accesses were not tried where others were."""
    return sorted(
        {
            proof["error"]
            for backings in traps.values()
            for accesses in backings.values()
            for proof in accesses.values()
            if proof["status"] == "not run" and _cell(accesses).startswith("exact")
        }
    )


def _cell(accesses: dict[str, Any]) -> str:
    """Return in a word what came of a trap on a backing; "NO" if any access came out wrong."""
    statuses = [proof["status"] for proof in accesses.values()]
    if set(statuses) == {"refused"}:
        return _REFUSED
    if set(statuses) == {"not run"}:
        return _UNTESTED
    if "failed" in statuses:
        return "NO"
    return "exact" if set(statuses) == {"exact"} else f"exact, {statuses.count('exact')} of {len(statuses)}"


def _print_missing(missing: list[dict[str, str]]) -> None:
    if missing:
        print("\nmissing")
    for lack in missing:
        remedy = f"\n    {lack['remedy']}" if lack["remedy"] else ""
        print(f"  {lack['what']}: {lack['why']}{remedy}")


def _print_host(document: dict[str, Any]) -> None:
    host = document["host"]
    paging = "nested paging" if host["nested_paging"] else "shadow paging"
    print(f"host        {host['cpu']}, {host['cpus']} CPUs, {format_size(host['memory_bytes'] >> 20 << 20)}")
    print(
        f"kernel      {host['kernel']}, {host['kvm']} with {paging}, THP {host['thp']} (shmem {host['thp_shmem']})"
    )
    if "error" in document:
        return
    print("capability  " + ", ".join(f"{name} {value}" for name, value in document["capabilities"].items()))
    uffd = document["userfaultfd"]
    kind = "all faults" if uffd["kernel_faults"] else "user-mode faults only" if uffd["available"] else "none"
    print(f"userfaultfd {kind}; features {', '.join(uffd['features']) or 'none'}")
    for pool in document["hugepages"]:
        print(
            f"huge pages  {format_size(pool['size_bytes'])}: {pool['free']} free of {pool['total']} reserved"
        )
