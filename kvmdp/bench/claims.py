"""What the figures of a comparison say about the claims of the RFC and of the reply to it (November 2023).

A verdict is `supported`, `weakened` or `undecided`, and always comes with the figures it rests on and with what this
host cannot show. Ratios are taken round by round between contenders of one bench, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvmdp.bench.comparison import BASELINE
from kvmdp.bench.contender import PRESENT
from kvmdp.bench.cpubound import cpu_bound
from kvmdp.bench.report.results import Document, Place, Results, latency_name, vcpus_name
from kvmdp.bench.report.scale import rough

SUPPORTED = "supported"
WEAKENED = "weakened"
UNDECIDED = "undecided"

_PAGES_A_GIB = 1 << 18
_CLAIMED_BYTES = 8
# The claims on contention were made for tens of vCPUs; below this many CPUs there is none to be seen.
_MANY_CPUS = 16
# Rates within a tenth of each other are not told apart across runs on virtual machines.
_ALIKE = 0.1
# A network that takes this long a page, in seconds, is what a fault waits for.
_SLOW_NETWORK = 100e-6

_Figure = Callable[[Document], float | None]
_Verdict = tuple[str, str]
_Spread = tuple[float, float, float]
_Row = tuple[str, int, _Spread]  # contender, vCPUs, ratio


def claims(document: Document) -> list[dict[str, str]]:
    """Return the claims with verdicts, as `claims` of the comparison document (kvmdp.compare/1) has them.

    Each has `who`, `claim`, `verdict` and `why`. Does not read the document's own claims.
    """
    results = Results(document)
    found = (
        (
            "Matlack",
            "Under userfaultfd a HugeTLB page is faulted whole, 1 GiB at a time if need be, which is untenable.",
            _hugetlb(),
        ),
        (
            "Matlack",
            "userfaultfd costs 8 bytes of user page table for each page of the guest; a present bitmap costs 1 bit.",
            _memory(results),
        ),
        (
            "Matlack",
            "userfaultfd costs CPU time: page tables are split and collapsed under locks.",
            _cpu(results),
        ),
        (
            "Xu",
            "Exits from KVM_RUN may bring better concurrency than userfaultfd.",
            _scaling(results),
        ),
        (
            "Xu",
            "If a fault waits for the network, better concurrency of faults may not matter much.",
            _network(results),
        ),
        (
            "Xu",
            "userfaultfd has wait queues already; exits from KVM_RUN are one more interface for the same end.",
            _wait_queues(results),
        ),
    )
    return [
        {"who": who, "claim": claim, "verdict": verdict, "why": why} for who, claim, (verdict, why) in found
    ]


def _hugetlb() -> _Verdict:
    return (
        UNDECIDED,
        "No run here had HugeTLB backing: it takes both designs on 2 MiB and 1 GiB pages to tell.",
    )


def _memory(results: Results) -> _Verdict:
    rows = {
        row["contender"]: row for row in sorted(results.document["memory"], key=lambda row: float(row["gib"]))
    }
    baseline = rows.get(BASELINE)
    if baseline is None:
        return UNDECIDED, f"There are no memory figures of {BASELINE}."
    rows = {name: row for name, row in rows.items() if row["gib"] == baseline["gib"]}
    tables = _bytes_a_page(baseline, "vmpte_kib")
    bits = 8 * baseline["bitmap_bytes"] / (baseline["gib"] * _PAGES_A_GIB)
    figures = (
        f"At {baseline['gib']:g} GiB, {BASELINE} takes {rough(tables)} bytes of page tables a guest page; "
        f"the bitmap takes {rough(bits)} bit."
    )
    if tables > 1.5 * _CLAIMED_BYTES:
        figures += " RAM is mapped twice there, as guest view and as VMM view, and each has page tables."
    costs = [
        f"{name} {rough(_bytes_a_page(row, 'vmpte_kib') + _bytes_a_page(row, 'slot_kib'))}"
        for name, row in rows.items()
        if name != PRESENT and not name.startswith(BASELINE)
    ]
    if costs:
        figures += (
            f" In this emulation page tables and memslots of the exit traps come to {', '.join(costs)} bytes a page; "
            "a bitmap inside KVM would need neither."
        )
    if tables < _CLAIMED_BYTES / 2 or bits > 2:
        return WEAKENED, f"That is not the cost that was claimed. {figures}"
    if PRESENT not in rows:
        return SUPPORTED, f"{figures} What the same memory costs with paging switched off was not measured."
    plain = _bytes_a_page(rows[PRESENT], "vmpte_kib")
    if plain > tables / 2:
        return WEAKENED, (
            f"With paging switched off the page tables take {rough(plain)} bytes a page as well: on this backing that "
            "is the cost of mapping 4 KiB pages, and only memory mapped by huge pages, or not mapped at all, is "
            f"without it. {figures}"
        )
    return SUPPORTED, f"{figures} With paging switched off the page tables take {rough(plain)} bytes a page."


def _bytes_a_page(row: Document, field: str) -> float:
    return float(1024 * row[field] / (row["gib"] * _PAGES_A_GIB))


def _cpu(results: Results) -> _Verdict:
    rows = _against_baseline(results, 0.0, _cpu_of_round)
    if not rows:
        return UNDECIDED, f"There is no exit trap next to {BASELINE} without network latency."
    verdict = _judge(rows, -1, wins=SUPPORTED, loses=WEAKENED)
    words = {
        SUPPORTED: "An exit trap is cheaper in every round, at every number of vCPUs that was run.",
        WEAKENED: "No exit trap is cheaper here.",
        UNDECIDED: "Which is cheaper depends on the trap, on the number of vCPUs or on the round.",
    }
    return verdict, _sentences(
        words[verdict],
        f"CPU a fault, guest included, relative to {BASELINE}: {_list(rows)}.",
        _exit_cost(results),
        "Collapsing into huge pages was not part of this work.",
    )


def _scaling(results: Results) -> _Verdict:
    if len(results.vcpus) < 2:
        return UNDECIDED, "Only one number of vCPUs was measured."
    few, many = results.vcpus[0], results.vcpus[-1]
    growth = {}
    for name in results.paging:
        first, last = (results.entry(name, vcpus, 0.0) for vcpus in (few, many))
        if first and last:
            growth[name] = last["pages_per_second"]["median"] / first["pages_per_second"]["median"]
    exits = [rate for name, rate in growth.items() if results.is_exit(name)]
    queues = [rate for name, rate in growth.items() if not results.is_exit(name)]
    if not exits or not queues:
        return (
            UNDECIDED,
            f"Exit traps and {BASELINE} were not both run without latency at {few} and {many} vCPUs.",
        )
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in growth.items())
    figures = (
        f"From {few} to {many} vCPUs, without network latency, pages a second grow by the factors: {rates}."
    )
    cpus = results.host["cpus"]
    if many > cpus or many < _MANY_CPUS:
        return UNDECIDED, (
            f"{vcpus_name(many)} on {cpus} CPUs cannot show it: the contention in question sets in with tens of vCPUs, "
            f"each on a CPU of its own; it takes {_MANY_CPUS} vCPUs or more on as many CPUs. "
            + _sentences(figures, cpu_bound(results))
        )
    if max(exits) > max(queues) * (1 + _ALIKE):
        return (
            SUPPORTED,
            f"The best exit trap grows more than the best userfaultfd, sharded or not. {figures}",
        )
    return WEAKENED, f"No exit trap grows more than the best userfaultfd by over a tenth. {figures}"


def _network(results: Results) -> _Verdict:
    slow = max(results.latencies, default=0.0)
    if slow < _SLOW_NETWORK:
        return UNDECIDED, "No run had a network latency that outweighs a fault."
    rows = _against_fastest(results, slow)
    if not rows:
        return UNDECIDED, f"There is no exit trap next to {BASELINE} with {latency_name(slow)}."
    if rows[-1][1] == 1:
        return UNDECIDED, "Only one vCPU was run with such a latency: it has no faults that could overlap."
    faster = [(name, vcpus) for name, vcpus, (median, low, _) in rows if median > 1 + _ALIKE and low > 1]
    if faster:
        places = ", ".join(f"{name} at {vcpus_name(vcpus)}" for name, vcpus in faster)
        verdict, words = WEAKENED, f"Exits are faster by more than a tenth all the same: {places}."
    else:
        verdict, words = (
            SUPPORTED,
            "No exit trap is faster by more than a tenth: the network hides the difference.",
        )
    return verdict, _sentences(
        words,
        f"With {latency_name(slow)}, pages a second relative to the fastest form of {BASELINE} at each number of "
        f"vCPUs: {_list(rows)}.",
        _in_flight(results, (rows[-1][1], slow)),
        "The network is simulated: a delay that costs no CPU time and loses nothing.",
    )


def _wait_queues(results: Results) -> _Verdict:
    rows = _against_fastest(results, 0.0)
    if not rows:
        return UNDECIDED, f"There is no exit trap next to {BASELINE} without network latency."
    verdict = _judge(rows, 1, wins=WEAKENED, loses=SUPPORTED)
    words = {
        WEAKENED: "An exit trap is faster in every round, at every number of vCPUs that was run.",
        SUPPORTED: "No exit trap is faster: this host shows no benefit in rate.",
        UNDECIDED: "Which is faster depends on the trap, on the number of vCPUs or on the round.",
    }
    return verdict, _sentences(
        words[verdict],
        f"Pages a second without network latency, relative to the fastest form of {BASELINE} at that number of vCPUs: "
        f"{_list(rows)}.",
        _switches(results),
        _exit_cost(results),
    )


def _sentences(*each: str) -> str:
    return " ".join(filter(None, each))


def _in_flight(results: Results, place: Place) -> str:
    entries = [(name, results.entry(name, *place)) for name in results.paging]
    counts = ", ".join(f"{name} {entry['in_flight']:.2f}" for name, entry in entries if entry)
    return f"Fetches in flight at {vcpus_name(place[0])}, on average: {counts}."


def _against_baseline(results: Results, latency: float, figure: _Figure) -> list[_Row]:
    """Return each exit trap's ratio to userfaultfd with one reader, for each number of vCPUs."""
    rows = []
    for vcpus in results.vcpus:
        for name in filter(results.is_exit, results.paging):
            spread = results.compare(name, BASELINE, (vcpus, latency), figure)
            if spread:
                rows.append((name, vcpus, spread))
    return rows


def _against_fastest(results: Results, latency: float) -> list[_Row]:
    """Return the ratio of each exit trap's rate to that of the fastest userfaultfd, for each number of vCPUs."""
    rows = []
    for vcpus in results.vcpus:
        fastest = results.fastest_queue((vcpus, latency))
        for name in filter(results.is_exit, results.paging):
            spread = results.compare(name, fastest, (vcpus, latency), _rate_of_round) if fastest else None
            if spread:
                rows.append((name, vcpus, spread))
    return rows


def _judge(rows: Sequence[_Row], better: int, wins: str, loses: str) -> str:
    """Return `wins` if some exit trap is better than userfaultfd in every round at every number of vCPUs.

    `loses` if none is better at any, going by the medians; `undecided` between the two. `better` is 1 if a ratio above
    1 is, else -1.
    """
    sides = {name: [_side(spread) for other, _, spread in rows if other == name] for name, _, _ in rows}
    if any(set(each) == {better} for each in sides.values()):
        return wins
    if not any((median - 1) * better > 0 for _, _, (median, _, _) in rows):
        return loses
    return UNDECIDED


def _side(spread: _Spread) -> int:
    """Return 1 if all rounds are above 1, -1 if all are below, 0 if they disagree."""
    _, low, high = spread
    return (low > 1) - (high < 1)


def _list(rows: Sequence[_Row]) -> str:
    """Return ratios in words, contender by contender: "marker 1.12 (1.05-1.20) at 1 vCPU, 1.04 (0.98-1.10) at 2"."""
    words: dict[str, list[str]] = {}
    for name, vcpus, (median, low, high) in rows:
        place = str(vcpus) if name in words else vcpus_name(vcpus)
        words.setdefault(name, []).append(f"{median:.2f} ({low:.2f}-{high:.2f}) at {place}")
    return "; ".join(f"{name} {', '.join(each)}" for name, each in words.items())


def _exit_cost(results: Results) -> str:
    """Say what a bare exit costs on this host, where that is what exits are held back by."""
    place = (min(results.vcpus), 0.0)
    floors = {
        trap: results.floor(trap, *place) for trap in sorted({results.trap(n) or "" for n in results.paging})
    }
    known = [f"{trap} {rough(spread['median'])} us" for trap, spread in floors.items() if spread]
    if not known:
        return ""
    words = f"A bare exit takes {', '.join(known)} here"
    if results.host.get("kvm") == "kvm_pvm":
        return f"{words}: KVM is PVM, which virtualises in software; with hardware virtualisation exits weigh less."
    return f"{words}."


def _switches(results: Results) -> str:
    place = (min(results.vcpus), 0.0)
    found = [(name, results.entry(name, *place)) for name in results.paging]
    counts = [f"{name} {rough(entry['switches_per_fault']['median'])}" for name, entry in found if entry]
    return f"Context switches a fault at {vcpus_name(place[0])}: {', '.join(counts)}." if counts else ""


def _rate_of_round(round_: Document) -> float | None:
    return round_["pages"] / round_["seconds"] if round_["seconds"] else None


def _cpu_of_round(round_: Document) -> float | None:
    return (round_["user_s"] + round_["system_s"]) / round_["faults"] if round_["faults"] else None
