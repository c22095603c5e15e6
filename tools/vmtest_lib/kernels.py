"""Which Debian kernels there are, which one a user means, and how one becomes a kernel image and modules.

A kernel is one version of one package `linux-image-RELEASE`, of the cloud flavour, which has few drivers and
those QEMU's machine needs. Older packages hold everything. Newer ones (from about 6.19 on) only depend on
`linux-binary-RELEASE` for the image and `linux-modules-RELEASE` for the modules, and archives drop these
sometimes while they still list the first.
"""

import contextlib
import fcntl
import json
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .apt import NetworkError, PrivateApt
from .errors import ENVIRONMENT, FAILED, USAGE, VmtestError

_IMAGE = re.compile(r"linux-image-(\d.*-cloud-amd64)")
_VERSION = re.compile(r"(?P<upstream>[\d.]+)(?:~rc(?P<candidate>\d+))?(?P<revision>.*)")
# What the machine needs, in the order it is loaded; what a kernel has built in or not at all is left out.
MODULES = (
    *("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("virtio_console", "irqbypass", "ccp", "kvm", "kvm-amd"),
)
HERE = "here"  # in place of a suite


@dataclass(frozen=True)
class Kernel:
    """A Debian kernel: its release as `uname -r` gives it, its packages, their version and their suite."""

    release: str
    version: str
    suite: str
    packages: tuple[str, ...]

    @property
    def upstream(self) -> str:
        """The upstream version, such as 6.12.117 or 7.3~rc7."""
        return self.version.rpartition("-")[0]

    @property
    def series(self) -> tuple[int, int]:
        """The first two numbers of the version."""
        major, minor = _key(self.version)[0][:2]
        return major, minor


def this_kernel() -> Kernel:
    """The kernel this machine runs, as far as its release tells its version."""
    release = os.uname().release
    return Kernel(release, f"{release.partition('-')[0]}-0", HERE, ())


def _key(version: str) -> tuple[tuple[int, ...], float, list[int]]:
    """Orders package versions: by upstream numbers, a release candidate before its release, then by revision."""
    match = _VERSION.fullmatch(version)
    assert match, f"{version} is no kernel package's version"
    numbers = [int(number) for number in match["upstream"].strip(".").split(".")]
    upstream = (*numbers, 0, 0)[:3]
    candidate = float(match["candidate"] or "inf")
    return upstream, candidate, [int(number) for number in re.findall(r"\d+", match["revision"])]


def select(kernels: Iterable[Kernel], wanted: str) -> Kernel | None:
    """The kernel that a user means by `wanted`, None where there is none.

    `newest`; `6.12` or `6.12.117`, the newest that begins so; `6.6+`, the newest of the oldest series from 6.6 on;
    a package version, a package name or a kernel release, each in full.
    """
    ordered = sorted(kernels, key=lambda kernel: _key(kernel.version))
    if match := re.fullmatch(r"(\d+)\.(\d+)\+", wanted):
        later = [kernel for kernel in ordered if kernel.series >= (int(match[1]), int(match[2]))]
        matching = [kernel for kernel in later if kernel.series == later[0].series]
    elif wanted == "newest":
        matching = ordered
    else:
        release = wanted.removeprefix("linux-image-")
        matching = [
            kernel
            for kernel in ordered
            if release in (kernel.release, kernel.version, kernel.upstream)
            or kernel.upstream.startswith((f"{wanted}.", f"{wanted}~"))
        ]
    return matching[-1] if matching else None


def _kernel(fields: dict[str, Any]) -> Kernel:
    return Kernel(**{**fields, "packages": tuple(fields["packages"])})


class Store:
    """The kernels in `directory`, unpacked: each a folder with `vmlinuz`, `modules/` and `kernel.json`."""

    def __init__(self, directory: Path, apt: PrivateApt) -> None:
        self._directory = directory
        self._apt = apt

    def cached(self) -> list[Kernel]:
        """The kernels that need no network any more."""
        return [
            _kernel(json.loads(path.read_text())) for path in self._directory.glob("kernels/*/kernel.json")
        ]

    def folder(self, kernel: Kernel) -> Path:
        """Where `kernel` is, or would be, unpacked."""
        return self._directory / "kernels" / f"{kernel.release}_{kernel.version}"

    def available(self) -> tuple[list[Kernel], list[str]]:
        """All kernels that are cached or that Debian offers, oldest first, and what apt complained of.

        Raises VmtestError (status 4) where there are none.
        """
        # What apt says is kept: asking it takes seconds.
        index = self._directory / "offered.json"
        complaints = []
        with self._lock():
            if self._apt.is_fresh() and index.exists():
                offered = [_kernel(fields) for fields in json.loads(index.read_text())]
            else:
                complaints = self._apt.refresh()
                offered = _offered(self._apt)
                index.write_text(json.dumps([asdict(kernel) for kernel in offered]))
        kernels = {(kernel.release, kernel.version): kernel for kernel in [*self.cached(), *offered]}
        if not kernels:
            reason = complaints[0] if complaints else "the mirror's package lists hold no kernel"
            raise VmtestError(f"no kernel is cached and Debian offers none: {reason}", ENVIRONMENT)
        return sorted(kernels.values(), key=lambda kernel: _key(kernel.version)), complaints

    def fetch(self, kernel: Kernel) -> None:
        """Make `kernel` cached. Raises NetworkError where it cannot be downloaded."""
        with self._lock(), tempfile.TemporaryDirectory(dir=self._directory) as scratch:
            if self.folder(kernel).exists():
                return
            unpacked = Path(scratch, "unpacked")
            (unpacked / "modules").mkdir(parents=True)
            for package in self._apt.download(
                [f"{name}={kernel.version}" for name in kernel.packages], Path(scratch)
            ):
                _unpack(package, unpacked)
            for needed in ("vmlinuz", "modules/kvm.ko", "modules/kvm-amd.ko"):
                if not (unpacked / needed).exists():
                    raise VmtestError(
                        f"{', '.join(kernel.packages)} {kernel.version} hold no {needed}", FAILED
                    )
            (unpacked / "kernel.json").write_text(json.dumps(asdict(kernel), indent=1) + "\n")
            self.folder(kernel).parent.mkdir(exist_ok=True)
            unpacked.rename(self.folder(kernel))

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Keeps two vmtests from changing the cache at the same time."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with open(self._directory / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def resolve(store: Store, wanted: Sequence[str]) -> tuple[list[Kernel], list[str]]:
    """Find and cache a kernel for each of `wanted`; return them, each once, with notes for the user.

    Where a kernel cannot be downloaded, a cached one that fits as well takes its place, with a note. Raises
    VmtestError: status 2 for a kernel that does not exist, 4 where neither network nor cache help.
    """
    available, complaints = store.available()
    notes = [f"apt: {complaint}" for complaint in complaints]
    chosen = []
    for name in wanted:
        kernel = select(available, name)
        if kernel is None:
            versions = ", ".join(dict.fromkeys(kernel.upstream for kernel in available))
            raise VmtestError(f"there is no kernel {name!r}; there are {versions}", USAGE)
        chosen.append(kernel)
    for index, kernel in enumerate(chosen):
        try:
            if not store.folder(kernel).exists():
                store.fetch(kernel)
        except NetworkError as error:
            other = select(store.cached(), wanted[index])
            if other is None:
                raise NetworkError(f"kernel {kernel.version} is not cached, and {error}") from error
            notes.append(
                f"kernel {kernel.version} cannot be downloaded; {other.version} from the cache takes its place"
            )
            chosen[index] = other
    return list(dict.fromkeys(chosen)), notes


def _offered(apt: PrivateApt) -> list[Kernel]:
    images = [name for name in apt.names("linux-image-") if _IMAGE.fullmatch(name)]
    if not images:
        return []
    suites = apt.suites(images)
    there = {*apt.names("linux-binary-"), *apt.names("linux-modules-")}
    kernels = []
    for stanza in apt.stanzas(images):
        name, version = stanza["Package"], stanza["Version"]
        release = name.removeprefix("linux-image-")
        parts = (f"linux-binary-{release}", f"linux-modules-{release}")
        packages = parts if f"{parts[0]} " in stanza["Depends"] else (name,)
        if packages == (name,) or there.issuperset(parts):
            kernels.append(Kernel(release, version, suites.get((name, version), ""), packages))
    return kernels


def _unpack(package: Path, folder: Path) -> None:
    """Take the kernel image and the modules of `MODULES`, decompressed, out of a Debian package."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as archive:
        assert archive.stdout is not None
        with tarfile.open(fileobj=archive.stdout, mode="r|") as entries:
            for entry in entries:
                stem, _, compression = PurePosixPath(entry.name).name.partition(".ko")
                if not entry.isfile():
                    continue
                content = entries.extractfile(entry)
                assert content is not None
                if PurePosixPath(entry.name).name.startswith("vmlinuz"):
                    (folder / "vmlinuz").write_bytes(content.read())
                elif stem in MODULES and ".ko" in entry.name:
                    (folder / "modules" / f"{stem}.ko").write_bytes(_decompress(content.read(), compression))
    if archive.returncode:
        raise VmtestError(f"dpkg-deb cannot read {package.name} (status {archive.returncode})", FAILED)


def _decompress(content: bytes, suffix: str) -> bytes:
    if suffix == ".xz":
        return lzma.decompress(content)
    if suffix == ".zst":
        if not shutil.which("zstd"):
            raise VmtestError(
                "this kernel's modules need zstd; install it with: apt-get install zstd", ENVIRONMENT
            )
        return subprocess.run(["zstd", "-dc"], input=content, stdout=subprocess.PIPE, check=True).stdout
    return content
