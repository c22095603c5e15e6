"""The machine's I/O ports: which handler serves which, and the loopback device.

A handler is called in the thread of the vCPU that did the I/O, with the vCPU's index and the exit, once for all
items of a string instruction that KVM has put together (`Io.count`). For a write it takes `io.data`, for a read it
fills it. Handlers of different vCPUs run at the same time.

Units: bytes.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmdp.kvm import Io, IoOut
from kvmdp.machine.guest_abi import LOOPBACK_PORT

PortHandler = Callable[[int, Io], None]

_LOOPBACK_BYTES = 4096
_NOTHING_THERE = 0xFF  # what a bus reads where no device answers


class Ports:
    """Which handler serves which port."""

    def __init__(self) -> None:
        self._handlers: dict[int, PortHandler] = {}

    def add(self, port: int, handler: PortHandler) -> None:
        """Have `handler` serve a port, before vCPUs run. Raises ValueError if another serves it."""
        if port in self._handlers:
            raise ValueError(f"port {port:#x} is taken: give the device another")
        self._handlers[port] = handler

    def handle(self, vcpu: int, io: Io) -> bool:
        """Serve an exit of vCPU number `vcpu`; False if the port has no handler."""
        handler = self._handlers.get(io.port)
        if handler is None:
            return False
        handler(vcpu, io)
        return True


class Loopback:
    """What a vCPU writes to `LOOPBACK_PORT` it reads back, byte by byte, in the same order.

    A queue for each of `vcpus` vCPUs, touched by that vCPU's thread alone. It keeps 4 KiB, as a device would: what
    does not fit is lost, and where there is nothing a read gives bytes of ones.
    """

    def __init__(self, ports: Ports, vcpus: int) -> None:
        self._queues = [bytearray() for _ in range(vcpus)]
        ports.add(LOOPBACK_PORT, self._serve)

    def _serve(self, vcpu: int, io: Io) -> None:
        queue, length = self._queues[vcpu], io.data.nbytes
        if isinstance(io, IoOut):
            queue += io.data[: max(_LOOPBACK_BYTES - len(queue), 0)]
            return
        found = bytes(queue[:length])
        io.data[:] = found + bytes([_NOTHING_THERE]) * (length - len(found))
        del queue[: len(found)]
