"""The command line of tools/vmtest: options, what is said on stderr, and the exit status."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import initramfs, matrix, programs, qemu
from .apt import PrivateApt
from .errors import ENVIRONMENT, FAILED, INTERRUPTED, VmtestError
from .kernels import HERE, Kernel, Store, resolve, this_kernel
from .qemu import Machine

_DESCRIPTION = """\
Boot stock Debian kernels in QEMU, without hardware help, on an emulated AMD CPU with SVM and nested paging,
and run a command there with this checkout inside. The command's output and exit status come back."""
_USAGE = """\
%(prog)s [options] --kernel KERNEL [--kernel KERNEL ...] -- COMMAND ...
       %(prog)s [options] --matrix | --list | --kernel KERNEL --shell"""
_EPILOG = """\
KERNEL is 6.12 or 6.12.117 (the newest that begins so), newest, 6.6+ (the newest of the oldest series from 6.6
on), a package version or a package name. Environment variables that begin with KVMDP_ are passed on.

exit status: with one kernel that of the command; with several 0 if it was 0 everywhere, else 1. 1 also: the
kernel panicked or the time was over. 2: usage, or no such kernel. 4: QEMU, the network or something else is
missing. 130: interrupted."""


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say and return the exit status."""
    options = _parse(arguments)
    try:
        return _dispatch(options)
    except VmtestError as error:
        _say(str(error))
        return error.status
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output is gone. Python must not fail once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        _say(f"{error.filename or 'vmtest'}: {error.strerror}")
        return ENVIRONMENT


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vmtest",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        usage=_USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--list", action="store_true", help="list the kernels there are, and which are cached")
    kind.add_argument("--shell", action="store_true", help="an interactive shell instead of a command")
    kind.add_argument(
        "--matrix",
        action="store_true",
        help=f"every trap and workload, on the kernels given (default: {', '.join(matrix.KERNELS)})",
    )
    option = parser.add_argument
    option("--here", action="store_true", help="the matrix first on this machine's own kernel, without QEMU")
    option("--kernel", action="append", default=[], metavar="KERNEL", help="which kernel; may be repeated")
    option("--timeout", type=_seconds, default=1800, metavar="S", help="seconds a kernel (default: 1800)")
    option("--memory", type=_memory, default="3G", metavar="SIZE", help="in M or G (default: 3G)")
    option("--log", action="store_true", help="show the kernel's messages on stderr")
    option("--update-table", type=Path, metavar="FILE", help="write the matrix's results into FILE's table")
    option("--json", type=Path, metavar="FILE", help="write the matrix's results to FILE")
    option("--mirror", metavar="URL", help="Debian mirror (default: that of the machine's own apt)")
    option("--allow-expired", action="store_true", help="accept package lists past their date of validity")
    option("command", nargs="*", metavar="COMMAND", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if mistake := _mistake(options):
        parser.error(mistake)
    return options


def _mistake(options: argparse.Namespace) -> str | None:
    """What is wrong with options that are each right by themselves."""
    has_result_file = options.update_table or options.json
    if has_result_file and not options.matrix:
        return "--update-table and --json belong to --matrix"
    if options.here and not options.matrix:
        return "--here belongs to --matrix"
    if options.command and (options.list or options.shell or options.matrix):
        return "--list, --shell and --matrix take no command"
    if options.list or options.matrix:
        return None
    if not options.kernel:
        return "which kernel? Give --kernel, or see --list"
    if options.shell and len(options.kernel) > 1:
        return "--shell takes one --kernel"
    if options.shell and not sys.stdin.isatty():
        return "--shell needs a terminal on stdin"
    if not options.shell and not options.command:
        return "which command? Give it after --, or --shell"
    return None


def _seconds(text: str) -> float:
    seconds = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def _memory(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*[MG]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no memory size such as 3G or 2048M")
    return text


def _dispatch(options: argparse.Namespace) -> int:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "kvmdp", "vmtest")
    store = Store(cache, PrivateApt(cache / "apt", options.mirror, options.allow_expired))
    if options.list:
        return _list(store)
    qemu.program()
    if options.update_table:
        matrix.check_markers(options.update_table)
    kernels, notes = resolve(store, options.kernel or matrix.KERNELS)
    for note in notes:
        _say(note)
    if options.shell:
        folder = store.folder(kernels[0])
        with initramfs.build(folder / "modules", None) as image:
            return qemu.shell(Machine(folder / "vmlinuz", image.descriptor, options.memory))
    with programs.assembled(needed=options.matrix) as guests:
        if options.matrix:
            return _matrix(store, kernels, options, guests)
        statuses = [_run(store, kernel, options.command, options, guests)[0] for kernel in kernels]
    if len(kernels) == 1:
        return statuses[0]
    problems = [f"failed, status {status}" if status else "" for status in statuses]
    return _summarize(kernels, problems)


def _matrix(store: Store, kernels: Sequence[Kernel], options: argparse.Namespace, guests: Path | None) -> int:
    results, problems = [], []
    if options.here:
        kernels = [this_kernel(), *kernels]
    for kernel in kernels:
        here = kernel.suite == HERE
        status, report = _run_here(guests) if here else _run(store, kernel, matrix.JOB, options, guests)
        if status or not report:
            problems.append(f"no report, status {status}")
            continue
        results.append((kernel, json.loads(report)))
        bad = [name for name, cell in matrix.judge(*results[-1]).items() if not cell.good]
        problems.append(f"failed: {', '.join(bad)}" if bad else "")
    if results:
        print(matrix.table(results))
    if options.json:
        matrix.write_json(options.json, results)
    # A table that lacks a kernel would not say so.
    if options.update_table and len(results) == len(kernels):
        matrix.update(options.update_table, matrix.table(results))
    return _summarize(kernels, problems)


def _run_here(guests: Path | None) -> tuple[int, bytes]:
    """Run the matrix's checks on this machine, with these guest programs; return their exit status and report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        checkout = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "VMTEST_REPORT": str(report), programs.VARIABLE: str(guests)}
        done = subprocess.run([sys.executable, *matrix.JOB[1:]], cwd=checkout, env=environment)
        return done.returncode, report.read_bytes() if report.exists() else b""


def _summarize(kernels: Sequence[Kernel], problems: Sequence[str]) -> int:
    """Say how each kernel did, an empty problem being none, and return the exit status for all of them."""
    for kernel, problem in zip(kernels, problems, strict=True):
        _say(f"{kernel.version:<24} {problem or 'ok'}")
    return FAILED if any(problems) else 0


def _list(store: Store) -> int:
    kernels, complaints = store.available()
    for complaint in complaints:
        _say(f"apt: {complaint}")
    for kernel in kernels:
        cached = "cached" if store.folder(kernel).exists() else ""
        print(f"{kernel.version:<24} {kernel.suite:<18} {kernel.release:<32} {cached}".rstrip())
    return 0


def _run(
    store: Store,
    kernel: Kernel,
    command: Sequence[str],
    options: argparse.Namespace,
    guests: Path | None,
) -> tuple[int, bytes]:
    """Run `command` on one kernel and say how it went; return its exit status and its report, if it wrote one.

    `guests` is a folder with guest programs for the tests.
    """
    folder = store.folder(kernel)
    _say(f"{kernel.version}: booting {kernel.release}")
    try:
        with initramfs.build(folder / "modules", command, guests) as image:
            machine = Machine(folder / "vmlinuz", image.descriptor, options.memory)
            outcome = qemu.run(machine, image.end, options.timeout, options.log)
    except VmtestError as error:
        if error.status != FAILED:
            raise  # the next kernel would lack the same
        _say(f"{kernel.version}: {error}")
        return FAILED, b""
    for warning in outcome.warnings:
        _say(f"{kernel.version}: the kernel logged: {warning}")
    times = f"the command started after {outcome.started:.1f} s and ended after {outcome.ended:.1f} s"
    _say(f"{kernel.version}: exit {outcome.status}; {times}")
    return outcome.status, outcome.report


def _say(message: str) -> None:
    print(f"vmtest: {message}", file=sys.stderr, flush=True)
