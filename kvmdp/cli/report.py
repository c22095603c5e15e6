"""`kvmdp report`: tables and figures from what `kvmdp compare`, `kvmdp bench` or a trace has written."""

from __future__ import annotations

import argparse

import numpy as np

from kvmdp.bench.report.folder import DOCUMENT, ReportError, check_folder, write_report
from kvmdp.bench.report.load import load
from kvmdp.bench.report.results import Document, trace_name
from kvmdp.bench.report.table import claim_lines, table
from kvmdp.cli.output import EXIT_OK, UsageError, say
from kvmdp.cli.paths import check_distinct, fills, reads
from kvmdp.cli.result_files import OutputError, ResultFiles
from kvmdp.page import PAGE_SIZE


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "report",
        allow_abbrev=False,
        help="tables and figures from a written comparison, bench or trace",
        description="Print what FILE holds, and write it as a page with figures. FILE is the JSON of kvmdp compare or "
        "of kvmdp bench, or a trace. Nothing is measured; no KVM is needed.",
    )
    parser.add_argument("file", metavar="FILE", help="comparison or bench (JSON), or trace (JSON Lines)")
    parser.add_argument(
        "--report", metavar="DIR", help="write index.html, SVG and CSV files to DIR (default: print only)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read, print, write the folder, return the exit status."""
    check_distinct(reads("FILE", options.file), fills("--report", options.report, DOCUMENT))
    try:
        if options.report is not None:
            check_folder(options.report)
        document = load(options.file)
    except ReportError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"{options.file}: {error.strerror}; give a file that can be read") from None
    _print(document)
    files = ResultFiles()
    write_folder(files, options.report, document)
    return files.settle(EXIT_OK)


def write_folder(files: ResultFiles, folder: str | None, document: Document) -> None:
    """Write the report's folder, and say so; nothing if `folder` is None."""
    if folder is None:
        return

    def write() -> None:
        try:
            write_report(document, folder)
        except ReportError as error:  # it has become another folder since it was looked at
            raise OutputError(str(error)) from None
        say(f"report written: {folder}/index.html")

    files.write("--report", folder, write)


def _print(document: Document) -> None:
    printed = table(document) if document["benches"] else trace_lines(document)
    if document["claims"]:
        printed += ["", *claim_lines(document)]
    for line in printed:
        print(line)


def trace_lines(document: Document) -> list[str]:
    """Return a summary, two lines a traced run."""
    printed = []
    for name, trace in document["traces"].items():
        records = trace["records"]
        pages = sum(record[2] for record in records) // PAGE_SIZE
        printed.append(f"{trace_name(name, trace)}: {len(records)} faults, {pages} pages present")
        if records:
            p50, p99, most = np.percentile([record[4] for record in records], [50, 99, 100])
            origins = dict.fromkeys(sorted(record[3] for record in records))
            counts = (f"{origin} {sum(record[3] == origin for record in records)}" for origin in origins)
            printed.append(
                f"    last after {records[-1][0] / 1e6:.3f} s; p50 {p50:.1f} us, p99 {p99:.1f} us, max {most:.1f} us; "
                f"{', '.join(counts)}"
            )
    return printed
