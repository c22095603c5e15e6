"""Builds the initramfs: busybox, this Python with its packages, the checkout, kernel modules, a command.

The checkout lies in /kvmdp, where the command starts; `python`, `python3`, `pytest` and `kvmdp` are on PATH.
"""

import contextlib
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import programs, python_tree
from .errors import ENVIRONMENT, VmtestError
from .kernels import MODULES
from .newc import NewcWriter

CHECKOUT = Path(__file__).resolve().parents[2]
REPORT = "/run/vmtest-report"
_GUESTS = "/vmtest/guests"
_ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PYTHONUNBUFFERED": "1",  # the output of a command that hangs has to be seen
    "PYTHONDONTWRITEBYTECODE": "1",  # the files live in memory
    "VMTEST_REPORT": REPORT,
}
_KVMDP = f"#!{sys.executable}\nimport sys\nfrom kvmdp.cli.entry import entry\nsys.exit(entry())\n"


class Initramfs(NamedTuple):
    """The descriptor of the memfd that holds a built initramfs, and the mark that ends the command's output."""

    descriptor: int
    end: bytes


@contextlib.contextmanager
def build(modules: Path, command: Sequence[str] | None, guests: Path | None = None) -> Iterator[Initramfs]:
    """Build an initramfs with the kernel modules in `modules` that runs `command`, None for a shell.

    `guests` is a folder with guest programs for the tests. The image exists as long as the context. Raises VmtestError
    (status 4) where the host lacks what is to be copied.
    """
    # A command may print whatever it likes: only a mark made for this run cannot be mistaken.
    end = b"\0vmtest-end-" + secrets.token_hex(8).encode() + b"\0"
    with open(os.memfd_create("vmtest-initramfs"), "wb") as output:
        image = NewcWriter(output)
        _add_system(image)
        _add_python(image)
        for path in _checkout():
            image.file(Path("/kvmdp", path), CHECKOUT / path)
            if compiled := python_tree.bytecode(CHECKOUT / path):
                image.file(Path("/kvmdp", compiled.relative_to(CHECKOUT)), compiled)
        for order, name in enumerate(MODULES):
            if (modules / f"{name}.ko").exists():
                image.file(f"/vmtest/modules/{order:02}-{name}.ko", modules / f"{name}.ko")
        passed = {name: value for name, value in os.environ.items() if name.startswith("KVMDP_")}
        if guests is not None:
            for path in guests.iterdir():
                image.file(Path(_GUESTS, path.name), path)
            passed[programs.VARIABLE] = _GUESTS
        exports = [f"export {name}={shlex.quote(value)}\n" for name, value in (_ENVIRONMENT | passed).items()]
        image.data("/vmtest/environment", "".join(exports).encode())
        image.data("/vmtest/end", end)
        if command is not None:
            image.data("/vmtest/command", f"exec {shlex.join(command)}\n".encode())
        image.close()
        output.flush()
        yield Initramfs(output.fileno(), end)


def _add_system(image: NewcWriter) -> None:
    """Add busybox under all its names, the first process, and the few files that programs expect."""
    found = shutil.which("busybox")
    if found is None:
        raise VmtestError(
            "busybox is not installed; install it with: apt-get install busybox-static", ENVIRONMENT
        )
    busybox = Path(found)
    image.file("/bin/busybox", busybox)
    for library in python_tree.shared_libraries(busybox):
        image.host_path(library)
    applets = subprocess.run([busybox, "--list"], stdout=subprocess.PIPE, text=True, check=True).stdout
    for applet in applets.split():
        image.symlink(f"/bin/{applet}", "busybox")
    image.data("/init", Path(__file__).with_name("init.sh").read_bytes(), 0o755)
    image.device("/dev/console", 5, 1)
    for folder in ("/proc", "/sys", "/run", "/root"):
        image.directory(folder)
    image.directory("/tmp", 0o1777)
    image.data("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
    image.data("/etc/group", b"root:x:0:\nkvm:x:106:\nnogroup:x:65534:\n")
    image.data("/etc/hosts", b"127.0.0.1 localhost vmtest\n")


def _add_python(image: NewcWriter) -> None:
    for path in python_tree.files():
        image.host_path(path)
    interpreter = Path(sys.executable)
    # Beside the interpreter, where Python looks for the mark of a virtual environment.
    for name in ("python", "python3"):
        image.symlink(interpreter.with_name(name), interpreter.name)
    image.data("/usr/local/bin/kvmdp", _KVMDP.encode(), 0o755)
    image.data(Path(sysconfig.get_path("purelib"), "vmtest-checkout.pth"), b"/kvmdp\n")


def _checkout() -> Iterator[Path]:
    """The checkout's files, relative to it: tracked and new ones; without git all that are not hidden."""
    listing = ["git", "-C", str(CHECKOUT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (CHECKOUT / ".git").exists() and shutil.which("git"):
        names = subprocess.run(listing, stdout=subprocess.PIPE, check=True).stdout.split(b"\0")
        paths = [Path(os.fsdecode(name)) for name in names if name]
    else:
        every = (path.relative_to(CHECKOUT) for path in CHECKOUT.rglob("*"))
        paths = [path for path in every if not any(part.startswith(".") for part in path.parts)]
    # A file that was deleted and not yet committed is still listed.
    yield from (path for path in paths if (CHECKOUT / path).is_file() and "__pycache__" not in path.parts)
