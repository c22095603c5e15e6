"""Files that are no raw memory, as they begin; and what begins as raw memory may."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile

PADDING = bytes(4096)


def _elf(kind, order="<"):
    ident = b"\x7fELF\x02" + (b"\1" if order == "<" else b"\2") + b"\1"
    return ident.ljust(16, b"\0") + struct.pack(f"{order}HHI", kind, 62, 1)


def _tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("memory.raw")
        member.size = len(PADDING)
        archive.addfile(member, io.BytesIO(PADDING))
    return file.getvalue()


def _zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("memory.raw", PADDING)
    return file.getvalue()


# By the name that kvmdp has for the format: whole small files where Python makes them, else headers.
FOREIGN = {
    "elf-core": _elf(4),
    "elf": _elf(2),
    "kdump": b"KDUMP   " + struct.pack("<I", 6),
    "kdump-flat": b"makedumpfile".ljust(16, b"\0") + struct.pack(">QQ", 1, 1),
    "lime": struct.pack("<IIQQQ", 0x4C694D45, 1, 0x1000, 0x9EFFF, 0),
    "avml": struct.pack("<IIQQQ", 0x4C4D5641, 2, 0x1000, 0x9EFFF, 0),
    "windows": b"PAGEDU64",
    "hibernation": b"HIBR",
    "vmware": struct.pack("<III", 0xBED2BED2, 8, 50),
    "virtualbox": b"\x7fVirtualBox SavedState V2.0\n\0\0\0",
    "libvirt": b"LibvirtQemudSave" + struct.pack("<I", 2),
    "qemu": b"QEVM\0\0\0\3",
    "xen": b"\xff" * 8 + b"XENF\0\0\0\2",
    "qcow2": b"QFI\xfb\0\0\0\3",
    "qed": b"QED\0",
    "vmdk": b"KDMV\1\0\0\0",
    "vdi": b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(0x40, b"\0") + struct.pack("<I", 0xBEDA107F),
    "vhdx": b"vhdxfile",
    "vhd": b"conectix",
    "parallels": b"WithouFreSpacExt",
    "luks": b"LUKS\xba\xbe\0\2",
    "gzip": gzip.compress(PADDING),
    "xz": lzma.compress(PADDING),
    "bzip2": bz2.compress(PADDING),
    "zstd": b"\x28\xb5\x2f\xfd",
    "lz4": b"\x04\x22\x4d\x18",
    "lzop": b"\x89LZO\0\r\n\x1a\n",
    "snappy": b"\xff\x06\0\0sNaPpY",
    "zip": _zip(),
    "7z": b"7z\xbc\xaf\x27\x1c",
    "tar": _tar(),
    "ewf": b"EVF\x09\x0d\x0a\xff\0",
}

# The same formats otherwise: other versions, byte orders, places.
VARIANTS = [
    ("elf-core", _elf(4, ">")),
    ("elf", _elf(3)),
    ("kdump", b"DISKDUMP"),
    ("windows", b"PAGEDUMP"),
    ("hibernation", b"wake"),
    *(("vmware", struct.pack("<I", magic)) for magic in (0xBED2BED0, 0xBAD1BAD1, 0xBED3BED3)),
    ("virtualbox", b"\x7fVirtualBox SavedState V1.1\n"),
    ("libvirt", b"LibvirtQemudPart"),
    ("vmdk", b"COWD\1\0\0\0"),
    ("vmdk", b"# Disk DescriptorFile\nversion=1\n"),
    ("vhd", PADDING + b"conectix".ljust(512, b"\0")),  # of fixed size: the mark is at the end
    ("parallels", b"WithoutFreeSpace"),
    ("bzip2", bz2.compress(b"")),
    ("zstd", b"\x5e\x2a\x4d\x18"),  # a frame to be skipped comes first
    ("lz4", b"\x02\x21\x4c\x18"),
]

RAW = {
    "zeros": PADDING,
    "a byte": b"\x1f",
    "the interrupt vectors of a PC": struct.pack("<HH", 0xFF53, 0xF000) * 256,
    "a word of text": b"KDUMP".ljust(4096, b"\0"),
    "bytes all different": bytes(range(256)) * 16,
}
