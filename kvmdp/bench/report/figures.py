"""The figures drawn from the benches: rates, latencies, CPU, memory.

A contender has the same colour, dash, marker and pattern in all of them. Units stand on the axes.
"""

from __future__ import annotations

from kvmdp.bench.report.chart import Chart
from kvmdp.bench.report.figure import Figure, Table, Value
from kvmdp.bench.report.results import Document, Results, latency_name, place_name, vcpus_name
from kvmdp.bench.report.scale import duration, linear_ticks, log_ticks, memory, number
from kvmdp.bench.report.svg import colour
from kvmdp.bench.report.tracefigures import fault_map, pages_present
from kvmdp.bench.spread import BUCKETS

_BAR = 9.0
_BAR_GAP = 9.0
_BAR_LEFT = 160.0


def figures(results: Results) -> list[Figure]:
    """Return all figures for which the document has at least one number, in the order of the report."""
    made = []
    if results.contenders:
        made += [rates(results), latencies(results), cpu(results)]
    if results.document["traces"]:
        made += [pages_present(results), fault_map(results)]
    if results.document["memory"]:
        made.append(memory_by_gib(results))
    return made


def _spread(spread: Document | None) -> list[Value]:
    """Return median, minimum and maximum for a table's row."""
    return [spread["median"], spread["min"], spread["max"]] if spread else [None, None, None]


def _micros(latency: float) -> float:
    """Return seconds in microseconds, without the last bits that the multiplication leaves."""
    return round(1e6 * latency, 3)


def rates(results: Results) -> Figure:
    """Pages a second by vCPUs, one panel a latency."""
    rows: list[list[Value]] = []
    for name, vcpus, latency, entry in results.entries():
        ratio = results.ratio(name, vcpus, latency)
        floor = results.floor(results.trap(name), vcpus, latency)
        spreads = (entry["pages_per_second"], ratio, floor, entry["own_cost_us"])
        figures = [figure for spread in spreads for figure in _spread(spread)]
        rows.append([_micros(latency), vcpus, name, len(entry["rounds"]), *figures, entry["in_flight"]])
    columns = [
        f"{what}, {which}"
        for what in ("pages/s", "ratio to userfaultfd", "floor, us", "own cost, us a page")
        for which in ("median", "min", "max")
    ]
    header = ["network latency, us", "vCPUs", "contender", "rounds", *columns, "fetches in flight, mean"]
    panels = [_rate_panel(results, index, latency) for index, latency in enumerate(results.latencies, 1)]
    return Figure(
        "pages-per-second",
        "Pages a second by vCPUs",
        "Pages that all vCPUs together got through in a second, 4 KiB each. A mark is the median of the rounds, its "
        "whisker reaches from the slowest to the fastest; marks of one vCPU count are set apart sideways only to be "
        "seen. Each panel has its own scale. Own cost, in the table, is the time a page less the floor: with more "
        "than one vCPU faults overlap, so that it may be below 0, and a network's latency is part of it.",
        panels,
        Table(header, rows),
    )


def _rate_panel(results: Results, index: int, latency: float) -> Chart:
    names = [name for name in results.paging if any(results.entry(name, v, latency) for v in results.vcpus)]
    shown = [entry for name, _, at, entry in results.entries() if at == latency and name in names]
    chart = Chart(
        f"pages-per-second-{index}",
        latency_name(latency).capitalize(),
        f"Lines: pages a second against vCPUs with {latency_name(latency)}, one line a contender.",
        230,
    )
    ticks = linear_ticks(max((entry["pages_per_second"]["max"] for entry in shown), default=0))
    y = chart.y_scale(0, ticks[-1])
    x = chart.x_scale(-0.5, len(results.vcpus) - 0.5)
    chart.y_axis(y, [(tick, number(tick)) for tick in ticks], "pages a second")
    chart.x_axis(x, [(at, str(vcpus)) for at, vcpus in enumerate(results.vcpus)], "vCPUs", grid=False)
    if not names:
        chart.empty("nothing was measured here")
    for row, name in enumerate(names):
        aside = (row - (len(names) - 1) / 2) * min(0.6 / len(names), 0.09)
        series = results.contenders.index(name)
        points = []
        for at, vcpus in enumerate(results.vcpus):
            entry = results.entry(name, vcpus, latency)
            if entry is not None:
                rate = entry["pages_per_second"]
                place = x(at + aside)
                chart.whisker((place, y(rate["min"])), (place, y(rate["max"])), f"s{colour(series)}")
                points.append((place, y(rate["median"])))
        chart.line(points, series, points)
    chart.legend([(name, results.contenders.index(name)) for name in names], "line")
    _note_present(chart, results, latency)
    return chart


def _note_present(chart: Chart, results: Results, latency: float) -> None:
    """Say what `present` reaches: to scale it would press all others onto the axis."""
    for name in results.contenders:
        if name not in results.paging:
            found = [(vcpus, results.entry(name, vcpus, latency)) for vcpus in results.vcpus]
            rates = [f"{e['pages_per_second']['median']:,.0f} at {vcpus_name(v)}" for v, e in found if e]
            if rates:
                chart.note(f"Not drawn, far above: {name} (all memory in place), {', '.join(rates)}.")


def latencies(results: Results) -> Figure:
    """Share of faults resolved within a time: few and many vCPUs, each latency."""
    header = ["network latency, us", "vCPUs", "contender", "p50, us", "p90, us", "p99, us", "max, us"]
    header += [f"faults from {2**k} us" for k in range(BUCKETS)]
    rows: list[list[Value]] = []
    for name, vcpus, latency, entry in results.entries():
        if name in results.paging:
            found = entry["latency_us"]
            percentiles = [found[key] for key in ("p50", "p90", "p99", "max")]
            rows.append([_micros(latency), vcpus, name, *percentiles, *found["buckets"]])
    counts = dict.fromkeys((results.vcpus[0], results.vcpus[-1]))
    places = [(vcpus, latency) for vcpus in counts for latency in results.latencies]
    return Figure(
        "latency",
        "Latency of a fault",
        "Share of all faults, of all rounds together, whose handling took less than the time on the axis: from the "
        "return of KVM_RUN, or from the reading of the uffd_msg, to the re-entry or the wake. What the kernel does "
        "before and after is not in it. Bins are powers of two of a microsecond (the first bin also holds what was "
        "faster); a mark stands at a bin's upper end.",
        [_latency_panel(results, index, *place) for index, place in enumerate(places, 1)],
        Table(header, rows),
    )


def _latency_panel(results: Results, index: int, vcpus: int, latency: float) -> Chart:
    chart = Chart(
        f"latency-{index}",
        place_name(vcpus, latency),
        f"Lines: cumulative share of faults against latency, {place_name(vcpus, latency)}, one line a contender.",
        200,
    )
    counted = {}
    for name in results.paging:
        entry = results.entry(name, vcpus, latency)
        if entry is not None and sum(entry["latency_us"]["buckets"]):
            counted[name] = entry["latency_us"]["buckets"]
    filled = [k for each in counted.values() for k, count in enumerate(each) if count]
    first, last = (min(filled), max(filled)) if filled else (0, 10)
    x = chart.x_scale(2.0**first, 2.0 ** (last + 1), log=True)
    y = chart.y_scale(0, 100)
    ticks = [(2.0**k, duration(2**k)) for k in range(first, last + 2)]
    chart.x_axis(x, ticks, "latency of a fault, at most")
    chart.y_axis(y, [(share, str(share)) for share in range(0, 101, 20)], "faults, %")
    if not counted:
        chart.empty("no faults were measured here")
    for name, buckets in counted.items():
        total, below = sum(buckets), 0
        points = [(x(2.0**first), y(0))]
        for k in range(first, last + 1):
            below += buckets[k]
            points.append((x(2.0 ** (k + 1)), y(100 * below / total)))
        chart.line(points, results.contenders.index(name), points[1:])
    chart.legend([(name, results.contenders.index(name)) for name in counted], "line")
    return chart


def cpu(results: Results) -> Figure:
    """CPU time a fault, one panel a latency."""
    header = ["network latency, us", "vCPUs", "contender"]
    header += [f"CPU us a fault, {which}" for which in ("median", "min", "max")]
    header += [f"context switches a fault, {which}" for which in ("median", "min", "max")]
    header += ["user s, all rounds", "system s, all rounds", "faults, all rounds", "pages, all rounds"]
    rows: list[list[Value]] = []
    for name, vcpus, latency, entry in results.entries():
        sums = (
            sum(each[key] for each in entry["rounds"]) for key in ("user_s", "system_s", "faults", "pages")
        )
        costs = _spread(entry["cpu_us_per_fault"]) + _spread(entry["switches_per_fault"])
        rows.append([_micros(latency), vcpus, name, *costs, *(round(each, 6) for each in sums)])
    return Figure(
        "cpu",
        "CPU a fault",
        "User and system time of the whole process, guest included, by the number of faults; for present, which has "
        "none, by the number of pages. A bar is the median of the rounds, its whisker reaches from the least to the "
        "most.",
        [_cpu_panel(results, index, latency) for index, latency in enumerate(results.latencies, 1)],
        Table(header, rows),
    )


def _cpu_panel(results: Results, index: int, latency: float) -> Chart:
    names = [
        name for name in results.contenders if any(results.entry(name, v, latency) for v in results.vcpus)
    ]
    step = _BAR * len(results.vcpus) + _BAR_GAP
    chart = Chart(
        f"cpu-{index}",
        latency_name(latency).capitalize(),
        f"Bars: CPU microseconds a fault with {latency_name(latency)}, by contender and vCPUs.",
        step * max(len(names), 2),
        _BAR_LEFT,
    )
    shown = [entry["cpu_us_per_fault"]["max"] for _, _, at, entry in results.entries() if at == latency]
    ticks = linear_ticks(max(shown, default=0), 5)
    x = chart.x_scale(0, ticks[-1])
    chart.x_axis(x, [(tick, number(tick)) for tick in ticks], "CPU time a fault, us")
    chart.categories(names, step)
    if not names:
        chart.empty("nothing was measured here")
    for row, name in enumerate(names):
        for bar, vcpus in enumerate(results.vcpus):
            entry = results.entry(name, vcpus, latency)
            top = chart.top + row * step + _BAR_GAP / 2 + bar * _BAR
            if entry is None:
                chart.text("not measured", chart.left + 4, top + _BAR - 1)
                continue
            cost = entry["cpu_us_per_fault"]
            chart.bar(top, _BAR - 1, x(cost["median"]), results.contenders.index(name), bar)
            middle = top + (_BAR - 1) / 2
            chart.whisker((x(cost["min"]), middle), (x(cost["max"]), middle), "over")
    chart.legend([(vcpus_name(vcpus), bar) for bar, vcpus in enumerate(results.vcpus)], "bar")
    return chart


_KINDS = ("page tables (VmPTE)", "bitmap", "memslots (kernel)")


def _kib(row: Document) -> tuple[float, float, float]:
    return row["vmpte_kib"], row["bitmap_bytes"] / 1024, row["slot_kib"]


def memory_by_gib(results: Results) -> Figure:
    """What demand paging costs in memory, one panel a size of RAM."""
    measured = results.document["memory"]
    columns = (
        "contender",
        "gib",
        "vmpte_kib",
        "bitmap_bytes",
        "slot_kib",
        "memslots",
        "granule",
        "fault_around",
    )
    header = ["contender", "RAM, GiB", "page tables (VmPTE), KiB", "bitmap, bytes"]
    header += ["memslots (kernel), KiB", "memslots", "granule, bytes", "pages fetched a fault"]
    sizes = sorted({row["gib"] for row in measured})
    return Figure(
        "memory",
        "Memory by GiB",
        "What demand paging takes of the host's memory, by size of the guest's RAM: the process's page tables, the "
        "present bitmap, and the kernel memory of the memslots. One vCPU touches all of RAM page by page, with as many "
        "pages fetched a fault as the table says, and memslots of the granule given there: the smallest that keeps "
        "them within 16,384. The kernel's memory is the growth of VmallocUsed, which is system-wide: other processes "
        "are in it. The axis is logarithmic. The bitmap is the emulator's own: userfaultfd by itself needs none.",
        [_memory_panel(results, index, size) for index, size in enumerate(sizes, 1)],
        Table(header, [[row[column] for column in columns] for row in measured]),
    )


def _memory_panel(results: Results, index: int, size: float) -> Chart:
    measured = results.document["memory"]
    names = list(dict.fromkeys([*results.contenders, *(row["contender"] for row in measured)]))
    rows = [row for row in measured if row["gib"] == size]
    step = _BAR * len(_KINDS) + _BAR_GAP
    chart = Chart(
        f"memory-{index}",
        f"{size:g} GiB of RAM",
        f"Bars on a logarithmic axis: memory in bytes by contender and kind, for {size:g} GiB of RAM.",
        step * max(len(rows), 2),
        _BAR_LEFT,
    )
    amounts = [kib for row in measured for kib in _kib(row) if kib > 0]
    ticks = log_ticks(min(amounts, default=1) / 2, max(amounts, default=16), 8)
    x = chart.x_scale(ticks[0], ticks[-1], log=True)
    chart.x_axis(x, [(tick, memory(tick)) for tick in ticks], "memory")
    chart.categories([row["contender"] for row in rows], step)
    for at, row in enumerate(rows):
        for kind, kib in enumerate(_kib(row)):
            top = chart.top + at * step + _BAR_GAP / 2 + kind * _BAR
            if kib > 0:
                chart.bar(top, _BAR - 1, x(kib), names.index(row["contender"]), kind)
            else:
                # A logarithmic axis has no place for nothing.
                chart.text("0", chart.left + 3, top + _BAR - 1)
    chart.legend([(kind, number_) for number_, kind in enumerate(_KINDS)], "bar")
    return chart
