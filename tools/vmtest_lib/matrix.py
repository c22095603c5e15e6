"""The standard matrix: its kernels, what each must be able to do, and the table of what it could.

The runs themselves are matrix_job.py's. A trap that a kernel must have and refuses is a failure, and so is one that
it cannot have and does not refuse: a trap that broke must not pass for one that is not there.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import USAGE, VmtestError
from .kernels import Kernel

# userfaultfd and mmio only; the oldest with marker; the oldest with memory-fault; the newest.
KERNELS = ("6.1", "6.6+", "6.18+", "newest")
JOB = ("python", "tools/vmtest_lib/matrix_job.py")
BEGIN = "<!-- vmtest table: begin; written by tools/vmtest --matrix --update-table -->"
END = "<!-- vmtest table: end -->"
# The first kernel that has what the trap needs; the others need nothing that is newer than the oldest kernel here.
_SINCE = {"memory-fault": (6, 18), "layered": (6, 18), "marker": (6, 6)}
_REFUSED = 4
# What a KVM cannot do for any guest, absent pages or not: (KVM module, check) -> why.
_LIMITS = {
    (
        "kvm_pvm",
        "vector, ring 0",
    ): "kvm_pvm emulates ring 0, and KVM's emulator does not know these instructions"
}


@dataclass(frozen=True)
class Judgement:
    """A cell of the table: whether it is as it must be, its words, and what there is to explain."""

    good: bool
    words: str
    remark: str = ""


def judge(kernel: Kernel, report: dict[str, Any]) -> dict[str, Judgement]:
    """Judge one kernel's report (matrix_job.py), by column of the table."""
    traps = dict.fromkeys(check["trap"] for check in report["checks"] if check["trap"])
    flavour = _host(report).get("kvm", "")
    columns = {trap: _judge_trap(kernel, trap, report["checks"], flavour) for trap in traps}
    for check in report["checks"]:
        if check["trap"] is None:
            good = check["status"] == 0
            columns[check["check"]] = Judgement(
                good, "ok" if good else "**fails**", "" if good else check["message"]
            )
    return columns


def _host(report: dict[str, Any]) -> dict[str, Any]:
    """What the probe says of the host, empty if it did not get so far."""
    return dict((report["probe"] or {}).get("host", {}))


def _judge_trap(kernel: Kernel, trap: str, checks: Sequence[dict[str, Any]], flavour: str) -> Judgement:
    mine = [check for check in checks if check["trap"] == trap]
    expected = kernel.series >= _SINCE.get(trap, (0, 0))
    if mine[0]["status"] == _REFUSED:
        return Judgement(not expected, "**refused**" if expected else "refused", mine[0]["message"])
    failed = [check for check in mine if check["status"]]
    limits = [_LIMITS[flavour, check["check"]] for check in failed if (flavour, check["check"]) in _LIMITS]
    if failed and len(limits) == len(failed):
        names = ", ".join(check["check"] for check in failed)
        return Judgement(expected, f"{len(mine) - len(failed)} of {len(mine)}", f"not {names}: {limits[0]}")
    if failed:
        names = ", ".join(check["check"] for check in failed)
        return Judgement(False, f"**fails**: {names}", failed[0]["message"])
    words = f"{len(mine)} of {len(mine)}"
    return Judgement(expected, words, "" if expected else "was to be refused on this kernel, and ran")


def table(results: Sequence[tuple[Kernel, dict[str, Any]]]) -> str:
    """The table, as Markdown, of kernels and their reports, and below it the sentences that explain its cells."""
    judged = [(kernel, judge(kernel, report)) for kernel, report in results]
    columns = list(dict.fromkeys(column for _, cells in judged for column in cells))
    lines = ["| kernel | KVM | " + " | ".join(f"`{column}`" for column in columns) + " |"]
    lines.append("| --- " * (len(columns) + 2) + "|")
    remarks = []
    for (kernel, report), (_, cells) in zip(results, judged, strict=True):
        words = [cells[column].words if column in cells else "" for column in columns]
        lines.append(f"| {kernel.upstream} | {_kvm(report)} | " + " | ".join(words) + " |")
        remarks += [
            f"- {kernel.upstream}, `{name}`: {cell.remark}" for name, cell in cells.items() if cell.remark
        ]
    return "\n".join([*lines, *([""] if remarks else []), *remarks])


def _kvm(report: dict[str, Any]) -> str:
    host = _host(report)
    if not host:
        return "unknown"
    return f"{host['kvm']}, {'nested' if host['nested_paging'] else 'shadow'} paging"


def check_markers(path: Path) -> None:
    """Raise VmtestError (status 2) unless `path` is a text file with the two markers of the table."""
    try:
        text = path.read_text()
    except OSError as error:
        raise VmtestError(f"{path} cannot be read: {error.strerror}", USAGE) from error
    if not 0 <= text.find(BEGIN) < text.find(END):
        raise VmtestError(
            f"{path} has no place for the table: it needs the lines {BEGIN!r} and {END!r}", USAGE
        )


def update(path: Path, text: str) -> None:
    """Write `text` between the markers of the file `path`."""
    before, _, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def write_json(path: Path, results: Sequence[tuple[Kernel, dict[str, Any]]]) -> None:
    """Write all reports, each with its kernel and the judgement, to `path`."""
    kernels = [
        {
            "version": kernel.version,
            "release": kernel.release,
            "good": {name: cell.good for name, cell in judge(kernel, report).items()},
            **report,
        }
        for kernel, report in results
    ]
    path.write_text(json.dumps({"schema": "kvmdp.vmtest/1", "kernels": kernels}, indent=1) + "\n")
