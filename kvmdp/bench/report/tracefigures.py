"""The figures drawn from traces: pages present over time, and the map of faults.

A record says when a fault was resolved (microseconds since the run's start), the faulting gpa, the bytes that became
present, who touched it, and how long the handling took (kvmdp/bench/trace.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvmdp.bench.report.chart import Chart, Point
from kvmdp.bench.report.figure import Figure, Table, Value
from kvmdp.bench.report.results import Document, Results
from kvmdp.bench.report.scale import duration, linear_ticks, memory, number

_PAGE_SIZE = 4096
# What a figure draws at most: of a map more is not seen, of a curve not needed.
_MAP_POINTS = 20_000
_CURVE_POINTS = 200
_SHARES = (10, 25, 50, 75, 90, 100)

_Floats = npt.NDArray[np.float64]


def _column(trace: Document, column: int) -> _Floats:
    return np.array([record[column] for record in trace["records"]], dtype=np.float64)


def _series(results: Results, name: str) -> int:
    """Return the number of a contender's colour: that of the other figures, for one they lack its own."""
    names = [*results.contenders, *(each for each in results.document["traces"] if each not in results.contenders)]
    return names.index(name)


def _empty_traces(results: Results) -> list[str]:
    return [f"{name}: its trace has no fault." for name, t in results.document["traces"].items() if not t["records"]]


def pages_present(results: Results) -> Figure:
    """Share of RAM present over time, all traced runs in one panel."""
    traces = {name: trace for name, trace in results.document["traces"].items() if trace["records"]}
    chart = Chart(
        "pages-present-1",
        "Pages present over time",
        "Lines: pages present against time since the start of the run, one line a contender.",
        250,
    )
    curves = {name: _curve(trace) for name, trace in traces.items()}
    seconds = max((times[-1] for times, _ in curves.values()), default=1) / 1e6
    most = max((pages[-1] for _, pages in curves.values()), default=1)
    x_ticks, y_ticks = linear_ticks(seconds, 6), linear_ticks(most)
    x, y = chart.x_scale(0, x_ticks[-1]), chart.y_scale(0, y_ticks[-1])
    chart.x_axis(x, [(tick, number(tick)) for tick in x_ticks], "time since the start, s")
    chart.y_axis(y, [(tick, number(tick)) for tick in y_ticks], "pages present")
    if not curves:
        chart.empty("no fault was traced")
    data: list[list[Value]] = []
    rows: list[list[Value]] = []
    for at, (name, (times, pages)) in enumerate(curves.items()):
        points = [(x(time / 1e6), y(count)) for time, count in zip(times, pages, strict=True)]
        # A mark now and then, at another place for each, so that lines on top of each other are still told apart.
        spacing = max(len(points) // 5, 1)
        marked = points[(1 + at * spacing // len(curves)) :: spacing]
        chart.line(points, _series(results, name), marked)
        data += [[name, time, count] for time, count in zip(times, pages, strict=True)]
        reached = [times[np.searchsorted(pages, pages[-1] * share / 100)] for share in _SHARES]
        rows.append([name, traces[name]["vcpus"], int(pages[-1]), *(round(float(time), 1) for time in reached)])
    chart.legend([(name, _series(results, name)) for name in curves], "line")
    return Figure(
        "pages-present",
        "Pages present over time",
        "One traced run of each contender; tracing itself takes time, so rates are read from the untraced rounds "
        "above. The table says when a share of the pages that became present in the end was there.",
        [chart],
        Table(["contender", "vCPUs", "pages at the end", *(f"{share} % after, us" for share in _SHARES)], rows),
        Table(["contender", "time, us", "pages present"], data),
        _empty_traces(results),
    )


def _curve(trace: Document) -> tuple[list[float], list[int]]:
    """Return times (microseconds) and pages present then, thinned evenly by fault, first and last kept."""
    times = _column(trace, 0)
    order = np.argsort(times, kind="stable")
    present = np.cumsum(_column(trace, 2)[order] / _PAGE_SIZE)
    kept = np.unique(np.linspace(0, len(order) - 1, min(len(order), _CURVE_POINTS)).astype(np.int64))
    return [0.0, *times[order][kept].tolist()], [0, *(int(count) for count in present[kept])]


def fault_map(results: Results) -> Figure:
    """Where and when each fault was, coloured by who touched the page; one panel a contender."""
    traces: dict[str, Document] = results.document["traces"]
    origins = sorted({record[3] for trace in traces.values() for record in trace["records"]})
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
                rows.append(
                    [name, origin, len(mine), sum(record[2] for record in mine) // _PAGE_SIZE]
                    + [f"{min(gpas):#x}", f"{max(gpas):#x}", *(round(float(each), 2) for each in latencies)]
                )
    header = ["contender", "origin", "faults", "pages present", "lowest gpa", "highest gpa", "p50, us", "p99, us"]
    return Figure(
        "fault-map",
        "Map of faults",
        "Each mark is a fault: when it was resolved and where in the guest's memory (gpa) it was. Colour and shape "
        "tell who touched the page. The CSV has every fault.",
        panels,
        Table(header, rows),
        Table(["contender", "time, us", "gpa", "bytes present", "origin", "latency, us", "pages fetched"], data),
        _empty_traces(results),
    )


def _map_panel(index: int, name: str, trace: Document, origins: Sequence[str], most: int) -> Chart:
    chart = Chart(
        f"fault-map-{index}",
        f"{name}, {trace['vcpus']} vCPU" + "s" * (trace["vcpus"] != 1),
        f"Scatter: gpa against time of each fault under {name}, by origin.",
        220,
        76,
    )
    times, gpas = _column(trace, 0) / 1e6, _column(trace, 1)
    x_ticks = linear_ticks(float(times.max(initial=0)))
    x = chart.x_scale(0, x_ticks[-1])
    # RAM has a hole below 4 GiB, so the highest gpa may lie beyond its size.
    top = max(float(gpas.max(initial=0)) + _PAGE_SIZE, trace["memory_bytes"])
    y = chart.y_scale(0, top)
    chart.x_axis(x, [(tick, number(tick)) for tick in x_ticks], "time since the start, s")
    chart.y_axis(y, [(top * part / 4, memory(top * part / 4096)) for part in range(5)], "gpa")
    if not len(times):
        chart.empty("no fault was traced")
    places = [(x(time), y(gpa)) for time, gpa in zip(times.tolist(), gpas.tolist(), strict=True)]
    whose = [record[3] for record in trace["records"]]
    kept = thin(places, whose, most)
    for series, origin in enumerate(origins):
        mine = [places[at] for at in kept if whose[at] == origin]
        if mine:
            chart.dots(mine, series)
    chart.legend([(origin, series) for series, origin in enumerate(origins)], "dots")
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
