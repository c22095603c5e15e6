"""The comparison as text: a table for the terminal, and the lines that the kernel's demand_paging_test prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from kvmdp.bench.report.results import Document, Results, latency_name, vcpus_name
from kvmdp.bench.report.scale import memory

WIDTH = 100
_NAME = 40  # no contender's name takes more columns than this
_RATE, _RATIO, _OWN = 12, 8, 8


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
    return lines + [line for text in results.missing() for line in _fold(text)]


def claim_lines(document: Document) -> list[str]:
    """Return the claims with their verdicts, folded to WIDTH columns."""
    lines = []
    for each in document["claims"]:
        indent = " " * 11
        heading = f"{each['verdict']:<10} {each['who']}: {each['claim']}"
        lines += _wrap(heading, "", indent)
        lines += _wrap(each["why"], indent + "  ", indent + "  ")
    return lines


def _fold(text: str) -> list[str]:
    return _wrap(text, "", "  ")


def _wrap(text: str, first: str, rest: str) -> list[str]:
    # Names such as memory-fault stay whole.
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _block(results: Results, latency: float) -> Iterator[str]:
    """Return the lines of one latency; what does not fit beside each other stands below."""
    counts = [
        vcpus for vcpus in results.vcpus if any(results.entry(n, vcpus, latency) for n in results.contenders)
    ]
    rows = [*results.contenders, *(_floor_name(results.trap(name)) for name in results.paging)]
    width = min(max(len(row) for row in rows), _NAME)
    most = (WIDTH - width - _OWN) // (_RATE + _RATIO)
    for start in range(0, len(counts), most):
        yield from _part(results, latency, counts[start : start + most], width)


def _part(results: Results, latency: float, counts: Sequence[int], width: int) -> Iterator[str]:
    owns = [_has_own(vcpus, latency) for vcpus in counts]
    widths = [_RATE + _RATIO + _OWN * own for own in owns]
    sizes = dict.fromkeys(
        bench["options"]["bytes_per_vcpu"]
        for bench in results.document["benches"]
        if float(bench["options"]["latency"]) == latency
    )
    yield f"{latency_name(latency)}, {' or '.join(memory(size / 1024) for size in sizes)} a vCPU"
    yield f"{'':<{width}}" + "".join(f"{vcpus_name(v):>{w}}" for v, w in zip(counts, widths, strict=True))
    heads = (f"{'pages/s':>{_RATE}}{'x uffd':>{_RATIO}}" + f"{'own us':>{_OWN}}" * own for own in owns)
    yield f"{'contender':<{width}}" + "".join(heads)
    for name in results.contenders:
        shown = name if len(name) <= width else name[: width - 2] + ".."
        yield f"{shown:<{width}}" + "".join(_cell(results, name, vcpus, latency) for vcpus in counts)
    for trap in dict.fromkeys(results.trap(name) for name in results.paging):
        floors = [results.floor(trap, vcpus, latency) for vcpus in counts]
        if any(floors):
            cells = (f"{floor['median']:.1f} us" if floor else "-" for floor in floors)
            row = "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
            yield f"{_floor_name(trap):<{width}}{row}"


def _floor_name(trap: str | None) -> str:
    return f"floor of {trap}"


def _has_own(vcpus: int, latency: float) -> bool:
    """Whether own cost says something: where faults overlap or wait for a network, time a page less floor does not."""
    return vcpus == 1 and not latency


def _cell(results: Results, name: str, vcpus: int, latency: float) -> str:
    entry, ratio = results.entry(name, vcpus, latency), results.ratio(name, vcpus, latency)
    own = entry["own_cost_us"] if entry else None
    rate = f"{entry['pages_per_second']['median']:,.0f}" if entry else "-"
    partial = entry is not None and len(set(results.rounds(name, vcpus, latency))) > 1
    cells = [
        (rate + "*" if partial else rate + " ").rjust(_RATE),
        (f"{ratio['median']:.2f}" if ratio else "-").rjust(_RATIO),
    ]
    if _has_own(vcpus, latency):
        cells.append((f"{own['median']:.1f}" if own else "-").rjust(_OWN))
    return "".join(cells)


def lines(entry: Document) -> list[str]:
    """Return what demand_paging_test prints, of a contender of a bench document, under the contender's name.

    The words, tabs included, are those of the kernel's tools/testing/selftests/kvm/demand_paging_test.c. The figures
    are those of the round with the median rate (the lower of two in the middle).
    """
    rounds = sorted(entry["rounds"], key=lambda each: float(each["pages"] / each["seconds"]))
    middle = rounds[(len(rounds) - 1) // 2]
    rate = middle["pages"] / middle["seconds"]
    return [
        entry["name"],
        f"Total guest execution time:\t{middle['seconds']:.9f}s",
        f"Per-vcpu demand paging rate:\t{rate / entry['vcpus']:.6f} pgs/sec/vcpu",
        f"Overall demand paging rate:\t{rate:.6f} pgs/sec",
    ]
