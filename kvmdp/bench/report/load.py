"""Read what a report is made from: a comparison or bench document (JSON), or a trace (JSON Lines)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvmdp.bench.claims import claims
from kvmdp.bench.comparison import SCHEMA as BENCH_SCHEMA
from kvmdp.bench.report.folder import ReportError, files
from kvmdp.bench.report.results import SCHEMA, Document, from_bench, from_traces
from kvmdp.bench.text_file import read_text
from kvmdp.bench.trace import SCHEMA as TRACE_SCHEMA


def load(path: str | Path) -> Document:
    """Return the comparison document (kvmdp.compare/1) that the file holds, or that is made of what it holds.

    A bench document and a trace become a comparison of their own, without claims: one bench cannot judge them. Raises
    ReportError, one sentence, for anything that no report can be made of; OSError if the file cannot be read.
    """
    try:
        text = read_text(path)
    except UnicodeDecodeError:
        raise ReportError(
            f"{path}: not a text file; give the JSON of kvmdp compare or bench, or a trace"
        ) from None
    except ValueError as error:
        raise ReportError(f"{error}: give the JSON of kvmdp compare or bench, or a trace") from None
    try:
        document = _document(text)
        files(document)
    except (AttributeError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        # Every field that a report reads has been read by now: what is amiss shows here, not half-way through.
        raise ReportError(
            f"{path}: {_reason(error)}; give the JSON of kvmdp compare or bench, or a trace"
        ) from None
    return document


def _document(text: str) -> Document:
    first = text.partition("\n")[0]
    schema = _schema(first)
    if schema == TRACE_SCHEMA:
        return from_traces(_runs(text))
    found: Document = json.loads(text)
    if not isinstance(found, dict):
        raise ReportError("its JSON is no object, which is what a result is")
    schema = found.get("schema")
    if schema == BENCH_SCHEMA:
        return from_bench(found)
    if schema != SCHEMA:
        raise ReportError(f"its schema is {schema!r}, not {SCHEMA}, {BENCH_SCHEMA} or {TRACE_SCHEMA}")
    return found if found.get("claims") else found | {"claims": claims(found)}


def _schema(line: str) -> Any:
    try:
        header = json.loads(line)
    except ValueError:
        return None
    return header.get("schema") if isinstance(header, dict) else None


def _runs(text: str) -> list[tuple[Document, list[Any]]]:
    """Return the runs of a trace: header and records of each."""
    runs: list[tuple[Document, list[Any]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found = json.loads(line)
        except ValueError:
            raise ReportError(f"line {number} of the trace is not JSON (was the run ended early?)") from None
        if isinstance(found, dict):
            runs.append((found, []))
        elif isinstance(found, list) and len(found) == 6:
            runs[-1][1].append(found)
        else:
            raise ReportError(f"line {number} of the trace is neither a header nor a record of 6 fields")
    return runs


def _reason(error: Exception) -> str:
    if isinstance(error, ReportError):
        return str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON (line {error.lineno}: {error.msg})"
    if isinstance(error, KeyError):
        return f"there is no {error.args[0]!r} where a report needs it"
    return f"not as a report needs it ({error})"
