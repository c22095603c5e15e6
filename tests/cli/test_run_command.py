"""`kvmdp run`: what it prints and writes when all goes well."""

import json
import os
import pty
import re
import termios

import pytest
from command import Running, kvmdp, require_trap
from programs import LOOP, RETURN, SLOW_WALK

pytestmark = pytest.mark.kvm

TRAPS = ("marker", "memory-fault", "mmio")
PHASES = {"memory", "vm", "trap", "arm", "vcpus", "cpu_to_first_instruction"}
FIELDS = {
    "schema": str,
    "ok": bool,
    "trap": str,
    "backing": str,
    "ring": int,
    "vcpus": int,
    "memory_bytes": int,
    "page_size": int,
    "granule": int,
    "workload": str,
    "pages_present": int,
    "faults": int,
    "seconds": float,
    "exits": dict,
    "latency_us": dict,
    "guest_checksum": str,
    "expected_checksum": str,
    "setup_seconds": dict,
    "memslots": int,
    "slot_bytes": int,
    "resident_bytes": int,
}


@pytest.mark.parametrize("backing", ["memfd", "anonymous"])
@pytest.mark.parametrize("trap", TRAPS)
def test_the_json_document_proves_the_run(trap, backing):
    done = kvmdp("run", "--memory", "2M", "--trap", trap, "--backing", backing, "--json", "-")
    document = done.document
    assert done.status == 0
    assert {name: type(document.get(name)) for name in FIELDS} == FIELDS
    assert document["schema"] == "kvmdp.run/1"
    assert document["ok"] is True
    assert (document["trap"], document["backing"]) == (trap, backing)
    assert (document["ring"], document["vcpus"], document["workload"]) == (3, 1, "checksum")
    assert (document["memory_bytes"], document["page_size"], document["granule"]) == (2 << 20, 4096, 4096)
    assert document["pages_present"] == document["pages_fetched"] == document["pages_checked"] == 512
    assert document["faults"] >= 512
    assert re.fullmatch("0x[0-9a-f]{16}", document["guest_checksum"])
    assert document["guest_checksum"] == document["expected_checksum"]
    assert document["wrong_pages"] == []
    assert document["exits"]["io"] == 1
    assert sum(document["exits"].values()) > 512
    latency = document["latency_us"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]
    # What it takes is printed for every phase, and judged by whoever reads it.
    assert document["setup_seconds"].keys() == PHASES
    assert all(value >= 0 for value in document["setup_seconds"].values())


def test_the_trap_is_chosen_where_none_is_asked_for():
    done = kvmdp("run", "--memory", "2M", "--json", "-")
    assert done.status == 0
    assert done.document["trap"] in TRAPS
    assert f"trap {done.document['trap']}," in done.err


def test_without_arguments_64_mib_are_proven():
    done = kvmdp("run", "--json", "-")
    assert done.status == 0
    assert done.document["ok"] is True
    assert done.document["pages_present"] == 16384


@pytest.mark.parametrize(
    ("trap", "granule", "memslots"), [("memory-fault", "8K", 256), ("mmio", "8K", 256), ("marker", "4K", 1)]
)
def test_the_summary_says_what_memslots_cost(trap, granule, memslots):
    options = () if trap == "marker" else ("--granule", granule)
    done = kvmdp("run", "--memory", "2M", "--trap", trap, *options)
    assert done.status == 0
    line = rf"^memslots +{memslots} at the end, granule {granule}, \d+\.\d MiB of kernel memory to arm$"
    assert re.search(line, done.out, re.MULTILINE)


def test_people_get_a_summary_on_stdout_and_progress_on_stderr():
    done = kvmdp("run", "--memory", "2M", "--vcpus", "2", "--trap", "mmio")
    assert done.status == 0
    lines = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert lines["pages"] == "512 of 512 present: 512 fetched"
    assert re.match(r"\d+ in \d+\.\d+ s, \d+ a second; exits: .*io 2", lines["faults"])
    assert re.match(r"p50 .* us, p99 .* us, max .* us", lines["latency"])
    assert lines["checksum"].endswith(": equal")
    assert lines["bytes"] == "512 present pages compared with the source: all exact"
    assert "set-up" in lines
    assert done.err == (
        "2M of memfd RAM from the synthetic image with seed 0, trap mmio, 2 vCPUs in ring 3, workload checksum\n"
    )


def test_the_seed_decides_the_checksum():
    first, again, other = (
        kvmdp("run", "--memory", "2M", "--trap", "mmio", "--seed", seed, "--json", "-").document
        for seed in (7, 7, 8)
    )
    assert first["guest_checksum"] == again["guest_checksum"] != other["guest_checksum"]


def test_a_program_of_ones_own_runs_and_nothing_is_expected_of_it(program):
    done = kvmdp("run", "--memory", "2M", "--guest", program(RETURN), "--json", "-")
    assert done.status == 0
    assert done.document["workload"] == "program"
    assert done.document["expected_checksum"] is None
    assert done.document["pages_present"] == 0
    assert "nothing is expected of a program" in kvmdp("run", "--guest", program(RETURN)).out


@pytest.mark.parametrize(
    ("trap", "granule"), [("marker", 4096), ("memory-fault", 1 << 18), ("mmio", 1 << 18)]
)
def test_4_gib_are_armed_and_touched(trap, granule):
    done = kvmdp(
        *("run", "--memory", "4G", "--workload", "touch", "--touches", 100, "--order", "random"),
        *("--trap", trap, "--json", "-"),
    )
    document = done.document
    assert done.status == 0
    assert document["ok"] is True
    assert document["accesses"] == 100
    assert document["granule"] == granule
    assert document["pages_present"] == document["pages_fetched"] == document["faults"] * granule // 4096
    assert document["setup_seconds"].keys() == PHASES


# The JSON file


def test_json_goes_to_a_file_beside_the_summary(tmp_path):
    target = tmp_path / "result.json"
    done = kvmdp("run", "--memory", "2M", "--json", target)
    assert done.status == 0
    assert done.out.startswith("pages ")
    assert json.loads(target.read_text())["ok"] is True
    assert [*tmp_path.iterdir()] == [target]


def test_a_run_that_fails_replaces_an_older_result_as_a_whole(tmp_path, program):
    target = tmp_path / "result.json"
    target.write_text("x" * 100_000)
    arguments = ("run", "--memory", "2M", "--guest", program(LOOP), "--timeout", "0.5", "--json")
    done = kvmdp(*arguments, target)
    document = json.loads(target.read_text())
    assert done.status == 1
    assert done.out == ""
    assert document["ok"] is False
    assert document["error"] == done.error
    assert document["schema"] == "kvmdp.run/1"
    assert document["trap"] in TRAPS
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "program.bin"}
    assert kvmdp(*arguments, "-").document["ok"] is False


def test_a_machine_that_cannot_be_made_says_so_in_the_file_too(tmp_path):
    prelude = """
from kvmdp.errors import UnsupportedError
from kvmdp.trap import registry
def cannot_be_made(made_of):
    raise UnsupportedError("this host has no mmio: get one")
registry.TRAPS["mmio"].make = cannot_be_made
"""
    target = tmp_path / "result.json"
    done = kvmdp("run", "--memory", "2M", "--trap", "mmio", "--json", target, prelude=prelude)
    assert done.status == 4
    assert done.error == "this host has no mmio: get one"
    document = json.loads(target.read_text())
    assert (document["ok"], document["error"]) == (False, done.error)


def test_a_result_that_cannot_be_written_leaves_no_half_of_itself(tmp_path):
    prelude = """
import errno, os, pathlib
def replace(self, target):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
pathlib.Path.replace = replace
"""
    target = tmp_path / "result.json"
    target.write_text("older")
    done = kvmdp("run", "--memory", "2M", "--trap", "mmio", "--json", target, prelude=prelude)
    assert done.status == 1
    assert done.error.startswith(f"--json {target} could not be written: No space left on device; ")
    assert target.read_text() == "older"
    assert [*tmp_path.iterdir()] == [target]


@pytest.mark.parametrize("arguments", [("--memory", "1M"), ("--image", "absent")])
def test_a_run_that_does_not_begin_keeps_an_older_result(tmp_path, arguments):
    target = tmp_path / "result.json"
    target.write_text("older")
    assert kvmdp("run", *arguments, "--json", target).status == 2
    assert target.read_text() == "older"
    assert [*tmp_path.iterdir()] == [target]


def test_what_cannot_be_written_is_said_before_the_run(tmp_path):
    directory = kvmdp("run", "--json", tmp_path)
    assert (directory.status, directory.out) == (2, "")
    assert directory.error == f"--json {tmp_path}: that is a directory; give a file name or -"
    absent = kvmdp("run", "--json", tmp_path / "absent" / "result.json")
    assert absent.status == 2
    assert absent.error.endswith(f"there is no directory {tmp_path / 'absent'}")


def test_the_result_is_a_file_like_any_other_and_a_link_stays_one(tmp_path):
    target, link = tmp_path / "result.json", tmp_path / "link.json"
    target.write_text("older")
    link.symlink_to(target)
    mask = os.umask(0o022)
    try:
        assert kvmdp("run", "--memory", "2M", "--json", link).status == 0
    finally:
        os.umask(mask)
    assert link.is_symlink()
    assert json.loads(target.read_text())["ok"] is True
    assert target.stat().st_mode & 0o777 == 0o644


def test_a_fifo_is_written_to_and_stays(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert kvmdp("run", "--memory", "2M", "--json", fifo).status == 0
        assert json.loads(os.read(reader, 1 << 16))["ok"] is True
    finally:
        os.close(reader)
    assert fifo.is_fifo()


# A terminal


def _read_all(terminal):
    """Return what was written to a pseudo-terminal whose other end is closed."""
    data = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # EIO: nobody has the other end any more
            return data.decode()
        if not piece:
            return data.decode()
        data += piece


def _screen(text):
    """Return the lines a terminal shows at the end, for the two escape sequences that the map uses."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[\d*[AJ]|\r\n)", text):
        if part == "\r\n":
            row += 1
            lines[row:] = lines[row:] or [""]
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1])
        elif part == "\x1b[J":
            lines[row:] = [""]
        elif part:
            lines[row] = part
    return [line for line in lines if line]


@pytest.mark.parametrize(("columns", "width"), [(0, 64), (100, 64), (40, 28)])
def test_a_terminal_shows_a_map_of_ram_that_is_gone_at_the_end(program, columns, width):
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, columns))
    arguments = ("--memory", "64M", "--guest", program(SLOW_WALK), "--timeout", "1", "--trap", "mmio")
    try:
        with Running("run", *arguments, stderr=end) as command:
            os.close(end)
            shown = _read_all(terminal)
            done = command.finish()
    finally:
        os.close(terminal)
    assert done.status == 1
    frames = shown.split("\x1b[J")
    assert len(frames) > 2
    rows = re.findall(r"^ +\d+[KM]? │([ ░▒▓█]+)│\r$", frames[1], re.MULTILINE)
    assert [len(row) for row in rows] == [width] * 8
    assert re.search(r"\d+ of 16384 pages present \(\d+%\), \d+ fau", frames[1])
    assert any(shade in frames[-2] for shade in "░▒▓█")
    assert all(len(line) <= (columns or 80) for frame in frames[1:-1] for line in frame.split("\r\n"))
    first, *rest = _screen(shown)
    assert first.startswith("64M of memfd RAM")
    assert [line[:45] for line in rest] == ["kvmdp: the guest was not done within 1 second"]


def test_no_escape_sequence_goes_elsewhere(program):
    with Running("run", "--memory", "64M", "--guest", program(SLOW_WALK), "--timeout", "2") as command:
        done = command.finish()
    assert "\x1b" not in done.err
    assert re.search(r"^\d+ of 16384 pages present \(\d+%\), \d+ faults/s$", done.err, re.MULTILINE)


@pytest.mark.parametrize("trap", TRAPS)
def test_page_tables_in_paged_ram_are_the_last_pages_and_part_of_the_proof(trap):
    done = kvmdp("run", "--memory", "2M", "--trap", trap, "--page-tables", "paged", "--json", "-")
    document = done.document
    assert (done.status, document["ok"], document["page_tables"]) == (0, True, "paged")
    assert document["accesses"] == (512 - 3) * 512
    assert document["pages_present"] == document["pages_checked"] == document["pages_fetched"] == 512


def test_page_tables_lie_in_the_boot_slot_unless_asked_otherwise():
    assert kvmdp("run", "--memory", "2M", "--pages", 4, "--json", "-").document["page_tables"] == "boot"


def test_a_program_is_told_of_the_pages_that_are_left_to_it(program):
    # mov rax,[rdi+0x30] (page_count); xor edx,edx; ret
    path = program(bytes.fromhex("488b4730 31d2 c3"))
    done = kvmdp("run", "--memory", "2M", "--guest", path, "--page-tables", "paged", "--json", "-")
    assert (done.status, int(done.document["guest_checksum"], 16)) == (0, 509)


@pytest.mark.userfaultfd
@pytest.mark.parametrize("trap", ["memory-fault:device-view", "mmio:device-view"])
def test_a_trap_with_a_device_view_proves_a_run(trap):
    done = kvmdp("run", "--memory", "2M", "--trap", trap, "--granule", "8K", "--json", "-")
    assert done.status == 0
    assert (done.document["ok"], done.document["device_view"]) == (True, True)
    assert done.document["trap"] == trap.removesuffix(":device-view")
    assert done.document["faults"] == 256


@pytest.mark.userfaultfd
@pytest.mark.parametrize("mode", ["missing", "minor"])
def test_userfaultfd_proves_a_run_in_either_mode(mode):
    done = kvmdp("run", "--memory", "2M", "--trap", "userfaultfd", "--uffd-mode", mode, "--json", "-")
    assert done.status == 0
    assert done.document["pages_fetched"] == 512


def test_a_simulated_network_delays_and_changes_no_byte():
    arguments = ("run", "--memory", "2M", "--trap", "mmio", "--json", "-")
    near = kvmdp(*arguments).document
    far = kvmdp(*arguments, "--latency", "1ms", "--bandwidth", "1Gbit").document
    assert far["ok"] is True
    assert (near["latency_s"], near["bandwidth_bytes_per_s"]) == (0, 0)
    assert (far["latency_s"], far["bandwidth_bytes_per_s"]) == (0.001, 125e6)
    assert far["guest_checksum"] == near["guest_checksum"]
    assert far["seconds"] > 512 * 0.001  # what was slept, not what it took


def test_a_trace_has_each_fault_and_says_what_the_run_was(tmp_path):
    trace = tmp_path / "trace"
    arguments = ("--memory", "2M", "--trap", "mmio", "--vcpus", 2, "--fault-around", 4)
    done = kvmdp("run", *arguments, "--trace", trace, "--json", "-")
    assert done.status == 0
    header, *records = [json.loads(line) for line in trace.read_text().splitlines()]
    assert header == {
        "schema": "kvmdp.trace/1",
        "contender": None,
        "version": kvmdp("--version").out.split()[1],
        "trap": "mmio",
        "vcpus": 2,
        "memory_bytes": 2 << 20,
    }
    assert len(records) == done.document["faults"] == 128
    assert sum(record[5] for record in records) == 512
    assert {record[3] for record in records} == {"vcpu 0", "vcpu 1"}
    report = kvmdp("report", trace)
    assert report.status == 0
    assert "mmio, 2 vCPUs: 128 faults" in report.out


def test_a_run_that_fails_leaves_the_trace_of_what_it_got_to(image, tmp_path):
    trace = tmp_path / "trace"
    prelude = """
import errno, os
real = os.preadv
def preadv(fd, buffers, offset):
    if offset >= 5 * 4096:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return real(fd, buffers, offset)
os.preadv = preadv
"""
    arguments = ("--image", image(2 << 20), "--trap", "mmio", "--trace", trace)
    assert kvmdp("run", *arguments, prelude=prelude).status == 1
    header, *records = [json.loads(line) for line in trace.read_text().splitlines()]
    assert header["trap"] == "mmio"
    assert [record[1] for record in records] == [page * 4096 for page in range(5)]


def test_a_limit_to_what_is_in_memory():
    done = kvmdp("run", "--memory", "4M", "--resident-limit", "1M", "--workload", "atomic", "--json", "-")
    assert done.status == 0
    document = done.document
    assert document["resident_limit_bytes"] == 1 << 20
    assert document["resident_peak_bytes"] <= (1 << 20) + 4096
    assert document["pages_evicted"] >= 768
    assert document["pages_checked"] == 1024
    done = kvmdp("run", "--memory", "4M", "--resident-limit", "1M")
    assert re.search(r"limit +1M in memory, 1\.0 MiB at the most: \d+ evicted, \d+ fetched again", done.out)
    assert "bytes      1024 pages, present or evicted, compared with the source: all exact" in done.out
    assert "limit " not in kvmdp("run", "--memory", "2M", "--pages", 4).out


@pytest.mark.parametrize("trap", TRAPS)
def test_poisoned_pages_are_told_of_and_left_out(trap):
    done = kvmdp(
        "run", "--memory", "2M", "--trap", trap, "--workload", "poison", "--poison", 3, "--json", "-"
    )
    assert done.status == 0
    poison = done.document["poison"]
    assert len(set(poison["pages"])) == 3
    assert poison["addresses"] == poison["expected"] == poison["pages"]
    assert poison["machine_checks"] == 3
    assert done.document["pages_present"] == 512 - 3


def test_the_summary_names_the_poisoned_pages():
    command = ("run", "--memory", "2M", "--workload", "poison", "--poison", 2)
    line = "poison     2 pages, 2 machine checks: one for each of them that the guest touched, at gpa "
    assert re.search(f"^{line}0x[0-9a-f]+, 0x[0-9a-f]+$", kvmdp(*command).out, re.MULTILINE)
    assert kvmdp(*command, "--seed", 1).out != kvmdp(*command, "--seed", 2).out
    assert "poison" not in kvmdp("run", "--memory", "2M").out


def test_poison_for_a_program_that_does_not_expect_it_is_reported(tmp_path):
    path = tmp_path / "walk"
    path.write_bytes(SLOW_WALK)
    done = kvmdp("run", "--memory", "2M", "--guest", path, "--poison", 192, "--timeout", 20)
    assert done.status == 1
    assert "guest exception #MC at RIP 0xd01" in done.error


def test_how_often_and_how_long_vcpus_were_stopped():
    require_trap("memory-fault")
    limited = ("run", "--memory", "2M", "--resident-limit", "512K", "--vcpus", 2)
    document = kvmdp(*limited, "--trap", "memory-fault", "--json", "-").document
    assert document["stops"] > 0
    assert document["longest_stop_us"] > 0
    out = kvmdp(*limited, "--trap", "memory-fault").out
    assert re.search(r"stops +\d+ of the vCPUs, the longest [0-9.]+ us", out)
    document = kvmdp("run", "--memory", "2M", "--trap", "marker", "--json", "-").document
    assert document["stops"] == document["longest_stop_us"] == 0
