"""What `kvmdp run` says of a run: as a JSON document and as lines for people."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmdp.lab.collapse_cost import CollapseResult
from kvmdp.lab.experiment import RunResult
from kvmdp.lab.leaks import Leak
from kvmdp.machine.hostinfo import emulates_ring_0
from kvmdp.memory.layout import GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.size import format_size
from kvmdp.vcpu.emulated import Form


def results(result: RunResult) -> dict[str, Any]:
    """Return the part of the JSON document that the run decides."""
    counters = result.counters
    expected, poison = result.expected_checksum, result.poison
    return {
        "ok": result.ok,
        "granule": result.granule,
        "pages_present": result.pages_present,
        "pages_fetched": counters.pages_fetched,
        "pages_zeroed": counters.pages_zeroed,
        "pages_evicted": counters.pages_evicted,
        "pages_refetched": counters.pages_refetched,
        "pages_reactivated": counters.pages_backed,
        "resident_peak_bytes": None if result.resident_peak is None else result.resident_peak * PAGE_SIZE,
        "faults": counters.claims,
        "waits": counters.waits,
        "retries": counters.retries,
        "seconds": result.seconds,
        "exits": result.exits,
        "emulated_accesses": result.emulated,
        "stalls": result.stalls,
        "stops": result.stops,
        "longest_stop_us": round(1e6 * result.longest_stop, 1),
        "latency_us": _latency(result),
        "memslots": result.memslots,
        "slot_bytes": result.slot_bytes,
        "resident_bytes": result.resident_bytes,
        "setup_seconds": {**result.setup_seconds, "cpu_to_first_instruction": result.cpu_seconds},
        "accesses": result.accesses,
        "guest_checksum": f"{result.guest_checksum:#018x}",
        "expected_checksum": None if expected is None else f"{expected:#018x}",
        "pages_checked": result.pages_checked,
        "wrong_pages": _gpas(result.wrong_pages),
        "poison": {
            "pages": _gpas(poison.pages),
            "expected": None if poison.expected is None else _gpas(poison.expected),
            "machine_checks": poison.machine_checks,
            "addresses": _gpas(poison.addresses),
        },
        "collapse": None if result.collapse is None else _collapse(result.collapse),
    }


def _collapse(result: CollapseResult) -> dict[str, Any]:
    return {
        "policy": result.policy,
        "supported": result.supported,
        "pages_collapsed": result.pages,
        "seconds": result.seconds,
        "stops": result.stops,
        "longest_stop_us": round(1e6 * result.longest_stop, 1),
        "before": None if result.before is None else result.before.mapped,
        "after": None if result.after is None else result.after.mapped,
        "retouch_ratio": result.retouch_ratio,
    }


def _gpas(numbers: list[int]) -> list[str]:
    return [f"{gpa:#x}" for gpa in numbers]


def _latency(result: RunResult) -> dict[str, float | None]:
    if not len(result.latencies):
        return {"p50": None, "p99": None, "max": None}
    p50, p99, most = np.percentile(result.latencies, [50, 99, 100]) / 1000
    return {"p50": round(float(p50), 1), "p99": round(float(p99), 1), "max": round(float(most), 1)}


def print_emulated(forms: dict[str, int]) -> None:
    """Print what KVM's emulator has completed, for people."""
    if not forms:
        return
    by_form = ", ".join(f"{form} {count}" for form, count in sorted(forms.items()))
    print(f"emulated   {sum(forms.values())} accesses completed by KVM's emulator: {by_form}")
    if Form.SELECTOR_OR_FLAGS in forms and emulates_ring_0():
        print(
            "warning    this KVM runs ring 3 with other selectors and flags than its emulator stores: push, pushf or "
            "mov may have put others into absent memory than they put into present memory"
        )
    if Form.FAR_CALL in forms:
        print(
            "warning    KVM's emulator loses one of the two stores of a far call to absent memory, and this guest may "
            "have changed CS by it: its stack may be wrong, use another trap"
        )


def print_summary(document: dict[str, Any]) -> None:
    """Print the result for people."""
    pages = document["memory_bytes"] // PAGE_SIZE
    seconds = document["seconds"]
    exits = ", ".join(f"{kind} {count}" for kind, count in sorted(document["exits"].items()))
    fetched = f"{document['pages_fetched']} fetched"
    if document["pages_zeroed"]:
        fetched += f", {document['pages_zeroed']} zero (holes)"
    if document["image"] is not None or document["handler"] is not None:
        print(f"image      {document['image_layout'] or 'of the handler'}; RAM at {_places(document)}")
    print(f"pages      {document['pages_present']} of {pages} present: {fetched}")
    if document["resident_limit_bytes"] is not None:
        again = f"{document['pages_refetched']} fetched again ({document['pages_refetched'] / seconds:.0f} a second)"
        print(
            f"limit      {format_size(document['resident_limit_bytes'])} in memory, "
            f"{document['resident_peak_bytes'] / (1 << 20):.1f} MiB at the most: {document['pages_evicted']} evicted, "
            f"{again}, {document['pages_reactivated']} spared"
        )
    print(
        f"faults     {document['faults']} in {seconds:.3f} s, {document['faults'] / seconds:.0f} a second; "
        f"exits: {exits}"
    )
    print_emulated(document["emulated_accesses"])
    latency = document["latency_us"]
    if latency["p50"] is not None:
        print(f"latency    p50 {latency['p50']} us, p99 {latency['p99']} us, max {latency['max']} us")
    granule = format_size(document["granule"])
    print(
        f"memslots   {document['memslots']} at the end, granule {granule}, "
        f"{document['slot_bytes'] / (1 << 20):.1f} MiB of kernel memory to arm"
    )
    phases = ", ".join(f"{name} {1000 * value:.1f}" for name, value in document["setup_seconds"].items())
    print(f"set-up ms  {phases}")
    if document["collapse"] is not None:
        _print_collapse(document["collapse"])
    stops = document["collapse"] or document  # of a collapse also those from before it
    if stops["stops"]:
        print(f"stops      {stops['stops']} of the vCPUs, the longest {stops['longest_stop_us']} us")
    if document["stalls"]:
        print(
            f"stalls     {document['stalls']} times KVM spun on an access without an exit; the watchdog resolved it"
        )
    if document["poison"]["pages"] or document["poison"]["machine_checks"]:
        _print_poison(document["poison"])
    _print_comparison(document)
    if document["image_changed"] is not None:
        print(f"CHANGED    {document['image_changed']}: it may hold other bytes than the guest was given")


def _print_comparison(document: dict[str, Any]) -> None:
    if document["expected_checksum"] is None:
        why = "of a program" if document["workload"] == "program" else "without --image to compare with"
        print(f"checksum   guest {document['guest_checksum']} (nothing is expected {why})")
        return
    same = "equal" if document["guest_checksum"] == document["expected_checksum"] else "DIFFERENT"
    print(f"checksum   guest {document['guest_checksum']}, host {document['expected_checksum']}: {same}")
    wrong = f"WRONG at gpa {', '.join(document['wrong_pages'])}" if document["wrong_pages"] else "all exact"
    which = "present pages" if document["resident_limit_bytes"] is None else "pages, present or evicted,"
    print(f"bytes      {document['pages_checked']} {which} compared with the source: {wrong}")


def _places(document: dict[str, Any]) -> str:
    """Return where RAM lies in guest-physical space."""
    regions = GuestLayout(document["memory_bytes"], document["low_ram_end"]).regions
    return ", ".join(f"{each.gpa:#x} to {each.gpa + each.size:#x}" for each in regions)


def _print_poison(poison: dict[str, Any]) -> None:
    expected, addresses = poison["expected"], poison["addresses"]
    if expected is None:
        verdict = (
            f"at gpa {', '.join(addresses)} (nothing is expected of a program)" if addresses else "none taken"
        )
    elif addresses == expected and poison["machine_checks"] == len(expected):
        verdict = f"one for each of them that the guest touched, at gpa {', '.join(addresses) or 'none'}"
    else:
        verdict = f"WRONG: at gpa {', '.join(addresses) or 'none'}, expected {', '.join(expected) or 'none'}"
    print(f"poison     {len(poison['pages'])} pages, {poison['machine_checks']} machine checks: {verdict}")


def _print_collapse(collapse: dict[str, Any]) -> None:
    if not collapse["supported"]:
        print("collapse   nothing: this trap, this memory or this kernel (MADV_COLLAPSE, Linux 6.1) cannot")
    else:
        none = "" if collapse["stops"] else ", without a stop of the vCPUs"
        print(f"collapse   {collapse['pages_collapsed']} pages in {collapse['seconds']:.3f} s{none}")
    before, after = collapse["before"], collapse["after"]
    if after is None:
        return
    states = [f"{name} {_mapped(each)}" for name, each in (("before", before), ("after", after)) if each]
    ratio = collapse["retouch_ratio"]
    speed = "" if ratio is None else f"; the guest touches them {ratio:.2f} times as fast"
    print(f"mapped     {', '.join(states)}{speed}")


def _mapped(pages: dict[str, int | None]) -> str:
    return " + ".join(
        f"{'?' if count is None else count} of {name.removeprefix('pages_').upper()}"
        for name, count in pages.items()
    )


def leak_records(leaks: list[Leak]) -> list[dict[str, Any]]:
    """Return what the JSON document says of leaks."""
    return [
        {
            "kind": leak.kind.value,
            "gpa": None if leak.gpa is None else f"{leak.gpa:#x}",
            "origin": leak.origin,
            "detail": leak.detail,
        }
        for leak in leaks
    ]


def print_leaks(document: dict[str, Any]) -> None:
    """Print the leaks for people, a line each."""
    for leak in document["leaks"]:
        print(f"leak       {leak['kind']} at gpa {leak['gpa']}, by {leak['origin']}: {leak['detail']}")
    if not document["leaks"]:
        print("leaks      none found")
