"""The comparison as text: a table for the terminal, and the lines that the kernel's demand_paging_test prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from kvmdp.bench.report.results import Document, Results, latency_name, vcpus_name

WIDTH = 100
_NAME = 40  # no contender's name takes more columns than this
_CELL = 25  # pages/s 11, ratio 7, own cost 7


def table(document: Document) -> list[str]:
    """Return the lines of the terminal's table of a comparison document, none over WIDTH columns."""
    results = Results(document)
    lines: list[str] = []
    for latency in results.latencies:
        lines += [*_block(results, latency), ""]
    if results.contenders:
        lines += _fold(
            "x uffd: median of the ratios to userfaultfd with one reader, round by round. own: us a page above the "
            "floor, the cost of a bare fault exit. *: fewer rounds than planned. -: not measured."
        )
    lines += [line for text in results.missing() for line in _fold(text)]
    return lines


def claim_lines(document: Document) -> list[str]:
    """Return the claims with their verdicts, folded to WIDTH columns."""
    lines = []
    for each in document["claims"]:
        lines += _fold(f"{each['verdict']:<10} {each['who']}: {each['claim']}")
        lines += textwrap.wrap(each["why"], WIDTH, initial_indent=" " * 11, subsequent_indent=" " * 11)
    return lines


def _fold(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")


def _block(results: Results, latency: float) -> Iterator[str]:
    """Return the lines of one latency; where the vCPU counts need more columns than there are, one part below another."""
    present = [vcpus for vcpus in results.vcpus if any(results.entry(n, vcpus, latency) for n in results.contenders)]
    width = min(max(len(name) for name in results.contenders), _NAME)
    most = (WIDTH - width) // _CELL
    for start in range(0, len(present), most):
        yield from _part(results, latency, present[start : start + most], width)


def _part(results: Results, latency: float, counts: Sequence[int], width: int) -> Iterator[str]:
    yield latency_name(latency)
    yield f"{'':<{width}}" + "".join(f"{vcpus_name(vcpus):>{_CELL}}" for vcpus in counts)
    yield f"{'contender':<{width}}" + f"{'pages/s':>11}{'x uffd':>7}{'own':>7}" * len(counts)
    for name in results.contenders:
        shown = name if len(name) <= width else name[: width - 2] + ".."
        yield f"{shown:<{width}}" + "".join(_cell(results, name, vcpus, latency) for vcpus in counts)
    for trap in dict.fromkeys(results.trap(name) for name in results.paging):
        floors = [results.floor(trap, vcpus, latency) for vcpus in counts]
        if any(floors):
            cells = (f"{floor['median']:.1f}" if floor else "-" for floor in floors)
            yield f"{f'floor {trap}, us':<{width}}"[:_NAME] + "".join(f"{cell:>{_CELL}}" for cell in cells)


def _cell(results: Results, name: str, vcpus: int, latency: float) -> str:
    entry = results.entry(name, vcpus, latency)
    if entry is None:
        return f"{'-':>10} {'-':>7}{'-':>7}"
    done, planned = results.rounds(name, vcpus, latency)
    rate = f"{entry['pages_per_second']['median']:,.0f}"
    ratio, own = results.ratio(name, vcpus, latency), entry["own_cost_us"]
    return (
        f"{rate:>10}{'*' if done < planned else ' '}"
        + (f"{ratio['median']:>7.2f}" if ratio else f"{'-':>7}")
        + (f"{own['median']:>7.1f}" if own else f"{'-':>7}")
    )


def lines(bench: Document) -> list[str]:
    """Return what demand_paging_test would print of each contender of a bench document (kvmdp.bench/1).

    The figures are those of the round with the median rate (the lower of two in the middle).
    """
    printed = []
    for entry in bench["contenders"]:
        rounds = sorted(entry["rounds"], key=lambda each: float(each["pages"] / each["seconds"]))
        middle = rounds[(len(rounds) - 1) // 2]
        rate = middle["pages"] / middle["seconds"]
        printed += [
            entry["name"],
            f"Total guest execution time: {middle['seconds']:.9f}s",
            f"Per-vcpu demand paging rate: {rate / entry['vcpus']:.6f} pgs/sec/vcpu",
            f"Overall demand paging rate: {rate:.6f} pgs/sec",
        ]
    return printed
