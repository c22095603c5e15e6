"""tools/vmtest: which kernel is meant, what goes into the initramfs, and how a run ends, well or badly."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "tools"))

from vmtest_lib import cli, initramfs, matrix, python_tree  # noqa: E402  # found through the line above
from vmtest_lib.apt import NetworkError  # noqa: E402
from vmtest_lib.errors import VmtestError  # noqa: E402
from vmtest_lib.kernels import Kernel, Store, resolve, select  # noqa: E402
from vmtest_lib.newc import NewcWriter  # noqa: E402
from vmtest_lib.streams import KernelLog, Stream  # noqa: E402

NEEDS_LDD = pytest.mark.skipif(
    not shutil.which("ldd"), reason="looks for libraries with ldd: apt-get install libc-bin"
)


def kernel(version: str) -> Kernel:
    release = f"{version.rpartition('-')[0]}+deb-cloud-amd64"
    return Kernel(release, version, "somewhere", (f"linux-image-{release}",))


KERNELS = [
    kernel(version)
    for version in (
        "7.3.4-1~bpo13+1",
        "6.1.170-3",
        "6.12.9-1",
        "6.12.117-1",
        "6.12.117-2",
        "6.18.15-1~bpo13+1",
        "7.3~rc7-1~exp1",
        "7.4~rc1-1~exp1",
    )
]


# Which kernel


@pytest.mark.parametrize(
    ("wanted", "version"),
    [
        ("6.12", "6.12.117-2"),
        ("6.12.9", "6.12.9-1"),
        ("6.12.117-1", "6.12.117-1"),
        ("6.1", "6.1.170-3"),
        ("6", "6.18.15-1~bpo13+1"),
        ("7.3", "7.3.4-1~bpo13+1"),
        ("7.3~rc7", "7.3~rc7-1~exp1"),
        ("6.6+", "6.12.117-2"),
        ("6.18+", "6.18.15-1~bpo13+1"),
        ("newest", "7.4~rc1-1~exp1"),
        ("linux-image-6.18.15+deb-cloud-amd64", "6.18.15-1~bpo13+1"),
        ("6.18.15+deb-cloud-amd64", "6.18.15-1~bpo13+1"),
    ],
)
def test_the_wanted_kernel_is_selected(wanted, version):
    assert select(KERNELS, wanted).version == version


@pytest.mark.parametrize("wanted", ["6.13", "8.0+", "6.1.17", "", "newer"])
def test_no_kernel_is_selected_where_none_fits(wanted):
    assert select(KERNELS, wanted) is None


class FakeApt:
    """An apt that offers kernels and cannot download them."""

    def __init__(self, *offered: Kernel, complaint: str = "") -> None:
        self._offered = offered
        self._complaint = complaint

    def is_fresh(self):
        return False

    def refresh(self):
        return [self._complaint] if self._complaint else []

    def names(self, prefix):
        return [name for kernel in self._offered for name in kernel.packages if name.startswith(prefix)]

    def stanzas(self, names):
        offered = {kernel.packages[0]: kernel for kernel in self._offered}
        return [{"Package": name, "Version": offered[name].version, "Depends": "kmod"} for name in names]

    def suites(self, names):
        return {}

    def download(self, packages, directory):
        raise NetworkError("apt could not download: no route to host")


def cache(store: Store, cached: Kernel) -> None:
    folder = store.folder(cached)
    folder.mkdir(parents=True)
    description = {"release": cached.release, "version": cached.version, "suite": "", "packages": []}
    (folder / "kernel.json").write_text(json.dumps(description))


def test_an_unknown_kernel_is_refused_with_the_list_of_those_there_are(tmp_path):
    store = Store(tmp_path, FakeApt(kernel("6.12.117-1"), kernel("6.1.176-1")))
    with pytest.raises(VmtestError, match=r"no kernel '9\.9'; there are 6\.1\.176, 6\.12\.117$") as error:
        resolve(store, ["9.9"])
    assert error.value.status == 2


def test_without_network_and_cache_the_reason_is_told(tmp_path):
    store = Store(tmp_path, FakeApt(complaint="Could not connect"))
    with pytest.raises(
        VmtestError, match=r"no kernel is cached and Debian offers none: Could not connect$"
    ) as error:
        resolve(store, ["newest"])
    assert error.value.status == 4


def test_without_network_a_known_kernel_that_is_not_cached_is_status_4(tmp_path):
    with pytest.raises(VmtestError, match=r"not cached, .* no route") as error:
        resolve(Store(tmp_path, FakeApt(kernel("6.12.117-1"))), ["6.12"])
    assert error.value.status == 4
    assert not list(tmp_path.glob("tmp*"))


def test_without_network_a_cached_kernel_takes_the_newer_ones_place_and_says_so(tmp_path):
    store = Store(tmp_path, FakeApt(kernel("6.12.117-1")))
    cache(store, kernel("6.12.107-1"))
    kernels, notes = resolve(store, ["6.12"])
    assert [found.version for found in kernels] == ["6.12.107-1"]
    assert notes == ["kernel 6.12.117-1 cannot be downloaded; 6.12.107-1 from the cache takes its place"]


def test_a_cached_kernel_needs_no_network_and_comes_once(tmp_path):
    store = Store(tmp_path, FakeApt(complaint="Could not connect"))
    cache(store, kernel("6.12.107-1"))
    kernels, notes = resolve(store, ["6.12", "newest"])
    assert [found.version for found in kernels] == ["6.12.107-1"]
    assert notes == ["apt: Could not connect"]


# What goes into the initramfs


def unpacked(archive: bytes, folder: Path) -> None:
    """An independent reader: bsdtar or cpio."""
    subprocess.run(["cpio", "-idm", "--quiet"], cwd=folder, input=archive, check=True)


@pytest.mark.skipif(not shutil.which("cpio"), reason="reads the archive with cpio: apt-get install cpio")
def test_cpio_unpacks_what_newc_wrote(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 5)
    os.utime(source, (1_700_000_000, 1_700_000_000))
    source.chmod(0o750)
    output = io.BytesIO()
    image = NewcWriter(output)
    image.file("/a/b/copy", source)
    image.data("/a/b/copy", b"the first one wins")
    image.data("/empty", b"", 0o600)
    image.symlink("/a/link", "b/copy")
    image.directory("/d", 0o700)
    image.close()
    target = tmp_path / "target"
    target.mkdir()
    unpacked(output.getvalue(), target)
    assert (target / "a/link").readlink() == Path("b/copy")
    assert (target / "a/link").read_bytes() == b"xxxxx"
    status = (target / "a/b/copy").stat()
    assert (status.st_mode & 0o777, status.st_mtime) == (0o750, 1_700_000_000)
    assert (target / "empty").stat().st_size == 0
    assert (target / "d").stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in target.iterdir()) == ["a", "d", "empty"]


def test_symbolic_links_on_the_way_to_a_file_come_along(tmp_path):
    (tmp_path / "real").write_bytes(b"content")
    (tmp_path / "second").symlink_to("real")
    (tmp_path / "first").symlink_to(tmp_path / "second")
    output = io.BytesIO()
    NewcWriter(output).host_path(tmp_path / "first")
    for name in ("first", "second", "real"):
        assert str(tmp_path / name).lstrip("/").encode() + b"\0" in output.getvalue()


@NEEDS_LDD
def test_the_python_tree_has_what_a_test_run_needs_and_no_test_suites():
    names = {str(path) for path in python_tree.files()}
    assert sys.executable in names
    assert any(name.endswith("/numpy/__init__.py") for name in names)
    assert any(name.endswith("/_pytest/main.py") for name in names)
    assert any(name.endswith("/libc.so.6") for name in names)
    assert not any("/numpy/_core/tests/" in name or "/idlelib/" in name for name in names)
    assert all(Path(name).is_file() for name in names)


@NEEDS_LDD
@pytest.mark.skipif(not shutil.which("busybox"), reason="copies busybox: apt-get install busybox-static")
def test_the_image_holds_the_checkout_the_modules_and_the_command(tmp_path):
    (tmp_path / "kvm.ko").write_bytes(b"module")
    with initramfs.build(tmp_path, ["echo", "a b"]) as image:
        content = os.pread(image.descriptor, os.fstat(image.descriptor).st_size, 0)
    assert b"exec echo 'a b'\n" in content
    assert b"kvmdp/pyproject.toml\0" in content
    assert b"vmtest/modules/08-kvm.ko\0" in content
    assert content.count(image.end) == 1


# What comes out


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_stream_passes_everything_up_to_its_mark(size):
    end = b"\0end-1234\0"
    content = b"a\0b" + end[:-1] + b"c\0end-\0" + bytes(range(256))
    output = io.BytesIO()
    stream = Stream(end, output)
    data = content + end + b"too late"
    for start in range(0, len(data), size):
        stream.feed(data[start : start + size])
    assert stream.closed
    assert output.getvalue() == content


def test_a_stream_holds_nothing_back_that_cannot_be_the_mark():
    output = io.BytesIO()
    Stream(b"\0end\0", output).feed(b"live")
    assert output.getvalue() == b"live"


def test_the_kernels_warnings_and_panic_are_found_in_its_log():
    log = KernelLog()
    log.feed(
        b"[    1.0] WARNING: CPU: 0 PID: 1 at kvm.c:1\r\n[    2.0] \x1b[1mKernel panic - not syncing: why\r\n"
    )
    assert log.warnings() == ("WARNING: CPU: 0 PID: 1 at kvm.c:1",)
    assert log.panic() == "Kernel panic - not syncing: why"


# The matrix


def report(kvm: str = "kvm_amd", **statuses: int) -> dict:
    checks = [{"trap": None, "check": name, "status": 0, "message": ""} for name in ("probe", "abi")]
    for trap in ("memory-fault", "marker", "mmio", "userfaultfd"):
        status = statuses.get(trap.replace("-", "_"), 0)
        names = ["checksum"] if status == 4 else ["checksum", "vector, ring 0"]
        message = "the kernel has no such thing" if status else ""
        checks += [{"trap": trap, "check": name, "status": status, "message": message} for name in names]
    probe = {"host": {"kvm": kvm, "nested_paging": kvm == "kvm_amd"}}
    return {"schema": "kvmdp.vmtest/1", "probe": probe, "checks": checks}


def bad(version: str, **statuses: int) -> list[str]:
    cells = matrix.judge(kernel(version), report(**statuses))
    return [name for name, cell in cells.items() if not cell.good]


def test_the_matrix_is_green_where_the_kernel_does_what_its_version_can():
    assert bad("6.18.15-1") == []
    assert bad("6.12.117-1", memory_fault=4) == []
    assert bad("6.1.176-1", memory_fault=4, marker=4) == []


def test_the_matrix_is_red_where_a_trap_fails_is_missing_or_is_there_against_expectation():
    assert bad("6.18.15-1", marker=1) == ["marker"]
    assert bad("6.18.15-1", memory_fault=4) == ["memory-fault"]
    assert bad("6.12.117-1") == ["memory-fault"]


def test_what_a_kvm_can_do_for_no_guest_is_said_and_is_no_failure():
    limited = report("kvm_pvm")
    for check in limited["checks"]:
        check["status"] = int(check["check"] == "vector, ring 0")
    cell = matrix.judge(kernel("6.18.44-0"), limited)["mmio"]
    assert (cell.good, cell.words) == (True, "1 of 2")
    assert cell.remark.startswith("not vector, ring 0: ")
    limited["probe"]["host"]["kvm"] = "kvm_amd"
    assert not matrix.judge(kernel("6.18.44-0"), limited)["mmio"].good


def test_the_table_is_written_between_its_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nafter\n")
    matrix.check_markers(readme)
    results = [(kernel("6.12.117-1"), report(memory_fault=4)), (kernel("7.3.4-1"), report(marker=1))]
    matrix.update(readme, matrix.table(results))
    text = readme.read_text()
    assert text.startswith(f"before\n{matrix.BEGIN}\n")
    assert text.endswith(f"{matrix.END}\nafter\n")
    assert "| kernel | KVM | `memory-fault` | `marker` | `mmio` | `userfaultfd` | `probe` | `abi` |" in text
    assert "| 6.12.117 | kvm_amd, nested paging | refused | 2 of 2 | 2 of 2 | 2 of 2 | ok | ok |" in text
    assert "| 7.3.4 | kvm_amd, nested paging | 2 of 2 | **fails**: checksum, vector, ring 0 |" in text
    assert "- 6.12.117, `memory-fault`: the kernel has no such thing" in text
    assert "old" not in text


def test_a_file_without_the_markers_is_refused(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{matrix.END} {matrix.BEGIN}")
    for path in (readme, tmp_path / "absent"):
        with pytest.raises(VmtestError) as error:
            matrix.check_markers(path)
        assert error.value.status == 2


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "true"], "which kernel?"),
        (["--kernel", "6.12"], "which command?"),
        (["--kernel", "6.12", "--timeout", "0", "--", "true"], "'0' is no number of seconds above 0"),
        (["--kernel", "6.12", "--memory", "3X", "--", "true"], "'3X' is no memory size"),
        (["--kernel", "6.12", "--json", "f", "--", "true"], "belong to --matrix"),
        (["--matrix", "--", "true"], "take no command"),
        (["--shell", "--kernel", "6.12", "--kernel", "6.1"], "takes one --kernel"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_qemu_is_named_with_its_package(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["--kernel", "6.12", "--", "true"]) == 4
    assert "qemu-system-x86_64 is not installed" in capsys.readouterr().err


# Whole runs. They need a kernel in the cache: tests use no network.


def cached_kernel() -> str:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "kvmdp", "vmtest")
    found = select(Store(folder, FakeApt()).cached(), "newest")
    if found is None:
        pytest.skip("no kernel in vmtest's cache: tools/vmtest --kernel newest -- true puts one there")
    return found.version


def vmtest(*arguments: str, timeout: str = "300") -> list[str]:
    options = ["--kernel", cached_kernel(), "--timeout", timeout]
    return [sys.executable, "-m", "vmtest_lib", *options, "--", *arguments]


@pytest.fixture(autouse=True)
def vmtest_can_be_started(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT / "tools"))


def emulators_of(parent: int) -> list[str]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [child for child in children if Path(f"/proc/{child}/comm").read_text().startswith("qemu")]


def is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.qemu
def test_output_and_exit_status_come_back_unchanged():
    program = (
        "import os, sys, numpy, pytest, kvmdp\n"
        "open('/dev/kvm', 'r+b', buffering=0).close()\n"
        "os.write(2, os.uname().release.encode())\n"
        "sys.stdout.buffer.write(b'\\r\\n\\x00\\xff' * 300000)\n"
        "sys.exit(7)"
    )
    done = subprocess.run(vmtest("python3", "-c", program), capture_output=True, check=False)
    assert done.returncode == 7, done.stderr
    assert done.stdout == b"\r\n\x00\xff" * 300000
    assert b"-cloud-amd64" in done.stderr


@pytest.mark.qemu
def test_a_panic_is_status_1_and_shows_the_kernels_words():
    done = subprocess.run(
        vmtest("sh", "-c", "echo before; echo c > /proc/sysrq-trigger"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == "before\n"
    assert "the kernel panicked (Kernel panic - not syncing: sysrq triggered crash)" in done.stderr


# vmtest, whose clock is an hour ahead as soon as the command has been started and has said something.
AN_HOUR_LATER = """
import sys, time, types
from vmtest_lib import cli, qemu
feed, awaited = qemu.Stream.feed, {b"started", b"before"}
def fed(stream, data):
    awaited.difference_update([each for each in awaited if each in data])
    feed(stream, data)
qemu.Stream.feed = fed
qemu.time = types.SimpleNamespace(monotonic=lambda: time.monotonic() + (0 if awaited else 3600))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.qemu
def test_a_command_that_hangs_is_ended_and_its_output_shown():
    command = vmtest("sh", "-c", "echo before; sleep 1000000")
    command[1:3] = ["-c", AN_HOUR_LATER]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == "before\n"
    assert "the command did not end within the time limit of 300 s; the emulator was ended" in done.stderr


@pytest.mark.qemu
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_emulator_outlives_an_interrupted_vmtest(number, status):
    with subprocess.Popen(vmtest("true"), stderr=subprocess.DEVNULL) as process:
        while not (emulators := emulators_of(process.pid)):
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait() == status
    deadline = time.monotonic() + 30
    while any(is_running(emulator) for emulator in emulators):
        assert time.monotonic() < deadline, "QEMU is still there"
        time.sleep(0.05)
