"""Each command in an interpreter that has loaded nothing else: it loads all that it needs, and nothing is in its way.

Elsewhere commands are forked from a process that has loaded all of them (tests/support/forked.py).
"""

import json

import pytest
from command import Running, kvmdp
from commands import EXACT, FEW_CELLS, MEASURING, RUN
from report_documents import comparison

needs_kvm = pytest.mark.kvm


@needs_kvm
@pytest.mark.parametrize("name", MEASURING)
def test_a_command_that_measures(name):
    arguments, expected = MEASURING[name]
    done = kvmdp(*arguments, prelude=FEW_CELLS if name in ("probe", "coverage") else "", fresh=True)
    assert done.status == 0, done.err
    assert expected in done.out


@needs_kvm
@pytest.mark.parametrize("options", [(), ("--detect-leaks",), ("--collapse", "background")], ids=" ".join)
def test_a_run(options):
    done = kvmdp("run", "--memory", "2M", *options, fresh=True)
    assert done.status == 0, done.err
    assert EXACT.strip() in done.out


@needs_kvm
def test_a_run_with_a_handler_and_a_device(tmp_path):
    disk, handler_socket, device_socket = (tmp_path / name for name in ("disk", "handler", "device"))
    disk.write_bytes(bytes(2 << 20))
    run = (*RUN, "--workload", "disk", "--handler", handler_socket, "--device-socket", device_socket)
    with Running("handler", "--listen", handler_socket, "--synthetic", "2M", fresh=True) as handler:
        handler.wait_for_progress("serving")
        with Running(*run, fresh=True) as machine:
            machine.wait_until(device_socket.exists)
            assert kvmdp("device", "--connect", device_socket, "--file", disk, fresh=True).status == 0
            assert machine.finish().status == 0
        handler.process.terminate()
        assert handler.finish().status == 130


def test_a_report(tmp_path):
    document = tmp_path / "comparison.json"
    document.write_text(json.dumps(comparison((1,), (0.0,), ("present", "mmio", "userfaultfd"))))
    done = kvmdp("report", document, "--report", tmp_path / "report", fresh=True)
    assert done.status == 0, done.err
    assert (tmp_path / "report" / "index.html").exists()
