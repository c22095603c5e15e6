"""What a comparison says of more vCPUs than CPUs: there the CPU a fault decides, and nothing else."""

from __future__ import annotations

from kvmdp.bench.report.results import Document, Results, vcpus_name
from kvmdp.bench.report.scale import rough


def cpu_bound(results: Results) -> str:
    """Return sentences on each number of vCPUs above that of the CPUs, without network latency; "" if none was run."""
    cpus = results.host["cpus"]
    return " ".join(filter(None, (_at(results, vcpus) for vcpus in results.vcpus if vcpus > cpus)))


def _at(results: Results, vcpus: int) -> str:
    place = (vcpus, 0.0)
    queue = results.fastest_queue(place)
    if queue is None:
        return ""
    ratios = {
        name: spread
        for name in filter(results.is_exit, results.paging)
        if (spread := results.compare(name, queue, place, _rate))
    }
    if not ratios:
        return ""
    losing = [name for name, (_, _, high) in ratios.items() if high < 1]
    winning = [name for name, (_, low, _) in ratios.items() if low > 1]
    where = f"At {vcpus_name(vcpus)} on {results.host['cpus']} CPUs the CPUs are the limit"
    rates = ", ".join(f"{name} {m:.2f} ({low:.2f}-{high:.2f})" for name, (m, low, high) in ratios.items())
    figures = f"pages a second relative to {queue}, the fastest form of userfaultfd there: {rates}. "
    figures += _costs(results, [*ratios, queue], vcpus)
    if len(losing) == len(ratios):
        return f"{where}, and exits lose: {figures}{_why(results, losing, queue, vcpus)}"
    if len(winning) == len(ratios):
        return f"{where}, and exits win: {figures}"
    words = (
        f"exits lose in every round with {', '.join(losing)} only" if losing else "exits do not lose clearly"
    )
    return f"{where}, and {words}: {figures}{_why(results, losing, queue, vcpus)}"


def _costs(results: Results, names: list[str], vcpus: int) -> str:
    """Return the CPU a fault at the least number of vCPUs and at this one."""
    counts = dict.fromkeys((results.vcpus[0], vcpus))
    costs = []
    for name in names:
        found = [(count, results.entry(name, count, 0.0)) for count in counts]
        each = ", ".join(f"{rough(_cpu_us(entry))} us at {count}" for count, entry in found if entry)
        costs.append(f"{name} {each}")
    return f"CPU a fault, by vCPUs: {'; '.join(costs)}."


def _why(results: Results, losing: list[str], queue: str, vcpus: int) -> str:
    """Say why exits lose, where the CPU a fault bears it out."""
    entry = results.entry(queue, vcpus, 0.0)
    entries = [results.entry(name, vcpus, 0.0) for name in losing]
    if entry is None or not losing:
        return ""
    if all(each and _cpu_us(each) > _cpu_us(entry) for each in entries):
        return (
            " A fault by exit costs more CPU there: every one leaves KVM_RUN and enters it again, while the faults of "
            "vCPUs that wait for a CPU gather in a userfaultfd, and one read takes many of them."
        )
    return " It is not for the CPU a fault alone: not all of those that lose take more of it."


def _cpu_us(entry: Document) -> float:
    return float(entry["cpu_us_per_fault"]["median"])


def _rate(round_: Document) -> float | None:
    return round_["pages"] / round_["seconds"] if round_["seconds"] else None
