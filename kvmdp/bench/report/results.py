"""The comparison document (kvmdp.compare/1) as the figures ask for it: by contender, vCPUs and network latency.

Units: those of the document; latency of the network in seconds. What was not measured is None.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmdp.bench.comparison import BASELINE
from kvmdp.bench.report.scale import duration

SCHEMA = "kvmdp.compare/1"

Document = dict[str, Any]
Place = tuple[int, float]  # vCPUs, latency


@dataclass(slots=True)
class Results:
    """What was measured. `contenders`, `vcpus` and `latencies` are in the order in which the axes show them."""

    document: Document
    contenders: list[str] = field(default_factory=list)
    vcpus: list[int] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: list[dict[str, str]] = field(default_factory=list)
    _entries: dict[tuple[str, int, float], Document] = field(default_factory=dict)
    _benches: dict[tuple[str, int, float], Document] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for bench in self.document["benches"]:
            latency = float(bench["options"]["latency"])
            for entry in bench["contenders"]:
                key = (entry["name"], entry["vcpus"], latency)
                self._entries[key], self._benches[key] = entry, bench
            self.latencies.append(latency)
            self.skipped |= bench.get("skipped", {})
        self.failed = self.document.get("failed", [])  # older documents have none
        self.contenders = list(dict.fromkeys(name for name, _, _ in self._entries))
        self.vcpus = sorted({vcpus for _, vcpus, _ in self._entries})
        self.latencies = sorted(set(self.latencies))

    @property
    def paging(self) -> list[str]:
        """The contenders that page on demand: all but `present`."""
        return [name for name in self.contenders if self.trap(name) is not None]

    @property
    def host(self) -> Document:
        """Facts about the host."""
        facts: Document = self.document["host"]
        return facts

    def trap(self, name: str) -> str | None:
        """Return the trap of a contender, None for `present`."""
        return next((entry["trap"] for key, entry in self._entries.items() if key[0] == name), None)

    def is_exit(self, name: str) -> bool:
        """Return whether the contender takes its faults by exits from KVM_RUN."""
        return self.trap(name) not in (None, BASELINE)

    def fastest_queue(self, place: Place) -> str | None:
        """Return the form of userfaultfd with the highest median rate at a place: the fair opponent of exits."""
        rates = {
            name: entry["pages_per_second"]["median"]
            for name in self.paging
            if not self.is_exit(name) and (entry := self.entry(name, *place))
        }
        return max(rates, key=rates.__getitem__) if rates else None

    def entry(self, name: str, vcpus: int, latency: float) -> Document | None:
        """Return what the document says of a contender at a place."""
        return self._entries.get((name, vcpus, latency))

    def entries(self) -> Iterator[tuple[str, int, float, Document]]:
        """Return all that was measured, sorted by latency, vCPUs and contender."""
        for latency in self.latencies:
            for vcpus in self.vcpus:
                for name in self.contenders:
                    entry = self.entry(name, vcpus, latency)
                    if entry is not None:
                        yield name, vcpus, latency, entry

    def rounds(self, name: str, vcpus: int, latency: float) -> tuple[int, int]:
        """Return how many rounds a contender has done, and how many it was to do."""
        bench = self._benches[name, vcpus, latency]
        done = len(self._entries[name, vcpus, latency]["rounds"])
        return done, bench["options"].get("rounds", done)

    def ratio(
        self, name: str, vcpus: int, latency: float, metric: str = "pages_per_second"
    ) -> Document | None:
        """Return the spread of a contender's ratio to userfaultfd, as the document has it."""
        bench = self._benches.get((name, vcpus, latency), {"ratios": ()})
        wanted = (name, BASELINE, metric)
        return next((row for row in bench["ratios"] if (row["a"], row["b"], row["metric"]) == wanted), None)

    def floor(self, trap: str | None, vcpus: int, latency: float) -> Document | None:
        """Return the spread of a bare exit of `trap` in microseconds, from the bench of that place."""
        for (_, *place), bench in self._benches.items():
            if place == [vcpus, latency] and bench["floor_us"].get(trap):
                spread: Document = bench["floor_us"][trap]
                return spread
        return None

    def compare(
        self, a: str, b: str, place: Place, figure: Callable[[Document], float | None]
    ) -> tuple[float, float, float] | None:
        """Return median, minimum and maximum of a / b, round by round, of what `figure` reads from a round.

        None if they have no round in common. Only rounds of one bench are next to each other in time.
        """
        first, second = self.entry(a, *place), self.entry(b, *place)
        if first is None or second is None or self._benches[(a, *place)] is not self._benches[(b, *place)]:
            return None
        pairs = [(figure(x), figure(y)) for x, y in zip(first["rounds"], second["rounds"], strict=False)]
        found = [x / y for x, y in pairs if x is not None and y]
        return (statistics.median(found), min(found), max(found)) if found else None

    def missing(self) -> list[str]:
        """Say, a sentence each, what one would look for and not find."""
        lines = []
        if not self.document["complete"]:
            lines.append("The comparison was ended before it was complete: this is what had been measured.")
        lines += [f"{name} was skipped: {reason}" for name, reason in self.skipped.items()]
        lines += [f"{each['contender']} failed, {each['where']}: {each['why']}" for each in self.failed]
        for name, vcpus, latency, _ in self.entries():
            done, planned = self.rounds(name, vcpus, latency)
            if done < planned:
                lines.append(f"{name}, {place_name(vcpus, latency)}: {done} of {planned} rounds.")
        for place in self._grid():
            absent = [name for name in self.contenders if (name, *place) not in self._entries]
            absent = [name for name in absent if name not in self.skipped]
            if absent:
                lines.append(f"Nothing was measured of {', '.join(absent)} at {place_name(*place)}.")
        if not self._is_one_bench:
            lines += self._untraced()
        return lines

    @property
    def _is_one_bench(self) -> bool:
        """Whether this is but a bench document, which has neither traces nor memory by GiB to miss."""
        return (
            len(self.document["benches"]) == 1 and not self.document["traces"] and not self.document["memory"]
        )

    def _grid(self) -> list[Place]:
        return [(vcpus, latency) for latency in self.latencies for vcpus in self.vcpus]

    def _untraced(self) -> list[str]:
        lines = []
        measured = {row["contender"] for row in self.document["memory"]}
        for what, known in (("traced run", self.document["traces"]), ("memory figures", measured)):
            without = [name for name in self.paging if name not in known]
            if without:
                lines.append(f"No {what} of {', '.join(without)}.")
        return lines


def vcpus_name(vcpus: int) -> str:
    """Return "1 vCPU", "2 vCPUs"."""
    return f"{vcpus} vCPU" + "s" * (vcpus != 1)


def trace_name(name: str, trace: Document) -> str:
    """Return the name of a traced run, with its number of vCPUs where the trace says it."""
    return f"{name}, {vcpus_name(trace['vcpus'])}" if trace["vcpus"] else name


def latency_name(latency: float) -> str:
    """Return "no network latency", "30 us network latency"."""
    return f"{duration(1e6 * latency)} network latency" if latency else "no network latency"


def place_name(vcpus: int, latency: float) -> str:
    """Return the number of vCPUs and the latency in words."""
    return f"{vcpus_name(vcpus)}, {latency_name(latency)}"


def from_bench(bench: Document) -> Document:
    """Return a comparison document that holds one bench document."""
    found = _comparison(bench["version"], bench["complete"], bench["host"])
    where = place_name(bench["options"]["vcpus"], float(bench["options"]["latency"]))
    for name, why in bench.get("failed", {}).items():  # older documents have none
        found["failed"].append({"where": where, "contender": name, "why": why})
    return found | {"benches": [bench]}


def from_traces(runs: Sequence[tuple[Document, list[Any]]]) -> Document:
    """Return a comparison document that holds traced runs (header, records), and nothing else."""
    traces: dict[str, Document] = {}
    for header, records in runs:
        name = header.get("contender") or header["trap"]
        # A name may come twice in one file.
        name += f" ({len(traces) + 1})" if name in traces else ""
        traces[name] = {
            "vcpus": header.get("vcpus"),
            "memory_bytes": header["memory_bytes"],
            "records": records,
        }
    first = runs[0][0]
    return _comparison(first.get("version", ""), True, first.get("host", {})) | {"traces": traces}


def _comparison(version: str, complete: bool, host: Document) -> Document:
    return {
        "schema": SCHEMA,
        "version": version,
        "complete": complete,
        "host": host,
        "benches": [],
        "traces": {},
        "memory": [],
        "failed": [],
        "claims": [],
    }
