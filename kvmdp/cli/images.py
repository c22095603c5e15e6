"""Images that the user names: looked at before they are believed, and laid out as the user says they are."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from kvmdp.cli.output import say
from kvmdp.memory.holes import HOLES, OUR_HOLE, Hole, parse_hole
from kvmdp.memory.layout import HIGH_RAM_BASE, GuestLayout
from kvmdp.page import PAGE_SIZE
from kvmdp.size import format_size
from kvmdp.source.base import PageSource, read_pages
from kvmdp.source.image import ImageError, ImageSource
from kvmdp.source.registry import open_source
from kvmdp.source.without_hole import WithoutHole

_KINDS = ("packed", "physical")
_RESET_VECTOR = 16  # bytes below 4 GiB at which a PC's firmware begins


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """How memory lies in an image: `kind`, "packed" (RAM alone) or "physical" (RAM's hole too), and the `hole`.

    `given` is False if the user has not said so.
    """

    kind: str = "packed"
    hole: Hole = OUR_HOLE
    given: bool = False


@dataclass(frozen=True, slots=True)
class Image:
    """An image that has been opened: `file`, and the `source` that is RAM as it lies in that.

    `file` is no file where the image is named by a scheme (`kvmdp.source.registry`). `low_ram_end` is the gpa at which
    the hole begins of the machine that the image is of.
    """

    file: PageSource
    source: PageSource
    layout: ImageLayout
    low_ram_end: int

    def change(self) -> str | None:
        """Return in a sentence that the file has changed since it was opened, and how; None if it has not.

        What is no file is taken not to change.
        """
        how = self.file.change() if isinstance(self.file, ImageSource) else None
        return None if how is None else f"image {self.file.name!r} changed while running: {how}"


def add_image_options(group: argparse._ActionsContainer) -> None:
    """Add those that say what kind of file `--image` is."""
    group.add_argument(
        "--image-format",
        choices=("raw",),
        help="raw: take the image's bytes for memory whatever they look like (default: refuse other formats)",
    )
    group.add_argument(
        "--image-layout",
        metavar="KIND[:hole=WHERE]",
        help="packed: the image is RAM alone; physical: it has the hole below 4G too, as of a dump from address 0. The "
        f"hole begins as in a machine of QEMU ({', '.join(HOLES)}), or at a size (default: "
        f"packed:hole={format_size(OUR_HOLE.start)})",
    )


def parse_layout(text: str | None) -> ImageLayout:
    """Return what `--image-layout` says, or the default for None. Raises ValueError."""
    if text is None:
        return ImageLayout()
    kind, colon, rest = text.partition(":")
    key, equals, hole = rest.partition("=")
    if kind not in _KINDS or (colon and (key != "hole" or not equals)):
        raise ValueError(
            f"--image-layout {text}: give {' or '.join(_KINDS)}, and where RAM's hole begins if not at "
            f"{format_size(OUR_HOLE.start)}, as {kind if kind in _KINDS else _KINDS[0]}:hole=q35"
        )
    try:
        return ImageLayout(kind, parse_hole(hole) if colon else OUR_HOLE, given=True)
    except ValueError as error:
        raise ValueError(f"--image-layout {text}: {error}") from None


def open_image(spec: str, layout: ImageLayout, image_format: str | None, memory: int | None) -> Image:
    """Open an image, named by its path or by a scheme, for a machine with `memory` bytes of RAM.

    `memory` None is as much as the image has. Raises ImageError or ValueError, one sentence, for what cannot be an
    image laid out like that, and what the opener of the scheme raises.
    """
    file = open_source(spec)
    try:
        if isinstance(file, ImageSource):
            _check_format(file, image_format)
        elif image_format is not None:
            raise ValueError(f"--image-format is for files, and {spec} is none: leave it out")
        source, low_ram_end = _lay_out(file, layout, memory)
    except BaseException:
        file.close()
        raise
    if isinstance(file, ImageSource) and file.tail_bytes:
        say(
            f"the image's last page has {file.tail_bytes} of {PAGE_SIZE} bytes: the rest of it reads as zeros"
        )
    return Image(file, source, layout, low_ram_end)


def _check_format(file: ImageSource, image_format: str | None) -> None:
    """Raise ImageError for a file that seems to be no raw memory, unless the user says that it is."""
    if image_format is None and file.format is not None:
        raise ImageError(
            f"image {file.name!r} is {file.format.title}, not raw memory: {file.format.remedy(file.name)}; or have its "
            "bytes taken as they are with --image-format raw"
        )


def _lay_out(file: PageSource, layout: ImageLayout, memory: int | None) -> tuple[PageSource, int]:
    """Return RAM as it lies in the file, and the gpa at which its hole begins. Raises ValueError."""
    if layout.kind == "packed":
        if not layout.given and _has_firmware(file):
            raise ValueError(
                f"image {file.name!r} has a PC's firmware just below 4G, as a dump from address 0 does: give "
                "--image-layout physical, or --image-layout packed if RAM has it there"
            )
        return file, layout.hole.begins_at(memory or file.size)
    low_ram_end = _hole_of_physical(file, layout.hole, memory)
    if file.size <= low_ram_end:
        return file, low_ram_end
    if file.size > HIGH_RAM_BASE:
        return WithoutHole(file, low_ram_end, HIGH_RAM_BASE), low_ram_end
    if memory is None or memory > low_ram_end:
        raise ValueError(
            f"image {file.name!r} has {format_size(file.size)} and ends in RAM's hole, from {format_size(low_ram_end)} "
            "to 4G: say with --memory how much RAM lies below that, or give another --image-layout"
        )
    GuestLayout(memory, low_ram_end)  # says what is wrong with the size
    return WithoutHole(file, memory, file.size), low_ram_end


def _hole_of_physical(file: PageSource, hole: Hole, memory: int | None) -> int:
    if memory is None:
        memory = hole.memory_behind(file.size) if file.size > HIGH_RAM_BASE else file.size
    return hole.begins_at(memory)


def _has_firmware(file: PageSource) -> bool:
    """Whether a PC's CPU would find code where it begins: a far jump to the firmware's segment."""
    if file.size < HIGH_RAM_BASE:
        return False
    page = read_pages(file, np.array([HIGH_RAM_BASE // PAGE_SIZE - 1])).tobytes()
    code = page[-_RESET_VECTOR:]
    return code[:1] == b"\xea" and code[3:5] == b"\x00\xf0"
