"""Where peers meet: a Unix SEQPACKET socket at a path, and which process is at the other end of a connection.

Only processes of the same user, or root's, are let in (SO_PEERCRED). A peer counts as dead when its pidfd says so, not
when its connection ends: a process that has closed its socket can still write into memory that it has mapped, and a
child of a dead one can hold its end of the connection open.

Sources: unix(7), pidfd_open(2) (Linux 5.3), SO_PEERPIDFD (Linux 6.5). Units: seconds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kvmdp.abi.socket import SO_PEERPIDFD
from kvmdp.closing import Closing
from kvmdp.errors import KvmdpError

MAX_PATH = 107  # bytes: sun_path has 108, one of them the NUL

_UCRED = struct.Struct("3i")
# A listener that is alive takes in all that wait within milliseconds, however many come at once.
_CROWDED_SECONDS = 1.0
_RETRY_SECONDS = 0.01


class EndpointError(KvmdpError):
    """No process can be met at a path, or none that may be; the message says why and what to do."""


@dataclass(slots=True)
class Peer:
    """The process at the other end of a connection; owns its pidfd.

    Of a connection that was made by `connect` it is the process that listens.
    """

    pid: int
    uid: int
    pidfd: int

    @classmethod
    def of(cls, connection: socket.socket) -> Self:
        """Return the process that is connected.

        Raises EndpointError if it is another user's process, one that has gone, or one that cannot be seen from here.
        """
        pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if not pid:  # pid_namespaces(7): what has no number in this namespace
            raise EndpointError(
                "the process at the other end is in another PID namespace, so that its death could not be seen: run "
                "both in the same one (docker run --pid host, or --pid container:NAME)"
            )
        if uid not in (os.geteuid(), 0):
            raise EndpointError(
                f"process {pid} belongs to user {uid}: only this user's, or root's, may be a peer"
            )
        return cls(pid, uid, _pidfd_of(connection, pid))

    def wait_dead(self, timeout: float) -> bool:
        """Wait until the process has ended; False if it lives on after `timeout` seconds."""
        return bool(_readable(timeout, self.pidfd))

    def wait_message(self, connection: socket.socket, timeout: float) -> bool:
        """Wait until something can be received on `connection`, or the process has ended.

        False after `timeout` seconds. What is received then does not wait if it is asked not to (MSG_DONTWAIT).
        """
        return bool(_readable(timeout, self.pidfd, connection.fileno()))

    def close(self) -> None:
        """Close the pidfd; a second call does nothing."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def _readable(timeout: float, *descriptors: int) -> list[int]:
    """Return which of the descriptors are readable, or closed at the other end; none after `timeout` seconds."""
    poll = select.poll()  # select takes no descriptor above 1,023
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(max(timeout, 0) * 1000)]


def _pidfd_of(connection: socket.socket, pid: int) -> int:
    """Return a pidfd of the process that is connected, whose number was `pid` then. Raises EndpointError, OSError.

    The number may belong to another process by now: one that ends at once leaves it, and its connection, behind. The
    socket itself knows which process it was (SO_PEERPIDFD). Before Linux 6.5 there is the number alone. Then the
    connection is looked at once the pidfd is there: it is closed if its process has ended, so one that is open has the
    process that had the number all the time. (Unless a child of the dead process holds it open: nothing tells that.)
    """
    ended = EndpointError(f"process {pid} has ended before its session began")
    try:
        return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno in (
            errno.ESRCH,
            errno.EINVAL,
        ):  # EINVAL: what kernels before 6.16 say of a process that has gone
            raise ended from None
        if error.errno != errno.ENOPROTOOPT:
            raise
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise ended from None
    poll = select.poll()
    poll.register(connection, 0)  # that the other end is closed is said unasked
    if poll.poll(0):
        os.close(pidfd)
        raise ended
    return pidfd


class Listener(Closing):
    """Listens at `path`; owns the socket and its file.

    A socket file that a dead process has left there is replaced. Raises EndpointError if there is anything else, or
    a process listens there already; OSError.
    """

    def __init__(self, path: str) -> None:
        _check_length(path)
        remove_dead(path)
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            before = os.umask(0o077)  # no other user may connect
            try:
                self.socket.bind(path)
            finally:
                os.umask(before)
            self._inode = Path(path).stat().st_ino
            self.socket.listen()
        except OSError as error:
            self.socket.close()
            raise EndpointError(f"cannot listen at {path}: {error.strerror}; name another path") from None

    def accept(self, timeout: float | None = None) -> socket.socket:
        """Return the next connection. Raises TimeoutError after `timeout` seconds, BlockingIOError if that is 0."""
        self.socket.settimeout(timeout)
        connection, _ = self.socket.accept()
        connection.setblocking(True)
        return connection

    def close(self) -> None:
        """Stop listening and remove the socket's file, if it is still this one; a second call does nothing."""
        if self.socket.fileno() < 0:
            return
        # In this order, or a second call after one that was cut short would leave the file.
        with contextlib.suppress(FileNotFoundError):
            if Path(self.path).stat().st_ino == self._inode:
                Path(self.path).unlink()
        self.socket.close()


def connect(path: str) -> socket.socket:
    """Return a connection to the process that listens at `path`.

    While too many others wait there it tries again, for a second at the most. Raises EndpointError if there is no
    socket, no listener, or another user's socket.
    """
    _check_length(path)
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        raise EndpointError(
            f"there is no socket {path}: start the process that listens there first"
        ) from None
    except OSError as error:
        raise EndpointError(f"cannot look at {path}: {error.strerror}") from None
    if not stat.S_ISSOCK(found.st_mode):
        raise EndpointError(f"{path} is not a socket: name the one that the other side listens at")
    if found.st_uid not in (os.geteuid(), 0):
        raise EndpointError(
            f"the socket {path} belongs to user {found.st_uid}: only this user's, or root's, is used"
        )
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _connect(connection, path)
    except PermissionError:
        connection.close()
        raise EndpointError(
            f"cannot connect to {path}, which belongs to user {found.st_uid}: run both sides as the same user"
        ) from None
    except OSError as error:
        connection.close()
        why = {
            errno.ECONNREFUSED: "no process listens there any more",
            errno.EAGAIN: "too many others wait there already",
            errno.EPROTOTYPE: "it is a socket of another type, not kvmdp's",
        }.get(error.errno or 0, str(error.strerror))
        raise EndpointError(
            f"cannot connect to {path}: {why}; start the process that listens there first"
        ) from None
    return connection


def _connect(connection: socket.socket, path: str) -> None:
    """Connect, with a bound on the wait while the listener's queue is full. Raises OSError."""
    deadline = time.monotonic() + _CROWDED_SECONDS
    connection.setblocking(False)  # or it would wait for as long as the queue is full
    while True:
        try:
            connection.connect(path)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_RETRY_SECONDS)
    connection.setblocking(True)


def _check_length(path: str) -> None:
    length = len(os.fsencode(path))
    if not 1 <= length <= MAX_PATH:
        raise EndpointError(
            f"a socket path has 1 to {MAX_PATH} bytes, this one has {length}: choose a shorter one, or change to its "
            "folder and give a relative one"
        )


def remove_dead(path: str) -> None:
    """Remove a socket file at which no process listens any more; EndpointError if the path is taken otherwise."""
    try:
        found = Path(path).lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise EndpointError(f"cannot look at {path}: {error.strerror}") from None
    if not stat.S_ISSOCK(found.st_mode):
        raise EndpointError(f"{path} is there already and is not a socket: name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)  # or it would wait while the listener's queue is full
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # that queue is full: so there is a listener
        except OSError as error:
            raise EndpointError(f"{path} is there already ({error.strerror}): name another path") from None
    raise EndpointError(f"a process listens at {path} already: name another path, or end that process")
