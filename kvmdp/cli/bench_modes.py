"""The modes of `kvmdp bench` that have work of their own: `--huge` and `--memory-cost`; and how bounds are held."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from kvmdp.bench import huge, memorycost
from kvmdp.bench.check import Bound, judge
from kvmdp.bench.contender import Contender
from kvmdp.bench.losses import Losses
from kvmdp.bench.work import Work
from kvmdp.cli.output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_LACKING, EXIT_OK, say
from kvmdp.cli.result_files import ResultFiles


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
    losses = Losses()
    interrupted = False
    try:
        for each in contenders:
            row = losses.spare(each.name, functools.partial(memorycost.memory_cost, each))
            if row is not None:
                rows.append(row)
                say(f"measured {each.name}")
    except KeyboardInterrupt:
        interrupted = True
    complete = not interrupted and not losses.failed
    document = memorycost.document(work, rows, losses, complete=complete)
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
    status = say_losses(document["skipped"], document["failed"])
    if interrupted:
        return files.settle(EXIT_INTERRUPTED)
    if status == EXIT_OK:
        status = hold(bounds, document) if document["contenders"] else EXIT_LACKING
    return files.settle(status)


def say_losses(skipped: dict[str, str], failed: dict[str, str]) -> int:
    """Say which contenders took no part and why; EXIT_FAILED if a run of one has failed."""
    for name, reason in skipped.items():
        say(f"skipped {name}: {reason}")
    for name, reason in failed.items():
        say(f"FAILED {name}: {reason}")
    return EXIT_FAILED if failed else EXIT_OK


def hold(bounds: list[Bound], document: dict[str, Any]) -> int:
    """Say how each bound fares; EXIT_FAILED if one does not hold."""
    status = EXIT_OK
    for bound in bounds:
        good, sentence = judge(bound, document)
        say(f"{'ok' if good else 'FELL SHORT'}: {sentence}")
        if not good:
            status = EXIT_FAILED
    return status
