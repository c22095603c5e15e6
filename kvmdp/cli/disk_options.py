"""The options of `kvmdp run` that concern the disk, and the device they ask for."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from kvmdp.cli.leftovers import listening
from kvmdp.cli.lists import given_mode
from kvmdp.cli.output import UsageError, say
from kvmdp.lab.experiment import DeviceFactory, in_process_disk
from kvmdp.machine.disk import DiskError, disk_file
from kvmdp.machine.machine import Machine
from kvmdp.machine.remote_disk import RemoteDisk
from kvmdp.memory.backings import backing_class
from kvmdp.peers.wire.endpoint import EndpointError
from kvmdp.trap.fits import Together, check

__all__ = ["add_disk_options", "add_format_option", "disk_device"]


def add_disk_options(group: argparse._ArgumentGroup) -> None:
    """Add them."""
    option = group.add_argument
    option("--disk", metavar="FILE", help="disk: the file it is (default: a temporary one)")
    add_format_option(group)
    option(
        "--device-socket",
        metavar="PATH",
        help="disk: let a device process in there (kvmdp device) instead of serving the disk here (default: none)",
    )
    option(
        "--device-timeout",
        type=float,
        default=30,
        metavar="S",
        help="seconds to wait for a device process, the first or the next, and for one that does not get on with its "
        "work before it is cut off (default: 30)",
    )


def add_format_option(group: argparse._ActionsContainer) -> None:
    """Add that which says what kind of file a disk is."""
    group.add_argument(
        "--disk-format",
        choices=("raw",),
        help="raw: take the disk's file for sectors whatever it looks like (default: refuse other formats)",
    )


@contextlib.contextmanager
def disk_device(options: argparse.Namespace, disk_bytes: int) -> Iterator[DeviceFactory | None]:
    """Give what attaches the disk that the options ask for, None if that is none. Raises UsageError.

    `disk_bytes` is what the workload needs, 0 if it needs no disk; a program of the user's own may have one.
    """
    asked = options.disk is not None or options.device_socket is not None
    if options.disk is not None and options.device_socket is not None:
        raise UsageError(
            "--disk is for a disk served here: with --device-socket give kvmdp device --file instead"
        )
    if options.disk_format is not None and options.disk is None:
        raise UsageError("--disk-format is for --disk: name a file, or leave it out")
    if asked and not disk_bytes and options.guest is None:
        raise UsageError(f"the workload {options.workload} uses no disk: give --workload disk, or --guest")
    if not options.device_timeout > 0:
        raise UsageError(f"--device-timeout {options.device_timeout:g}: give more than 0 seconds")
    if options.device_socket is None:
        if not asked and not disk_bytes:
            yield None
            return
        try:
            with disk_file(options.disk, disk_bytes, any_format=options.disk_format is not None):
                pass  # what is wrong with it is said before anything is set up
        except DiskError as error:
            raise UsageError(str(error)) from None
        yield in_process_disk(disk_bytes, options.disk, any_format=options.disk_format is not None)
        return
    try:
        check(Together(backing_class(options.backing), mode=given_mode(options), devices=True))
    except ValueError as error:
        raise UsageError(f"--device-socket: {error}") from None
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(listening(options.device_socket))
        except EndpointError as error:
            raise UsageError(f"--device-socket: {error}") from None
        say(f"waiting for a device at {listener.path}")

        def attach(machine: Machine) -> RemoteDisk:
            return RemoteDisk(machine, listener, options.device_timeout, say)

        yield attach
