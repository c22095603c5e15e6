"""The modes of `kvmdp bench` that have work of their own: `--huge` and `--memory-cost`; and how bounds are held."""

from __future__ import annotations

import argparse
from typing import Any

from kvmdp.bench import huge, memorycost
from kvmdp.bench.check import Bound, judge
from kvmdp.bench.contender import Contender
from kvmdp.bench.work import Work
from kvmdp.cli.output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_LACKING, EXIT_OK, say
from kvmdp.cli.result_files import ResultFiles
from kvmdp.kvm import KvmError
from kvmdp.paging.fault import UnsupportedError


def run_huge(
    options: argparse.Namespace, work: Work, contenders: list[Contender], bounds: list[Bound]
) -> int:
    """Compare faults on HugeTLB memory, print, hold against bounds; the exit status."""
    comparison = huge.HugeComparison(work, contenders, options.rounds)
    interrupted = False
    try:
        comparison.run(options.warm_up, lambda name, turn, what: say(f"round {turn + 1}: {name}, {what}"))
    except KeyboardInterrupt:
        interrupted = True
    document = comparison.document()
    return _finish(options, document, huge.lines(document), bounds, interrupted=interrupted)


def run_memory_cost(
    options: argparse.Namespace, work: Work, contenders: list[Contender], bounds: list[Bound]
) -> int:
    """Measure what RAM costs in memory, print, hold against bounds; the exit status."""
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    interrupted = False
    try:
        for each in contenders:
            try:
                rows.append(memorycost.memory_cost(each))
                say(f"measured {each.name}")
            except (UnsupportedError, KvmError) as error:
                skipped[each.name] = str(error)
    except KeyboardInterrupt:
        interrupted = True
    document = memorycost.document(work, rows, skipped, complete=not interrupted)
    return _finish(options, document, memorycost.lines(document), bounds, interrupted=interrupted)


def _finish(
    options: argparse.Namespace,
    document: dict[str, Any],
    lines: list[str],
    bounds: list[Bound],
    *,
    interrupted: bool,
) -> int:
    """Write and print a document, say what was skipped, hold it against bounds; the exit status."""
    if interrupted:
        say("kvmdp: interrupted; what follows is partial")
    if options.json != "-":
        print("\n".join(lines))
    files = ResultFiles()
    files.json(options.json, document)
    for name, reason in document["skipped"].items():
        say(f"skipped {name}: {reason}")
    if interrupted:
        return files.settle(EXIT_INTERRUPTED)
    return files.settle(hold(bounds, document) if document["contenders"] else EXIT_LACKING)


def hold(bounds: list[Bound], document: dict[str, Any]) -> int:
    """Say how each bound fares; EXIT_FAILED if one does not hold."""
    status = EXIT_OK
    for bound in bounds:
        good, sentence = judge(bound, document)
        say(f"{'ok' if good else 'FELL SHORT'}: {sentence}")
        if not good:
            status = EXIT_FAILED
    return status
