"""A PC in QEMU, for what kvmdp is given by others: its memory, in all the forms that QEMU writes it in, and disks."""

import contextlib
import json
import socket
import subprocess
import time

SECONDS = 120  # how long the firmware may take, or a command, on the slowest emulation


class Monitor:
    """QEMU's machine protocol (QMP) over a socket."""

    def __init__(self, connection):
        self._stream = connection.makefile("rw", encoding="utf-8")
        self._answer("QMP")
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        self._stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._stream.flush()
        return self._answer("return")

    def _answer(self, kind):
        for line in self._stream:
            message = json.loads(line)
            assert "error" not in message, message
            if kind in message:
                return message[kind]
        raise AssertionError(f"QEMU ended without an answer of kind {kind}")

    def job(self, command, **arguments):
        """Run a command that goes on by itself, to its end."""
        self(command, **{"job-id": "job"}, **arguments)
        deadline = time.monotonic() + SECONDS
        while (job := self("query-jobs")[0])["status"] != "concluded":
            assert time.monotonic() < deadline, f"{command} does not end"
            time.sleep(0.01)
        assert "error" not in job, job
        self("job-dismiss", id="job")

    def close(self):
        self._stream.close()


@contextlib.contextmanager
def pc(*options, machine="pc"):
    """Run a PC with firmware and nothing to boot, in software; yields its monitor."""
    here, there = socket.socketpair()
    with here:
        here.settimeout(SECONDS)
        with there:
            process = subprocess.Popen(
                [
                    *("qemu-system-x86_64", "-machine", f"{machine},accel=tcg", "-display", "none"),
                    *("-nodefaults", "-no-user-config", *options),
                    *("-chardev", f"socket,id=monitor,fd={there.fileno()}", "-mon", "monitor,mode=control"),
                ],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
            )
        try:
            with contextlib.closing(Monitor(here)) as monitor:
                yield monitor
                monitor("quit")
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()
            process.wait()
