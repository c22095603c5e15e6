"""`kvmdp probe`: what this host can do, and for what it cannot, the one command that mends it."""

from __future__ import annotations

import argparse
import os
from typing import Any

from kvmdp.cli.output import EXIT_LACKING, EXIT_OK, check_json_target
from kvmdp.cli.paths import check_distinct, writes
from kvmdp.cli.result_files import ResultFiles
from kvmdp.kvm import Kvm, KvmError
from kvmdp.lab.probe import ACCESSES, Status, capabilities, proofs, userfaultfd_facts, works
from kvmdp.machine.hostinfo import host_facts, huge_page_pools
from kvmdp.memory.backings import BACKINGS
from kvmdp.size import format_size
from kvmdp.trap.registry import TRAPS

SCHEMA = "kvmdp.probe/1"
# A cell of the table; "refused" is a trap that is not made for such memory.
_CELLS: dict[Status, str] = {"exact": "exact", "failed": "NO", "not run": "not run", "refused": "-"}


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
    document["missing"] = _missing(document)
    return document


def _missing(document: dict[str, Any]) -> list[dict[str, str]]:
    """Return what this host lacks, each with why it is lacking and the command that mends it."""
    failed: dict[str, dict[str, list[str]]] = {}
    not_run: dict[str, str] = {}
    for trap, backings in document["traps"].items():
        for backing, accesses in backings.items():
            errors = {access["error"] for access in accesses.values() if access["status"] == "failed"}
            if errors:
                failed.setdefault("; ".join(sorted(errors)), {}).setdefault(trap, []).append(backing)
            if all(access["status"] == "not run" for access in accesses.values()):
                not_run[backing] = next(access["error"] for access in accesses.values())
    missing = [
        {
            "what": "; ".join(f"trap {trap} on {', '.join(backings)}" for trap, backings in traps.items()),
            "why": why,
            "remedy": "",
        }
        for why, traps in failed.items()
    ]
    for backing, why in not_run.items():
        reason, _, remedy = why.partition(": ")
        missing.append({"what": f"a proof on {backing}", "why": reason, "remedy": remedy})
    uffd = document["userfaultfd"]
    if not uffd["kernel_faults"]:
        missing.append(
            {"what": "userfaultfd for kernel faults", "why": uffd["error"], "remedy": uffd["remedy"]}
        )
    for pool in document["hugepages"]:
        if not pool["total"]:
            size = format_size(pool["size_bytes"])
            kib = pool["size_bytes"] // 1024
            prefix = "" if os.geteuid() == 0 else "sudo "
            path = f"/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages"
            missing.append(
                {
                    "what": f"{size} huge pages",
                    "why": "none are reserved",
                    "remedy": f"echo N | {prefix}tee {path}",
                }
            )
    return missing


def print_document(document: dict[str, Any]) -> None:
    """Print the result for people."""
    host = document["host"]
    paging = "nested paging" if host["nested_paging"] else "shadow paging"
    print(f"host        {host['cpu']}, {host['cpus']} CPUs, {format_size(host['memory_bytes'] >> 20 << 20)}")
    print(
        f"kernel      {host['kernel']}, {host['kvm']} with {paging}, THP {host['thp']} (shmem {host['thp_shmem']})"
    )
    if "error" in document:
        print(f"/dev/kvm    {document['error']}")
        return
    print("capability  " + ", ".join(f"{name} {value}" for name, value in document["capabilities"].items()))
    uffd = document["userfaultfd"]
    kind = "all faults" if uffd["kernel_faults"] else "user-mode faults only" if uffd["available"] else "none"
    print(f"userfaultfd {kind}; features {', '.join(uffd['features']) or 'none'}")
    for pool in document["hugepages"]:
        print(
            f"huge pages  {format_size(pool['size_bytes'])}: {pool['free']} free of {pool['total']} reserved"
        )
    print()
    print(f"{'trap':<14}{'backing':<20}" + "".join(f"{access:<10}" for access in ACCESSES) + "exits seen")
    for trap, backings in document["traps"].items():
        for backing, accesses in backings.items():
            kinds = {kind for access in accesses.values() for kind in access["exits"]}
            cells = "".join(f"{_CELLS[access['status']]:<10}" for access in accesses.values())
            print(f"{trap:<14}{backing:<20}{cells}{', '.join(sorted(kinds))}".rstrip())
    if document["missing"]:
        print("\nmissing")
        for lack in document["missing"]:
            remedy = f"\n    {lack['remedy']}" if lack["remedy"] else ""
            print(f"  {lack['what']}: {lack['why']}{remedy}")
