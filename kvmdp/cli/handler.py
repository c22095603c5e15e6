"""`kvmdp handler`: the process that the pages of `kvmdp run --handler` come from."""

from __future__ import annotations

import argparse
import contextlib
from typing import NoReturn

from kvmdp.cli.images import Image, add_image_options, open_image, parse_layout
from kvmdp.cli.leftovers import listening
from kvmdp.cli.output import UsageError, say
from kvmdp.cli.paths import check_distinct, reads, writes
from kvmdp.cli.sources import over_network
from kvmdp.peers.handler.server import PageServer
from kvmdp.peers.wire.endpoint import EndpointError
from kvmdp.size import format_size
from kvmdp.source.registry import open_synthetic


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
    add_image_options(parser)
    option("--latency", default="0", metavar="T", help="delay each fetch by T, such as 30us (default: 0)")
    option(
        "--bandwidth",
        default="0",
        metavar="B",
        help="share B among fetches, such as 10Gbit (default: 0, no limit)",
    )


def run(options: argparse.Namespace) -> NoReturn:
    """Serve until interrupted."""
    check_distinct(reads("--image", options.image), writes("--listen", options.listen))
    with contextlib.ExitStack() as stack:
        try:
            image = _image(options, stack)
            source = over_network(
                options, open_synthetic(options.synthetic) if image is None else image.source
            )
            listener = stack.enter_context(listening(options.listen))
        except (ValueError, EndpointError) as error:
            raise UsageError(str(error)) from None
        layout = "" if image is None else f" ({image.layout.kind})"
        low_ram_end = None if image is None else image.low_ram_end
        server = stack.enter_context(PageServer(listener, source, say, low_ram_end))
        say(f"serving {format_size(source.size)} from {source.name}{layout} at {options.listen}")
        server.run()


def _image(options: argparse.Namespace, stack: contextlib.ExitStack) -> Image | None:
    """Open the image that is to be served, if it is one; the stack closes it and says whether it has changed.

    Raises ValueError, ImageError among them.
    """
    if options.image is None:
        if options.image_layout is not None or options.image_format is not None:
            raise ValueError("--image-layout and --image-format are for --image: leave them out")
        return None
    image = open_image(options.image, parse_layout(options.image_layout), options.image_format, None)
    stack.callback(image.file.close)
    stack.callback(_say_change, image)
    return image


def _say_change(image: Image) -> None:
    change = image.change()
    if change is not None:
        say(change)
