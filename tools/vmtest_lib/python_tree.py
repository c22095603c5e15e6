"""Which files of the host make up its Python: interpreter, standard library, packages, shared libraries.

They are copied under their own paths, a virtual environment included, so that nothing needs to be relocated.
Test suites, editors and headers are left out. Bytecode files come along: the emulated CPU is slow at compiling.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import ENVIRONMENT, VmtestError

_PACKAGES = ("numpy", "pytest")
_LEFT_OUT = {
    *("test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "pydoc_data"),
    *("site-packages", "dist-packages", "include"),
}
_LEFT_OUT_FILES = re.compile(r"_tkinter\..*|_?test.*\.so|.*\.(a|pyi|pyx|pxd|h|exe)|.*\.opt-[12]\.pyc")
_LDD_LINE = re.compile(r"^\s+(?:\S+ => )?(/\S+) \(0x", re.MULTILINE)


def files() -> Iterator[Path]:
    """The files of this interpreter with numpy and pytest, by their paths, symbolic links not followed.

    Raises VmtestError (status 4) where one of the packages is not installed.
    """
    yield Path(sys.executable)
    # In a virtual environment this is the interpreter it was made of.
    yield Path(sys._base_executable)  # type: ignore[attr-defined]  # not in typeshed
    if sys.prefix != sys.base_prefix:
        yield Path(sys.prefix, "pyvenv.cfg")
    found = [*_standard_library(), *_packages()]
    yield from found
    yield from _libraries([Path(sys.executable), *(path for path in found if ".so" in path.suffixes)])


def bytecode(source: Path) -> Path | None:
    """The host's bytecode file for a Python source file, None where there is none."""
    compiled = source.parent / "__pycache__" / f"{source.stem}.{sys.implementation.cache_tag}.pyc"
    return compiled if source.suffix == ".py" and compiled.exists() else None


def shared_libraries(program: Path) -> list[Path]:
    """The shared libraries that a program needs; none for a static one."""
    return list(_libraries([program]))


def _standard_library() -> Iterator[Path]:
    for top, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith("config-")]
        if top.endswith("__pycache__"):
            tag = f".{sys.implementation.cache_tag}.pyc"
            names = [name for name in names if name.endswith(tag)]
        yield from (Path(top, name) for name in names if not _LEFT_OUT_FILES.fullmatch(name))


def _packages() -> Iterator[Path]:
    pending, seen = list(_PACKAGES), set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = next(iter(importlib.metadata.distributions(name=name)), None)
        # Packages of a Linux distribution do not list their files for Python.
        if name in _PACKAGES and (distribution is None or not distribution.files):
            raise VmtestError(
                f"{sys.executable} has no {name} that pip installed, which the emulated machine needs; start "
                "vmtest with another Python, or install it with: pip install numpy pytest",
                ENVIRONMENT,
            )
        if distribution is None:
            continue  # for another platform or Python
        requirements = [line for line in distribution.requires or () if "extra ==" not in line]
        pending += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements]
        for entry in distribution.files or ():
            if not _LEFT_OUT.intersection(entry.parts[:-1]) and not _LEFT_OUT_FILES.fullmatch(entry.name):
                path = Path(os.path.normpath(str(distribution.locate_file(entry))))
                if path.is_file():
                    yield path


def _libraries(binaries: Iterable[Path]) -> Iterator[Path]:
    listing = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
    yield from (Path(os.path.normpath(path)) for path in sorted(set(_LDD_LINE.findall(listing))))
