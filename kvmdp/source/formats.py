"""What a file is that is no raw memory: the formats that memory, disks and archives come in, told by their first bytes.

A table of magic numbers, each with the command that makes raw bytes of such a file. Raw memory has no magic number of
its own; none of these is how a PC's memory begins (an interrupt vector table, or zeros).

Sources: the ELF specification; makedumpfile's and LiME's headers; the file formats' own documents for the rest.

Units: bytes.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

HEAD_BYTES = 512  # of a file's beginning that is looked at
TAIL_BYTES = 512  # and of its end: a VHD of fixed size has its mark there alone

# Where a mark is, and its bytes; a negative place counts from the file's end.
Mark = tuple[int, bytes]


@dataclass(frozen=True, slots=True)
class Format:
    """A format that files come in.

    `name`; `title`, what a file of it is, to go behind "is"; `marks`, of which one row suffices, and all of a row are
    there; `command`, what makes raw bytes of it, with {path} and {path}.raw; "" if there is no such command.
    """

    name: str
    title: str
    marks: tuple[tuple[Mark, ...], ...]
    command: str

    def matches(self, head: bytes, tail: bytes) -> bool:
        """Whether a file that begins with `head` and ends with `tail` is of this format."""
        return any(all(_has(head, tail, *mark) for mark in row) for row in self.marks)

    def remedy(self, path: str) -> str:
        """Return what to do with the file at `path`, to go behind a colon."""
        if not self.command:
            return "give a file that holds raw bytes"
        return f"convert it with {self.command.format(path=shlex.quote(path))}"


def _has(head: bytes, tail: bytes, place: int, mark: bytes) -> bool:
    if place < 0:
        head, place = tail, len(tail) + place
    return place >= 0 and head[place : place + len(mark)] == mark


def _at_start(*marks: bytes) -> tuple[tuple[Mark, ...], ...]:
    return tuple(((0, mark),) for mark in marks)


_ELF = (0, b"\x7fELF")
# Each segment goes to its physical address; what lies between them are holes.
_BY_SEGMENT = (
    """readelf -lW {path} | awk '$1 == "LOAD" {{print "dd if=\\"$f\\" of=\\"$f\\".raw bs=1M conv=notrunc,sparse """
    """iflag=skip_bytes,count_bytes oflag=seek_bytes skip=$(("$2")) count=$(("$5")) seek=$(("$4"))"}}' | f={path} sh"""
)
_QEMU_IMG = "qemu-img convert -O raw {path} {path}.raw"
_VOLATILITY = "vol -f {path} layerwriter (Volatility 3)"

FORMATS = (
    # Memory, in another form
    Format("elf-core", "an ELF core dump", ((_ELF, (16, b"\4\0")), (_ELF, (16, b"\0\4"))), _BY_SEGMENT),
    Format(
        "kdump",
        "a kdump",
        _at_start(b"KDUMP   ", b"DISKDUMP"),
        "makedumpfile -E {path} {path}.elf, and that in turn",
    ),
    Format(
        "kdump-flat",
        "a flattened kdump",
        _at_start(b"makedumpfile\0\0\0\0"),
        "makedumpfile -R {path}.kdump < {path}, and that in turn",
    ),
    Format(
        "lime",
        "a LiME dump",
        _at_start(b"EMiL"),
        "avml-convert --source-format lime --format raw {path} {path}.raw",
    ),
    Format(
        "avml", "a compressed AVML dump", _at_start(b"AVML"), "avml-convert --format raw {path} {path}.raw"
    ),
    Format("windows", "a crash dump of Windows", _at_start(b"PAGEDU64", b"PAGEDUMP"), _VOLATILITY),
    Format(
        "hibernation",
        "a hibernation file of Windows",
        _at_start(b"HIBR", b"hibr", b"WAKE", b"wake"),
        _VOLATILITY,
    ),
    Format(
        "vmware",
        "a suspended state or snapshot of VMware (its memory may lie beside it, in a .vmem file)",
        _at_start(b"\xd0\xbe\xd2\xbe", b"\xd1\xba\xd1\xba", b"\xd2\xbe\xd2\xbe", b"\xd3\xbe\xd3\xbe"),
        _VOLATILITY,
    ),
    Format(
        "virtualbox",
        "a saved state of VirtualBox",
        _at_start(b"\x7fVirtualBox SavedState "),
        "VBoxManage debugvm NAME dumpvmcore --filename={path}.elf on the resumed machine, and that in turn",
    ),
    Format(
        "libvirt",
        "a saved state of libvirt",
        _at_start(b"LibvirtQemudSave", b"LibvirtQemudPart"),
        "virsh restore {path}, and virsh dump --memory-only NAME {path}.elf, and that in turn",
    ),
    Format("qemu", "a migration stream of QEMU", _at_start(b"QEVM"), _VOLATILITY),
    Format("xen", "a saved state of Xen", _at_start(b"\xff" * 8 + b"XENF", b"LinuxGuestRecord"), ""),
    # Disks
    Format("qcow2", "a disk image in QEMU's format qcow2", _at_start(b"QFI\xfb"), _QEMU_IMG),
    Format("qed", "a disk image in QEMU's format qed", _at_start(b"QED\0"), _QEMU_IMG),
    Format(
        "vmdk", "a disk image of VMware", _at_start(b"KDMV", b"COWD", b"# Disk DescriptorFile"), _QEMU_IMG
    ),
    Format("vdi", "a disk image of VirtualBox", (((0x40, b"\x7f\x10\xda\xbe"),),), _QEMU_IMG),
    Format("vhdx", "a disk image in the format VHDX", _at_start(b"vhdxfile"), _QEMU_IMG),
    Format("vhd", "a disk image in the format VHD", (((0, b"conectix"),), ((-512, b"conectix"),)), _QEMU_IMG),
    Format(
        "parallels",
        "a disk image of Parallels",
        _at_start(b"WithoutFreeSpace", b"WithouFreSpacExt"),
        _QEMU_IMG,
    ),
    Format("luks", "an encrypted disk (LUKS)", _at_start(b"LUKS\xba\xbe"), ""),
    # Compressed, or one of several in an archive
    Format("gzip", "compressed with gzip", _at_start(b"\x1f\x8b\x08"), "gzip -dc {path} > {path}.raw"),
    Format("xz", "compressed with xz", _at_start(b"\xfd7zXZ\0"), "xz -dc {path} > {path}.raw"),
    Format(
        "zstd",
        "compressed with zstd",
        _at_start(b"\x28\xb5\x2f\xfd", *(bytes((0x50 + each,)) + b"\x2a\x4d\x18" for each in range(16))),
        "zstd -dc {path} > {path}.raw",
    ),
    Format(
        "bzip2",
        "compressed with bzip2",
        (((0, b"BZh"), (4, b"\x31\x41\x59\x26\x53\x59")), ((0, b"BZh"), (4, b"\x17\x72\x45\x38\x50\x90"))),
        "bzip2 -dc {path} > {path}.raw",
    ),
    Format(
        "lz4",
        "compressed with lz4",
        _at_start(b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18"),
        "lz4 -dc {path} > {path}.raw",
    ),
    Format("lzop", "compressed with lzop", _at_start(b"\x89LZO\0\r\n\x1a\n"), "lzop -dc {path} > {path}.raw"),
    Format("snappy", "compressed with snappy", _at_start(b"\xff\x06\0\0sNaPpY"), ""),
    Format("zip", "a ZIP archive", _at_start(b"PK\3\4"), "unzip -p {path} > {path}.raw"),
    Format("7z", "a 7-Zip archive", _at_start(b"7z\xbc\xaf\x27\x1c"), "7z x -so {path} > {path}.raw"),
    Format("tar", "a tar archive", (((257, b"ustar"),),), "tar -xOf {path} > {path}.raw"),
    Format(
        "ewf", "an EnCase image", _at_start(b"EVF\x09\x0d\x0a\xff\0"), "ewfexport -f raw -t {path}.raw {path}"
    ),
    # Programs
    Format("elf", "an ELF program or object", ((_ELF,),), ""),
)


def recognise(head: bytes, tail: bytes = b"") -> Format | None:
    """Return the format of what begins with `head` and ends with `tail` (`HEAD_BYTES`, `TAIL_BYTES`); None: raw."""
    return next((each for each in FORMATS if each.matches(head, tail)), None)


def recognise_file(descriptor: int) -> Format | None:
    """Return the format of an open file, or None if it has the mark of none. Raises OSError."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    head = os.pread(descriptor, HEAD_BYTES, 0)
    return recognise(head, os.pread(descriptor, TAIL_BYTES, max(size - TAIL_BYTES, 0)))
