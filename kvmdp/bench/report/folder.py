"""The report's folder: index.html, the figures as SVG, their numbers as CSV, and compare.json, the document itself.

A folder is ours if its compare.json bears the schema. It is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvmdp.bench.report.figure import Figure, Table
from kvmdp.bench.report.figures import figures
from kvmdp.bench.report.html import page
from kvmdp.bench.report.results import SCHEMA, Document, Results
from kvmdp.errors import KvmdpError
from kvmdp.interruption import Uninterrupted
from kvmdp.last_acts import last_act
from kvmdp.temporary import check_takes_files

DOCUMENT = "compare.json"
# What a report consists of: a folder that holds anything else is not replaced.
_SUFFIXES = (".html", ".svg", ".csv", ".json")

_TEMPORARY = ".kvmdp-"  # and eight characters: fits beside any name


class ReportError(KvmdpError, ValueError):
    """A folder cannot become a report's folder; the message is one sentence with a remedy."""


def check_folder(folder: str | Path) -> None:
    """Raise ReportError if no report could be written to `folder`: ask before a long run, not after it."""
    path = Path(folder)
    try:
        parent = path.resolve().parent
        if path.exists() and not path.is_dir():
            raise ReportError(f"{folder}: that is a file; name a folder for the report")
        if path.is_dir():
            _check_ours(path)
        elif not parent.is_dir():
            raise ReportError(f"{folder}: there is no folder {parent}; make it first")
    except OSError as error:
        raise ReportError(f"{folder}: {error.strerror}; name another folder for the report") from None
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ReportError(f"{folder}: no permission to write in {parent}; name another folder for the report")
    try:
        check_takes_files(parent)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ReportError(
            f"{folder}: no folder can be made in {parent} ({reason}); name another folder for the report"
        ) from None


def _check_ours(path: Path) -> None:
    names = sorted(each.name for each in path.iterdir())
    if not names:
        return
    if not _has_marker(path / DOCUMENT):
        raise ReportError(
            f"{path}: that folder is not empty and holds no report of kvmdp; name another or a new one"
        )
    strange = [name for name in names if not name.endswith(_SUFFIXES) or (path / name).is_dir()]
    if strange:
        raise ReportError(
            f"{path}: that folder holds {strange[0]}, which is no part of a report and would be lost; move it away"
        )


def _has_marker(path: Path) -> bool:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("schema") == SCHEMA


def write_report(document: Document, folder: str | Path) -> None:
    """Write the report of a comparison document (kvmdp.compare/1) to `folder`, which is made if absent.

    A report that is there already is replaced. Raises ReportError if the folder is not ours, OSError with the folder's
    name if there is no space or no permission; then the folder is as it was.
    """
    check_folder(folder)
    target = Path(folder).resolve()
    contents = files(document)
    try:
        with _new_folder(target.parent) as new:
            for name, text in contents.items():
                # JSON may name what UTF-8 cannot hold (half a surrogate pair).
                (new / name).write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
            # Temporary folders are for their owner alone; a report is a folder like any other.
            mask = os.umask(0)
            os.umask(mask)
            new.chmod(0o777 & ~mask)
            _replace(target, new)
    except OSError as error:
        raise OSError(error.errno, f"the report was not written: {error.strerror}", str(folder)) from None


@contextlib.contextmanager
def _new_folder(parent: Path) -> Iterator[Path]:
    """Make a folder in `parent`; what is at its name at the end of the block goes, whatever end that is."""
    with contextlib.ExitStack() as stack:
        with Uninterrupted():  # or a folder could be left that nothing knows of
            made = Path(tempfile.mkdtemp(dir=parent, prefix=_TEMPORARY))
            stack.enter_context(last_act(functools.partial(shutil.rmtree, made, ignore_errors=True)))
        yield made


def _replace(target: Path, new: Path) -> None:
    """Put `new` in the place of `target`, which may be absent, empty or an older report."""
    if not target.is_dir() or not any(target.iterdir()):
        new.replace(target)
        return
    # A folder that is not empty cannot be replaced in one step: set it aside, and back if the second step fails. No
    # interruption comes between the steps, where there is no report.
    with _new_folder(target.parent) as aside, Uninterrupted():
        target.replace(aside)
        try:
            new.replace(target)
        except BaseException:
            aside.replace(target)
            raise


def files(document: Document) -> dict[str, str]:
    """Return the report's files, name -> text. The same document gives the same text, byte for byte."""
    results = Results(document)
    drawn = figures(results)
    contents = {
        "index.html": page(results, drawn),
        DOCUMENT: json.dumps(document, separators=(",", ":")) + "\n",
    }
    for figure in drawn:
        contents |= {f"{panel.name}.svg": panel.render(standalone=True) + "\n" for panel in figure.panels}
        contents[f"{figure.name}.csv"] = _csv(figure)
    return contents


def _csv(figure: Figure) -> str:
    table: Table = figure.data or figure.table
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows(table.rows)
    return file.getvalue()
