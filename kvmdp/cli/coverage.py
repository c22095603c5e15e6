"""`kvmdp compare --coverage`: each kind of access under each trap, run on this host."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from kvmdp.cli.output import EXIT_FAILED, EXIT_OK, check_json_target, say
from kvmdp.cli.result_files import ResultFiles
from kvmdp.lab.coverage import ACCESSES, Coverage, coverage, covered_traps
from kvmdp.lab.coverage_cell import Seen
from kvmdp.machine.hostinfo import host_facts

SCHEMA = "kvmdp.coverage/1"

_WIDTH = 100
_ACCESS_WIDTH = 14
_CELL_WIDTH = 23  # "completed by emulation" and a space
_ABSENT = "-"


def run_coverage(options: argparse.Namespace) -> int:
    """Run all cells, print the table or write `options.json`, return the exit status."""
    check_json_target(options.json)
    table = coverage(lambda access, trap: say(f"{access} under {trap}"))
    document = _document(table)
    if options.json != "-":
        _print(document)
    files = ResultFiles()
    files.json(options.json, document)
    return files.settle(EXIT_OK if table.ok else EXIT_FAILED)


def _document(table: Coverage) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "ok": table.ok,
        "host": host_facts(),
        "accesses": list(ACCESSES),
        "traps": covered_traps(),
        "skipped": table.skipped,
        "cells": [
            {
                "access": cell.access,
                "trap": cell.trap,
                "seen": cell.seen.value,
                "exits": cell.exits,
                "exact": cell.exact,
                "note": cell.note,
            }
            for cell in table.cells
        ],
    }


def _print(document: dict[str, Any]) -> None:
    """Print the table, and beneath it what the cells have to say."""
    host = document["host"]
    paging = "nested paging" if host["nested_paging"] else "shadow paging"
    print(f"{host['kernel']}, {host['kvm']} with {paging}: what became of an access to an absent page\n")
    _print_row("access", document["traps"])
    seen = {(cell["access"], cell["trap"]): cell["seen"] for cell in document["cells"]}
    for access in document["accesses"]:
        _print_row(access, [seen.get((access, trap), _ABSENT) for trap in document["traps"]])
    print()
    for text, where in _notes(document["cells"]).items():
        _print_wrapped(f"{', '.join(where)}: {text}")
    for trap, reason in document["skipped"].items():
        _print_wrapped(f"{trap} was skipped: {reason}")
    exact = sum(cell["exact"] for cell in document["cells"])
    print(f"\nexact bytes in {exact} of {len(document['cells'])} cells")
    print(f"not missed: {', '.join(_tallies(document))}")
    if not document["ok"]:
        print("FAILED: an access that must be caught was not")


def _tallies(document: dict[str, Any]) -> list[str]:
    """Return for each trap how many kinds of access it did not miss: "marker 8 of 11"."""
    tallies = []
    for trap in document["traps"]:
        cells = [cell for cell in document["cells"] if cell["trap"] == trap]
        caught = sum(cell["seen"] != Seen.MISSED.value for cell in cells)
        if cells:
            tallies.append(f"{trap} {caught} of {len(cells)}")
    return tallies


def _print_row(access: str, cells: list[str]) -> None:
    print((f"{access:<{_ACCESS_WIDTH}}" + "".join(f"{cell:<{_CELL_WIDTH}}" for cell in cells)).rstrip())


def _print_wrapped(text: str) -> None:
    print(textwrap.fill(text, _WIDTH, subsequent_indent="    ", break_on_hyphens=False))


def _notes(cells: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return each note with the cells it is about: "read, write under mmio"."""
    traps: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell["note"]:
            traps.setdefault((cell["note"], cell["access"]), []).append(cell["trap"])
    accesses: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (note, access), where in traps.items():
        accesses.setdefault((note, tuple(where)), []).append(access)
    notes: dict[str, list[str]] = {}
    for (note, under), names in accesses.items():
        place = "" if len(under) == len(covered_traps()) else f" under {', '.join(under)}"
        notes.setdefault(note, []).append(f"{', '.join(names)}{place}")
    return notes
