"""Writes the kernel's initramfs format: an uncompressed cpio archive of the `newc` kind.

Follows Documentation/driver-api/early-userspace/buffer-format.rst of the kernel. Sizes are in bytes, times in
whole seconds since 1970. File times are kept: Python compares them with those in its bytecode files.
"""

import os
import stat
from pathlib import Path, PurePath, PurePosixPath
from typing import BinaryIO

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


class NewcWriter:
    """Writes entries to `output`, a binary file. Parent directories come by themselves.

    Paths are absolute, as the booted system will see them. The first entry of a path wins: adding it again
    does nothing, so that sets of files may overlap.
    """

    def __init__(self, output: BinaryIO) -> None:
        self._output = output
        self._inode = 0
        self._written: set[PurePosixPath] = {PurePosixPath("/")}

    def directory(self, path: str | PurePath, mode: int = 0o755) -> None:
        """Add a directory with the permission bits `mode`."""
        self._add(PurePosixPath(path), stat.S_IFDIR | mode, b"", 0)

    def symlink(self, path: str | PurePath, target: str) -> None:
        """Add a symbolic link at `path` that points to `target`."""
        self._add(PurePosixPath(path), stat.S_IFLNK | 0o777, os.fsencode(target), 0)

    def data(self, path: str | PurePath, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file that holds `content`."""
        self._add(PurePosixPath(path), stat.S_IFREG | mode, content, 0)

    def device(self, path: str | PurePath, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device node."""
        self._add(PurePosixPath(path), stat.S_IFCHR | mode, b"", 0, (major, minor))

    def file(self, path: str | PurePath, source: Path) -> None:
        """Add a copy of the host's file `source`: its content (links followed), permissions and time."""
        status = source.stat()
        mode = stat.S_IFREG | stat.S_IMODE(status.st_mode)
        self._add(PurePosixPath(path), mode, source.read_bytes(), int(status.st_mtime))

    def host_path(self, path: Path) -> None:
        """Add the host's file `path` under the same path, and the symbolic links that lead from it to it."""
        while path.is_symlink():
            target = path.readlink()
            self.symlink(path, str(target))
            path = Path(os.path.normpath(path.parent / target))
        self.file(path, path)

    def close(self) -> None:
        """Write the end of the archive. `output` stays open."""
        self._write(_TRAILER, 0, b"", 0, (0, 0))

    def _add(
        self, path: PurePosixPath, mode: int, content: bytes, mtime: int, device: tuple[int, int] = (0, 0)
    ) -> None:
        if path in self._written:
            return
        if path.parent not in self._written:
            self.directory(path.parent)
        self._written.add(path)
        self._write(str(path).lstrip("/"), mode, content, mtime, device)

    def _write(self, name: str, mode: int, content: bytes, mtime: int, device: tuple[int, int]) -> None:
        self._inode += 1
        encoded = os.fsencode(name) + b"\0"
        owner, links, on_device, checksum = (0, 0), 1, (0, 0), 0
        fields = [self._inode, mode, *owner, links, mtime, len(content)]
        fields += [*on_device, *device, len(encoded), checksum]
        header = _MAGIC + b"".join(b"%08X" % field for field in fields) + encoded
        self._output.write(header + bytes(-len(header) % 4))
        self._output.write(content)
        self._output.write(bytes(-len(content) % 4))
