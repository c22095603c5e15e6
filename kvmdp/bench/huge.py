"""4 KiB faults on HugeTLB memory: what a guest waits for and what is fetched, by way of demand paging.

Each contender runs two workloads on the same huge pages, over several networks: *sparse* touches a page in each 512K,
*full* each page once, in order. The bytes are counted where they come from, in front of the network, and not by the
pager. First progress is from the first vCPU's entry to the moment the first fault is resolved and the guest may go on;
the bytes that had come by then are the first bytes.

The document (kvmdp.bench-huge/1) has a figure as a spread over the rounds, under contender, workload and network; its
ratios are of one round each, as everywhere, and named as a path: "sparse.30us.first_us".

Units: bytes, microseconds, milliseconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kvmdp import __version__
from kvmdp.bench.contender import Contender
from kvmdp.bench.losses import Losses
from kvmdp.bench.measure import machine_options, plan, source_of
from kvmdp.bench.spread import Spread, ratios
from kvmdp.bench.work import Work
from kvmdp.interruption import entered
from kvmdp.machine.hostinfo import host_facts
from kvmdp.machine.machine import Machine
from kvmdp.memory.backings import BACKINGS
from kvmdp.page import PAGE_SIZE, PageFault
from kvmdp.paging.claim import Claim
from kvmdp.paging.jobs import Job
from kvmdp.size import format_size
from kvmdp.source.base import PageSource
from kvmdp.source.request import FetchRequest
from kvmdp.source.wrapper import SourceWrapper

SCHEMA = "kvmdp.bench-huge/1"
CONTENDERS = ("memory-fault", "mmio", "marker", "userfaultfd")
SPARSE_STRIDE = 128  # pages: 4 touches in a huge page of 2M, 2048 in one of 1G
WORKLOADS = ("sparse", "full")
FIGURES = ("first_bytes", "first_us", "total_ms", "fetched_bytes", "faults")
_RATIOS = ("first_us", "total_ms", "fetched_bytes")
_TIMEOUT = 300.0


@dataclass(frozen=True, slots=True)
class Network:
    """How far away the pages are: `latency` in seconds, `bandwidth` in bytes a second, 0 for no limit."""

    name: str
    latency: float
    bandwidth: float


NETWORKS = (
    Network("none", 0.0, 0.0),
    Network("30us", 30e-6, 0.0),
    Network("30us-10Gbit", 30e-6, 10e9 / 8),
)


class CountingSource(SourceWrapper):
    """Delivers what `inner` delivers, and counts the bytes that have arrived: `bytes`."""

    def __init__(self, inner: PageSource) -> None:
        super().__init__(inner)
        self._mutex = threading.Lock()
        self.bytes = 0

    def fetch(self, request: FetchRequest, destination: memoryview) -> None:
        """Fetch from the inner source, then count."""
        super().fetch(request, destination)
        with self._mutex:
            self.bytes += len(destination)


class _FirstProgress(Job):
    """Notes when the first fault was resolved, and what had been fetched by then; a job of a pager."""

    def __init__(self, source: CountingSource) -> None:
        self._source = source
        self.seconds: float | None = None
        self.bytes = 0

    def admitted(self, fault: PageFault, claim: Claim, began: int) -> None:
        """Note the first."""
        if self.seconds is None:
            self.seconds = time.perf_counter()
            self.bytes = self._source.bytes


def is_huge(backing: str) -> bool:
    """Return whether there is such a backing, of huge pages."""
    return backing in BACKINGS and BACKINGS[backing].page_size > PAGE_SIZE


def work_of(work: Work, workload: str, network: Network) -> Work:
    """Return `work` as one of `WORKLOADS` touches it, over a network."""
    work = replace(work, latency=network.latency, bandwidth=network.bandwidth)
    pages = work.bytes_per_vcpu // PAGE_SIZE
    if workload == "full":
        return replace(work, order="sequential", touches=None)
    return replace(work, order="strided", stride=SPARSE_STRIDE, touches=pages // SPARSE_STRIDE)


def check_work(work: Work, contenders: Sequence[Contender]) -> None:
    """Raise ValueError if `work` is not on huge pages, or a contender has other work or nothing to fault."""
    if not is_huge(work.backing):
        huge = ", ".join(filter(is_huge, BACKINGS))
        raise ValueError(f"--huge is about huge pages, which {work.backing} memory has none of: use {huge}")
    for each in contenders:
        if each.trap is None:
            raise ValueError(f"{each.name} has no faults: leave it out with --huge")
        if ":" in each.name:
            raise ValueError(
                f"{each.name}: with --huge all contenders do the same work; leave out what is behind :"
            )


def _measure(contender: Contender) -> dict[str, float]:
    """Let a contender do its work once; the figures by `FIGURES`. Raises what a machine raises."""
    work = contender.work
    delayed, _ = source_of(work)
    source = CountingSource(delayed)
    with entered(Machine, machine_options(contender), source) as machine:
        machine.set_parameters(plan(work).blocks)
        first = _FirstProgress(source)
        machine.pager.jobs.add(first)
        before, faults = source.bytes, machine.pager.counters.claims
        machine.run(_TIMEOUT)
        assert first.seconds is not None  # all memory was absent, and the guest has touched some
        return {
            "first_bytes": first.bytes - before,
            "first_us": 1e6 * (first.seconds - min(thread.began for thread in machine.threads)),
            "total_ms": 1e3 * machine.guest_seconds,
            "fetched_bytes": source.bytes - before,
            "faults": machine.pager.counters.claims - faults,
        }


@dataclass(slots=True)
class HugeComparison:
    """What has been measured so far; complete when `rounds` have been done.

    `contenders` are those of `work`; `networks` what they fetch over. `losses` says why a contender takes part
    no more.
    """

    work: Work
    contenders: list[Contender]
    rounds: int
    networks: Sequence[Network] = NETWORKS
    figures: dict[tuple[str, str, str], list[dict[str, float]]] = field(default_factory=dict)
    losses: Losses = field(default_factory=Losses)

    def run(self, warm_up: int, on_round: Callable[[str, int, str], None]) -> None:
        """Let the contenders take turns; `on_round` is told of each: contender, round, workload and network.

        May be interrupted at any time: what has been measured stays.
        """
        for turn in range(-warm_up, self.rounds):
            for workload in WORKLOADS:
                for network in self.networks:
                    for each in list(self.contenders):
                        self._take_turn(each, workload, network, turn, on_round)

    def _take_turn(
        self,
        contender: Contender,
        workload: str,
        network: Network,
        turn: int,
        on_round: Callable[[str, int, str], None],
    ) -> None:
        work = work_of(self.work, workload, network)
        measured = self.losses.spare(contender.name, lambda: _measure(replace(contender, work=work)))
        if measured is None:
            self.contenders.remove(contender)
            return
        if turn >= 0:
            self.figures.setdefault((contender.name, workload, network.name), []).append(measured)
            on_round(contender.name, turn, f"{workload}, network {network.name}")

    @property
    def complete(self) -> bool:
        """Whether every contender that can run has done all rounds."""
        if self.losses.failed:
            return False
        cells = [(each.name, w, n.name) for each in self.contenders for w in WORKLOADS for n in self.networks]
        return all(len(self.figures.get(cell, ())) == self.rounds for cell in cells)

    def document(self) -> dict[str, Any]:
        """Return everything as the JSON document has it; workloads and networks that were not run are left out."""
        size = BACKINGS[self.work.backing].page_size
        return {
            "schema": SCHEMA,
            "version": __version__,
            "complete": self.complete,
            "host": host_facts(),
            "options": asdict(self.work) | {"memory_bytes": self.work.memory_bytes, "rounds": self.rounds},
            "host_page_size": size,
            "networks": [asdict(each) for each in self.networks],
            "touches": {
                "sparse": self.work.memory_bytes // PAGE_SIZE // SPARSE_STRIDE,
                "full": self.work.memory_bytes // PAGE_SIZE,
            },
            "contenders": [self._contender(each) for each in self.contenders if self._cells(each.name)],
            "ratios": self._ratios(),
            "skipped": self.losses.skipped,
            "failed": self.losses.failed,
        }

    def _cells(self, name: str) -> dict[tuple[str, str], list[dict[str, float]]]:
        return {(w, n): rounds for (each, w, n), rounds in self.figures.items() if each == name}

    def _contender(self, contender: Contender) -> dict[str, Any]:
        found: dict[str, Any] = {"name": contender.name, "trap": contender.trap}
        for (workload, network), rounds in self._cells(contender.name).items():
            spreads = {name: _spread(Spread.of([one[name] for one in rounds])) for name in FIGURES}
            found.setdefault(workload, {})[network] = spreads
        return found

    def _ratios(self) -> list[dict[str, Any]]:
        rows = []
        for a in self.contenders:
            for b in self.contenders:
                for cell, first in self._cells(a.name).items() if a is not b else ():
                    second = self._cells(b.name).get(cell, [])
                    both = min(len(first), len(second))
                    for name in _RATIOS if both else ():
                        x, y = ([one[name] for one in rounds[:both]] for rounds in (first, second))
                        metric = ".".join((*cell, name))
                        rows.append({"a": a.name, "b": b.name, "metric": metric, **_spread(ratios(x, y))})
        return rows


def lines(document: dict[str, Any]) -> list[str]:
    """Return the document as lines for people, none over 100 columns: a block for each workload and network."""
    options, size = document["options"], document["host_page_size"]
    partial = "" if document["complete"] else ", PARTIAL"
    found = [
        (
            f"{format_size(options['memory_bytes'])} in {-(-options['memory_bytes'] // size)} huge pages of "
            f"{format_size(size)} ({options['backing']}), {options['vcpus']} vCPUs, medians of {options['rounds']} "
            f"rounds{partial}"
        )
    ]
    how = {"sparse": f"one in {format_size(SPARSE_STRIDE * PAGE_SIZE)}", "full": "every page"}
    for workload in WORKLOADS:
        for network in document["networks"]:
            rows = [
                (each["name"], each[workload][network["name"]])
                for each in document["contenders"]
                if network["name"] in each.get(workload, {})
            ]
            if not rows:
                continue
            touches = f"{workload}: {document['touches'][workload]} touches, {how[workload]}"
            found += ["", f"{touches}; network {network['name']}"]
            found.append(
                f"{'':<28}{'first bytes':>12}{'first us':>11}{'total ms':>11}{'fetched bytes':>15}{'faults':>8}"
            )
            found += [_row(name, figures) for name, figures in rows]
    found += [
        "",
        "first: what had been fetched, and how long the guest had waited, when its first access went on",
    ]
    return found


def _row(name: str, figures: dict[str, dict[str, float]]) -> str:
    first_bytes, first, total, fetched, faults = (figures[each]["median"] for each in FIGURES)
    return f"{name:<28}{first_bytes:>12.0f}{first:>11.1f}{total:>11.2f}{fetched:>15.0f}{faults:>8.0f}"


def _spread(spread: Spread) -> dict[str, float]:
    # Whole numbers of bytes stay whole.
    return {
        name: value if float(value).is_integer() else float(f"{value:.6g}")
        for name, value in asdict(spread).items()
    }
