"""`kvmdp handler`: the process that the pages of `kvmdp run --handler` come from."""

from __future__ import annotations

import argparse
from typing import NoReturn

from kvmdp.cli.leftovers import listening
from kvmdp.cli.output import UsageError, say
from kvmdp.memory.size import format_size, parse_size
from kvmdp.source.base import PageSource
from kvmdp.source.image import ImageSource
from kvmdp.source.network import NetworkSource, parse_bandwidth, parse_latency
from kvmdp.source.serving import PageServer
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.wire.endpoint import EndpointError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "handler",
        allow_abbrev=False,
        help="serve the faults of machines in other processes",
        description="Listen for machines (kvmdp run --handler PATH) and serve them, several at the same time, until "
        "interrupted: each fault comes as a record, the pages are written straight into the machine's RAM.",
        epilog="SIZE is in bytes, or has K, M, G or T behind it (powers of 1024).",
    )
    parser.set_defaults(run=run)
    option = parser.add_argument
    option(
        "--listen", required=True, metavar="PATH", help="Unix socket to listen at (default: none, give one)"
    )
    pages = parser.add_mutually_exclusive_group(required=True)
    pages.add_argument("--image", metavar="FILE", help="raw memory image to serve (default: none)")
    pages.add_argument(
        "--synthetic",
        metavar="SIZE[,SEED]",
        help="serve so much synthetic memory, as kvmdp run has (default: none)",
    )
    option("--latency", default="0", metavar="T", help="delay each fetch by T, such as 30us (default: 0)")
    option(
        "--bandwidth",
        default="0",
        metavar="B",
        help="share B among fetches, such as 10Gbit (default: 0, no limit)",
    )


def run(options: argparse.Namespace) -> NoReturn:
    """Serve until interrupted."""
    try:
        source = _source(options)
    except ValueError as error:
        raise UsageError(str(error)) from None
    try:
        with listening(options.listen) as listener, PageServer(listener, source, say) as server:
            say(f"serving {format_size(source.size)} from {source.name} at {options.listen}")
            server.run()
    except EndpointError as error:
        raise UsageError(str(error)) from None
    finally:
        source.close()


def _source(options: argparse.Namespace) -> PageSource:
    """Open what is to be served. Raises ValueError, ImageError among them."""
    latency, bandwidth = parse_latency(options.latency), parse_bandwidth(options.bandwidth)
    source: PageSource
    if options.image is not None:
        source = ImageSource(options.image)
    else:
        size, _, seed = options.synthetic.partition(",")
        if seed and not seed.isdecimal():
            raise ValueError(f"--synthetic {options.synthetic}: the seed is a number, such as in 64M,1")
        source = SyntheticSource(parse_size(size), int(seed or 0))
    return NetworkSource(source, latency, bandwidth) if latency or bandwidth else source
