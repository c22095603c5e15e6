"""Sources by what the user writes: `scheme:rest`, or the path of an image, which has no scheme.

A new scheme is one module and one `register`. A file whose name looks like a scheme's is named with a folder: ./nbd:x.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from kvmdp.size import parse_size
from kvmdp.source.base import PageSource
from kvmdp.source.image import ImageSource
from kvmdp.source.synthetic import SyntheticSource

# Opens what stands behind the colon. Raises ValueError for what makes no sense, SourceError or OSError where it fails.
Opener = Callable[[str], PageSource]

SCHEMES: dict[str, Opener] = {}

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")


def register(scheme: str, opener: Opener) -> None:
    """Add a scheme: `opener` opens the source of `scheme:rest`, and is given the rest.

    Raises ValueError if there is one of that name, or if it is none: a small letter, then more of them, digits, + . -
    """
    if scheme in SCHEMES:
        raise ValueError(f"there is a source {scheme} already: give yours another name")
    if _SCHEME.fullmatch(scheme) is None:
        raise ValueError(f"{scheme!r} is no scheme: give small letters, digits, +, . and -, a letter first")
    SCHEMES[scheme] = opener


def open_source(spec: str) -> PageSource:
    """Open the source `scheme:rest`, or the image at a path. It is the caller's to close.

    What begins with no scheme that there is, is a path. Raises ValueError, ImageError among them, one sentence, and
    what the scheme's opener raises.
    """
    scheme, colon, rest = spec.partition(":")
    if colon and scheme in SCHEMES:
        return SCHEMES[scheme](rest)
    if colon and _SCHEME.fullmatch(scheme) and not os.path.lexists(spec):
        raise ValueError(
            f"image {spec!r} does not exist, nor is there a source {scheme!r}: check the path, or choose from "
            f"{', '.join(SCHEMES)}"
        )
    return ImageSource(spec)


def open_synthetic(text: str) -> SyntheticSource:
    """Open SIZE[,SEED], so much synthetic memory. Raises ValueError."""
    size, _, seed = text.partition(",")
    if seed and not seed.isdecimal():
        raise ValueError(f"synthetic memory {text}: the seed is a number, such as in 64M,1")
    return SyntheticSource(parse_size(size), int(seed or 0))


register("synthetic", open_synthetic)
