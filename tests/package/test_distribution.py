"""The sdist and the wheel: what is in them, and that the wheel runs where there is no checkout."""

import email
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from kvmdp import __version__

CHECKOUT = Path(__file__).resolve().parents[2]
NUMPY = Path(importlib.util.find_spec("numpy").origin).parents[1]
CACHES = {"__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"}


def build(kind, source, target):
    """Have hatchling build an sdist or a wheel, without a word of warning, and return its path."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("cannot build: pip install hatchling")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)],
        cwd=source,
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "warn" not in said.lower()
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", CHECKOUT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the sdist and nothing else."""
    source = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    return build("wheel", source / f"kvmdp-{__version__}", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A new virtual environment with the wheel in it, and this environment's numpy; its folder of programs."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=True)
    programs = environment / "bin"
    command = [programs / "python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(command, check=True, env=clean_environment())
    (site_packages,) = environment.glob("lib/python3*/site-packages")
    (site_packages / "numpy.pth").write_text(f"{NUMPY}\n")
    return programs


def clean_environment():
    """Environment variables without those that lead Python or pip elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}


def test_the_sdist_is_complete(sdist):
    files = {"README.md", "LICENSE", "pyproject.toml", ".ci/run"}
    for folder in ("kvmdp", "guest", "tests", "tools"):
        paths = [path for path in (CHECKOUT / folder).rglob("*") if path.is_file()]
        files |= {str(path.relative_to(CHECKOUT)) for path in paths if not CACHES.intersection(path.parts)}
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert packed == files | {"PKG-INFO", ".gitignore"}


def test_the_wheel_holds_the_package_and_the_guest_image(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read("kvmdp/machine/guest.bin") == (CHECKOUT / "guest" / "guest.bin").read_bytes()
    assert "kvmdp/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"kvmdp", f"kvmdp-{__version__}.dist-info"}


def test_the_metadata_is_complete(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"kvmdp-{__version__}.dist-info/METADATA"))
        assert archive.read(f"kvmdp-{__version__}.dist-info/licenses/LICENSE")
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# kvmdp\n")
    needed = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert needed == ["numpy>=1.26"]
    urls = {url.partition(", ")[0] for url in metadata.get_all("Project-URL")}
    assert urls == {"Homepage", "Documentation", "Source", "Issues"}
    classifiers = set(metadata.get_all("Classifier"))
    versions = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)}
    assert versions | {"Operating System :: POSIX :: Linux", "Typing :: Typed"} <= classifiers


def test_the_installed_command_is_there(installed, tmp_path):
    command = [installed / "kvmdp", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kvmdp {__version__}\n", "")


@pytest.mark.kvm
def test_the_installed_command_runs_a_guest_from_an_empty_directory(installed, tmp_path):
    command = [installed / "kvmdp", "run", "--memory", "4M", "--json", "-"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] is True
    assert document["pages_fetched"] == 1024
    assert list(tmp_path.iterdir()) == []
