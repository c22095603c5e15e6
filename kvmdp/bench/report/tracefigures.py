"""The figures drawn from traces: pages present over time, and the map of faults.

A record says when a fault was resolved (microseconds since the run's start), the faulting gpa, the bytes that became
present, the actor that touched it, and how long the handling took (kvmdp/bench/trace.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvmdp.bench.contender import PRESENT
from kvmdp.bench.report.chart import Chart, Point
from kvmdp.bench.report.figure import Figure, Table, Value
from kvmdp.bench.report.results import Document, Results, trace_name
from kvmdp.bench.report.scale import linear_ticks, memory, number
from kvmdp.page import PAGE_SIZE

# What a figure draws at most: of a map more is not seen, of a curve not needed.
_MAP_POINTS = 20_000
_CURVE_POINTS = 200
_SHARES = (10, 25, 50, 75, 90, 100)

_Floats = npt.NDArray[np.float64]


def _column(trace: Document, column: int) -> _Floats:
    return np.array([record[column] for record in trace["records"]], dtype=np.float64)


def _series(results: Results, name: str) -> int:
    """Return the number of a contender's colour: that of the other figures, for one they lack its own."""
    names = [
        *results.contenders,
        *(each for each in results.document["traces"] if each not in results.contenders),
    ]
    return names.index(name)


def _with_faults(results: Results) -> dict[str, Document]:
    return {name: trace for name, trace in results.document["traces"].items() if trace["records"]}


def _empty_traces(results: Results) -> list[str]:
    """Say which traces have no fault though they should."""
    traces = results.document["traces"]
    without = [name for name, trace in traces.items() if not trace["records"] and name != PRESENT]
    return [f"{name}: its trace has no fault." for name in without]


def pages_present(results: Results) -> Figure:
    """Pages present over time, all traced runs in one panel."""
    curves = {name: _curve(trace) for name, trace in _with_faults(results).items()}
    header = ["contender", "vCPUs", "pages at the end", *(f"{share} % after, us" for share in _SHARES)]
    rows: list[list[Value]] = []
    for name, (times, pages) in curves.items():
        reached = times[np.searchsorted(pages, pages[-1] * np.array(_SHARES) / 100)]
        vcpus = results.document["traces"][name]["vcpus"]
        rows.append([name, vcpus, int(pages[-1]), *(round(time, 1) for time in reached.tolist())])
    drawn = {name: _thin_curve(*curve) for name, curve in curves.items()}
    data: list[list[Value]] = [
        [name, time, int(count)] for name, curve in drawn.items() for time, count in curve
    ]
    return Figure(
        "pages-present",
        "Pages present over time",
        "One traced run of each contender. Tracing takes time itself: rates are those of untraced rounds. The table "
        "says when a share of the pages that became present in the end was there.",
        [_curves_panel(results, drawn)],
        Table(header, rows),
        Table(["contender", "time, us", "pages present"], data),
        _empty_traces(results),
    )


def _curves_panel(results: Results, curves: dict[str, list[Point]]) -> Chart:
    chart = Chart(
        "pages-present-1",
        "Pages present over time",
        "Lines: pages present against time since the start of the run, one line a contender.",
        250,
    )
    ends = [curve[-1] for curve in curves.values()]
    x_ticks = linear_ticks(max((time / 1e6 for time, _ in ends), default=0))
    y_ticks = linear_ticks(max((count for _, count in ends), default=0))
    x, y = chart.x_scale(0, x_ticks[-1]), chart.y_scale(0, y_ticks[-1])
    chart.x_axis(x, [(tick, number(tick)) for tick in x_ticks], "time since the start, s")
    chart.y_axis(y, [(tick, number(tick)) for tick in y_ticks], "pages present")
    if not curves:
        chart.empty("no fault was traced")
    for at, (name, curve) in enumerate(curves.items()):
        points = [(x(time / 1e6), y(count)) for time, count in curve]
        # A mark now and then, at another place for each, so that lines on top of each other are still told apart.
        spacing = max(len(points) // 5, 1)
        chart.line(points, _series(results, name), points[(1 + at * spacing // len(curves)) :: spacing])
    chart.legend([(name, _series(results, name)) for name in curves], "line")
    return chart


def _curve(trace: Document) -> tuple[_Floats, _Floats]:
    """Return the times of the faults (microseconds), in order, and the pages present after each."""
    times = _column(trace, 0)
    order = np.argsort(times, kind="stable")
    return times[order], np.cumsum(_column(trace, 2)[order] / PAGE_SIZE)


def _thin_curve(times: _Floats, pages: _Floats) -> list[Point]:
    """Return what is drawn of a curve: from the origin, evenly by fault, to the last one."""
    kept = np.unique(np.linspace(0, len(times) - 1, min(len(times), _CURVE_POINTS)).astype(np.int64))
    return [(0.0, 0.0), *zip(times[kept].tolist(), pages[kept].tolist(), strict=True)]


def fault_map(results: Results) -> Figure:
    """Where and when each fault was, coloured by the actor that touched the page; one panel a contender."""
    traces = _with_faults(results)
    origins = sorted({record[3] for trace in traces.values() for record in trace["records"]}, key=_order)
    panels = [
        _map_panel(index, name, trace, origins, _MAP_POINTS // len(traces))
        for index, (name, trace) in enumerate(traces.items(), 1)
    ]
    rows: list[list[Value]] = []
    data: list[list[Value]] = []
    for name, trace in traces.items():
        data += [[name, *record] for record in trace["records"]]
        for origin in origins:
            mine = [record for record in trace["records"] if record[3] == origin]
            if mine:
                gpas = [record[1] for record in mine]
                latencies = np.percentile([record[4] for record in mine], [50, 99])
                pages = sum(record[2] for record in mine) // PAGE_SIZE
                ends = (f"{min(gpas):#x}", f"{max(gpas):#x}")
                rows.append(
                    [name, origin, len(mine), pages, *ends, *(round(float(each), 2) for each in latencies)]
                )
    header = [
        "contender",
        "origin",
        "faults",
        "pages present",
        "lowest gpa",
        "highest gpa",
        "p50, us",
        "p99, us",
    ]
    return Figure(
        "fault-map",
        "Map of faults",
        "Each mark is a fault: when it was resolved and where in the guest's memory (gpa) it was. Colour and shape "
        "tell the actor that touched the page. The CSV has every fault.",
        panels,
        Table(header, rows),
        Table(
            ["contender", "time, us", "gpa", "bytes present", "origin", "latency, us", "pages fetched"], data
        ),
        _empty_traces(results),
    )


def _order(origin: str) -> tuple[int, str]:
    """Return the series of an origin, by which they are sorted: vCPUs first, those that are rare last and on top."""
    kind, _, number_ = origin.partition(" ")
    if kind == "vcpu":
        return int(number_ or 0) % 6, origin
    return 6 if kind == "device" else 7, origin


def _map_panel(index: int, name: str, trace: Document, origins: Sequence[str], most: int) -> Chart:
    chart = Chart(
        f"fault-map-{index}",
        trace_name(name, trace),
        f"Scatter: gpa against time of each fault under {name}, by origin.",
        220,
        76,
    )
    times, gpas = _column(trace, 0) / 1e6, _column(trace, 1)
    x_ticks = linear_ticks(float(times.max(initial=0)))
    x = chart.x_scale(0, x_ticks[-1])
    # RAM has a hole below 4 GiB, so the highest gpa may lie beyond its size.
    top = max(float(gpas.max(initial=0)) + PAGE_SIZE, trace["memory_bytes"])
    y = chart.y_scale(0, top)
    chart.x_axis(x, [(tick, number(tick)) for tick in x_ticks], "time since the start, s")
    chart.y_axis(y, [(top * part / 4, memory(top * part / 4096)) for part in range(5)], "gpa")
    places = [(x(time), y(gpa)) for time, gpa in zip(times.tolist(), gpas.tolist(), strict=True)]
    whose = [record[3] for record in trace["records"]]
    kept = thin(places, whose, most)
    for origin in origins:
        mine = [places[at] for at in kept if whose[at] == origin]
        if mine:
            chart.dots(mine, _order(origin)[0])
    chart.legend([(origin, _order(origin)[0]) for origin in origins if origin in whose], "dots")
    if len(kept) < len(places):
        chart.note(f"{len(kept):,} of {len(places):,} faults drawn: one a spot and origin.")
    return chart


def thin(places: Sequence[Point], whose: Sequence[str], most: int) -> list[int]:
    """Return the indices of at most `most` places, one a grid cell and origin, in their order.

    The grid is as fine as `most` allows: what is left out lies next to a mark that is drawn.
    """
    kept = list(range(len(places)))
    cell = 0.5
    while len(kept) > max(most, 1):
        first: dict[tuple[int, int, str], int] = {}
        for at in kept:
            px, py = places[at]
            first.setdefault((int(px / cell), int(py / cell), whose[at]), at)
        kept = list(first.values())
        cell *= 1.3
    return kept
