"""Where the pages of `kvmdp run` come from: an image, a handler, or numbers that are made up."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass

from kvmdp.cli.images import Image, ImageLayout, open_image, parse_layout
from kvmdp.cli.lists import given_mode
from kvmdp.cli.output import say
from kvmdp.memory.backings import backing_class
from kvmdp.memory.layout import GuestLayout
from kvmdp.peers.handler.source import HandlerSource
from kvmdp.size import format_size, parse_size
from kvmdp.source.base import PageSource
from kvmdp.source.network import NetworkSource, parse_bandwidth, parse_latency
from kvmdp.source.synthetic import SyntheticSource
from kvmdp.trap.fits import Together, check

_DEFAULT_MEMORY = 64 << 20


@dataclass(frozen=True, slots=True)
class Sources:
    """`source`, where pages come from; `reference`, what they are compared with if that is something else.

    `image` is the image that one of them reads, if one does; `low_ram_end` the gpa at which the machine's hole begins.
    """

    source: PageSource
    reference: PageSource | None
    image: Image | None
    low_ram_end: int

    def image_change(self) -> str | None:
        """Return in a sentence that the image has changed since it was opened; None if it has not, or there is none."""
        return None if self.image is None else self.image.change()


def open_sources(options: argparse.Namespace, stack: contextlib.ExitStack) -> Sources:
    """Open what the options name; the stack closes it. Raises ValueError, ImageError among them, EndpointError."""
    layout = parse_layout(options.image_layout)
    memory = None if options.memory is None else parse_size(options.memory)
    if options.handler is not None:
        _check_handler(options)
    if options.image is None:
        _check_no_image(options, layout)
        image = None
    else:
        image = open_image(options.image, layout, options.image_format, memory)
        stack.callback(image.file.close)
    if options.handler is not None:
        return _handler(options, stack, layout, memory, image)
    if image is not None:
        return Sources(over_network(options, image.source), None, image, image.low_ram_end)
    size = _DEFAULT_MEMORY if memory is None else memory
    low_ram_end = layout.hole.begins_at(size)
    GuestLayout(size, low_ram_end)  # says what is wrong with the size, before anything takes so much memory
    synthetic = SyntheticSource(size, options.seed)
    stack.callback(synthetic.close)
    return Sources(over_network(options, synthetic), None, None, low_ram_end)


def _check_no_image(options: argparse.Namespace, layout: ImageLayout) -> None:
    """Raise ValueError for what is said of an image when there is none."""
    if layout.kind == "physical":
        raise ValueError("--image-layout physical is for --image: name an image, or say packed")
    if options.image_format is not None:
        raise ValueError("--image-format is for --image: name an image, or leave it out")


def _check_handler(options: argparse.Namespace) -> None:
    """Raise ValueError for memory that a handler cannot fill, and for a network that would not be on its way."""
    if parse_latency(options.latency) or parse_bandwidth(options.bandwidth):
        raise ValueError(
            "--latency and --bandwidth with --handler: the network is between the handler and its pages; give them to "
            "kvmdp handler"
        )
    backing = backing_class(options.backing)
    try:
        check(Together(backing, mode=given_mode(options), handler=True))
    except ValueError as error:
        raise ValueError(f"--handler: {error}") from None


def _handler(
    options: argparse.Namespace,
    stack: contextlib.ExitStack,
    layout: ImageLayout,
    memory: int | None,
    image: Image | None,
) -> Sources:
    """Find the handler; an image beside it is compared with. Raises ValueError, EndpointError."""
    handler = HandlerSource(options.handler, options.handler_timeout, say)
    stack.callback(handler.close)
    if image is not None and image.source.size != handler.size:
        raise ValueError(
            f"the image has {format_size(image.source.size)}, that of the handler {format_size(handler.size)}: --image "
            "beside --handler names a copy of what the handler serves, to compare with"
        )
    ours = layout.hole.begins_at(memory or handler.size) if image is None else image.low_ram_end
    theirs = handler.low_ram_end
    if theirs is None:
        return Sources(handler, None if image is None else image.source, image, ours)
    if theirs != ours and (image is not None or layout.given):
        raise ValueError(
            f"the handler serves memory whose hole begins at {format_size(theirs)}, and here it is to begin at "
            f"{format_size(ours)}: give the --image-layout that the handler was given"
        )
    return Sources(handler, None if image is None else image.source, image, theirs)


def over_network(options: argparse.Namespace, source: PageSource) -> PageSource:
    """Return the source at the far end of the network that the options ask for, if they do. Raises ValueError."""
    latency, bandwidth = parse_latency(options.latency), parse_bandwidth(options.bandwidth)
    return NetworkSource(source, latency, bandwidth) if latency or bandwidth else source
