"""A device process that is killed in mid-transfer: the next goes on, and the guest ends exact."""

import random
import signal
import subprocess
import time

import forked
import pytest

from kvmdp.machine.hostinfo import cpu_model

pytestmark = pytest.mark.kvm

START = "from kvmdp.cli.entry import entry; entry()"
# A CPU that QEMU emulates takes minutes for what a real one does in seconds.
ROUNDS, KILLS = (1, 2) if cpu_model().startswith("QEMU TCG") else (2, 4)
SOON = 60
MEMORY = "32M"


def start(*arguments):
    return forked.start(
        START,
        *arguments,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_devices(folder, kills, seed):
    """Run the workload, kill the device `kills` times at random moments; returns (status, out, err, kills made)."""
    moments = random.Random(seed)
    disk, path = folder / f"disk{seed}", folder / f"socket{seed}"
    with disk.open("wb") as file:
        file.truncate(32 << 20)
    run = start(
        "run",
        "--memory",
        MEMORY,
        "--workload",
        "disk",
        "--vcpus",
        2,
        "--trap",
        "mmio",
        "--device-socket",
        path,
    )
    device, made = None, 0
    try:
        while not path.exists():
            assert run.poll() is None, run.communicate()
            time.sleep(0.01)
        while made < kills and run.poll() is None:
            device = start("device", "--connect", path, "--file", disk)
            assert "is the disk of process" in device.stderr.readline()
            time.sleep(moments.random() * 0.3)
            if device.poll() is None:
                device.send_signal(signal.SIGKILL)
                made += 1
            device.communicate(timeout=SOON)
        if run.poll() is None:
            device = start("device", "--connect", path, "--file", disk)
        out, err = run.communicate(timeout=SOON)
        device.communicate(timeout=SOON)
        assert not path.exists()
        return run.returncode, out, err, made
    finally:
        for process in (run, device):
            if process is not None and process.poll() is None:
                process.kill()
                process.communicate()


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_devices_killed_at_random_moments_leave_the_guest_exact(tmp_path, seed):
    status, out, err, made = kill_devices(tmp_path, KILLS, seed)
    assert status == 0, err
    assert "all exact" in out
    assert "Traceback" not in err
    assert made > 0
    assert err.count("outstanding; waiting 30 seconds for another") >= made


def test_no_successor_is_an_end_with_one_sentence(tmp_path):
    disk, path = tmp_path / "disk", tmp_path / "socket"
    with disk.open("wb") as file:
        file.truncate(32 << 20)
    run = start(
        "run",
        "--memory",
        MEMORY,
        "--workload",
        "disk",
        "--trap",
        "mmio",
        "--device-socket",
        path,
        "--device-timeout",
        1,
    )
    try:
        while not path.exists():
            assert run.poll() is None, run.communicate()
            time.sleep(0.01)
        device = start("device", "--connect", path, "--file", disk)
        assert "is the disk of process" in device.stderr.readline()
        device.kill()
        device.communicate(timeout=SOON)
        _, err = run.communicate(timeout=SOON)
    finally:
        run.kill()
        run.communicate()
    assert run.returncode == 1
    assert f"kvmdp: paused: no device came to {path} within 1 seconds" in err
    assert not path.exists()
