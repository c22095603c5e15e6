"""A private apt: its own sources, package lists, status and download folder under one directory.

The machine's own apt is only read: for the address of its Debian mirror, and for the proxy and TLS settings
that lead there. Signatures and the lists' dates are checked as apt does by default. apt.conf(5),
sources.list(5) and apt-get(8) describe what is used here. Times are in seconds.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from .errors import ENVIRONMENT, VmtestError

# By code name: the releases whose kernels the matrix is made of. An alias such as oldstable moves on with
# Debian's next release, and the oldest kernels would be gone.
SUITES = ("bookworm", "trixie", "trixie-backports", "sid", "experimental")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# A day: long enough for a morning of runs without a look-up, short enough for "newest" to be true.
_FRESH_SECONDS = 86400
_FIELD = re.compile(r"([\w-]+): (.*)")
# The last complaint only says that there were others.
_COMPLAINT = re.compile(r"^[EW]: ((?!Some index files).*)$", re.MULTILINE)


class NetworkError(VmtestError):
    """apt could not fetch something. What is cached may still do."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ENVIRONMENT)


class PrivateApt:
    """apt with all its state in `directory`. `mirror` is a Debian mirror's URL, None for the machine's own.

    `allow_expired` accepts lists whose date of validity is over (Check-Valid-Until). Signatures are always
    checked.
    """

    def __init__(self, directory: Path, mirror: str | None, allow_expired: bool) -> None:
        self._directory = directory
        self._mirror = mirror
        self._allow_expired = allow_expired

    def is_fresh(self) -> bool:
        """Whether the package lists are of the right suites and less than a day old."""
        stamp = self._directory / "refreshed"
        if not stamp.exists() or stamp.read_text() != self._configure():
            return False
        return time.time() - stamp.stat().st_mtime < _FRESH_SECONDS

    def refresh(self) -> list[str]:
        """Fetch the package lists and return what apt complained of, a line each.

        A suite that fails keeps its old list, or is left out; where all fail the first time, no package is known.
        """
        sources = self._configure()
        done = self._run("apt-get", "update", "--error-on=any")
        complaints = _COMPLAINT.findall(done.stderr)
        if done.returncode == 0 or all("is expired" in line for line in complaints):
            (self._directory / "refreshed").write_text(sources)
        return [f"{line} (--allow-expired)" if "is expired" in line else line for line in complaints]

    def names(self, prefix: str) -> list[str]:
        """The names of all known packages that start with `prefix`."""
        return self._run("apt-cache", "pkgnames", prefix).stdout.split()

    def stanzas(self, names: Iterable[str]) -> list[dict[str, str]]:
        """The control fields, by name, of every known version of the packages `names`; first lines only."""
        text = self._run("apt-cache", "show", *names).stdout
        return [
            {match[1]: match[2] for line in stanza.splitlines() if (match := _FIELD.match(line))}
            for stanza in text.split("\n\n")
            if stanza.strip()
        ]

    def suites(self, names: Iterable[str]) -> dict[tuple[str, str], str]:
        """The suite that offers each (package, version) of the packages `names`."""
        lines = self._run("apt-cache", "madison", *names).stdout.splitlines()
        rows = ([cell.strip() for cell in line.split(" | ")] for line in lines)
        return {(name, version): origin.split()[1].split("/")[0] for name, version, origin in rows}

    def download(self, packages: Iterable[str], directory: Path) -> list[Path]:
        """Download `packages` (each `name=version`) into `directory`. Raises NetworkError."""
        done = self._run("apt-get", "download", *packages, folder=directory)
        if done.returncode:
            raise NetworkError(f"apt could not download {', '.join(packages)}: {done.stderr.strip()}")
        return sorted(directory.glob("*.deb"))

    def _configure(self) -> str:
        """Write the private configuration and return the sources it names."""
        if not shutil.which("apt-get"):
            raise VmtestError("apt-get is not here: kernels come from Debian's package archive", ENVIRONMENT)
        if not _KEYRING.exists():
            raise VmtestError(
                f"{_KEYRING} is missing; install it with: apt-get install debian-archive-keyring", ENVIRONMENT
            )
        for name in ("lists/partial", "archives/partial"):
            (self._directory / name).mkdir(parents=True, exist_ok=True)
        sources = (
            f"Types: deb\nURIs: {self._mirror or _machines_mirror()}\nSuites: {' '.join(SUITES)}\n"
            f"Components: main\nArchitectures: amd64\nSigned-By: {_KEYRING}\n"
            f"Check-Valid-Until: {'no' if self._allow_expired else 'yes'}\n"
        )
        (self._directory / "status").touch()
        (self._directory / "debian.sources").write_text(sources)
        (self._directory / "apt.conf").write_text(
            "\n".join(
                [
                    f'Dir::State "{self._directory}";',
                    f'Dir::State::status "{self._directory}/status";',
                    f'Dir::Cache "{self._directory}";',
                    f'Dir::Etc::sourcelist "{self._directory}/debian.sources";',
                    *(f'Dir::Etc::{part} "/dev/null";' for part in ("sourceparts", "parts", "main")),
                    *(f'Dir::Etc::{part} "/dev/null";' for part in ("preferences", "preferencesparts")),
                    'Dir::Cache::srcpkgcache "";',
                    'APT::Architecture "amd64";',
                    'Acquire::Languages "none";',
                    'Acquire::Retries "1";',
                    'Acquire::GzipIndexes "true";',
                    # A release that becomes stable, or oldstable, is still the one that is meant.
                    'Acquire::AllowReleaseInfoChange "true";',
                    # Root's apt would change to a user that cannot write below a home directory.
                    'APT::Sandbox::User "root";',
                    *_machines_transport(),
                ]
            )
            + "\n"
        )
        return sources

    def _run(self, *command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        return _capture(*command, folder=folder, APT_CONFIG=str(self._directory / "apt.conf"))


def _machines_mirror() -> str:
    """The Debian mirror that the machine's own apt uses. Its security archive has other suites: not that."""
    targets = _capture("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(ORIGIN)").stdout
    for line in targets.splitlines():
        address, release, origin = [*line.split(), "", ""][:3]
        # The origin is known only after a first `apt-get update`; before it, the address has to do.
        is_debian = origin == "Debian" or (origin != "Ubuntu" and address.rstrip("/").endswith("/debian"))
        if is_debian and not release.endswith("-security"):
            return address
    raise VmtestError(
        "this machine's apt names no Debian mirror to take kernels from; give one with --mirror URL",
        ENVIRONMENT,
    )


def _machines_transport() -> list[str]:
    """The machine's own proxy and TLS settings, as lines of a configuration file."""
    settings = _capture("apt-config", "dump").stdout.splitlines()
    return [line for line in settings if line.startswith("Acquire::http")]


def _capture(
    *command: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    # LC_ALL: apt's complaints are read here.
    variables = {**os.environ, "LC_ALL": "C", **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
