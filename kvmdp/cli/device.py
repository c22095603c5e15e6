"""`kvmdp device`: the disk of a machine in another process."""

from __future__ import annotations

import argparse
import os

from kvmdp.cli.disk_options import add_format_option
from kvmdp.cli.output import EXIT_OK, UsageError, say
from kvmdp.cli.paths import check_distinct, reads, writes
from kvmdp.errors import PagingError
from kvmdp.machine.disk import DiskError, DiskFile
from kvmdp.machine.remote_disk import HANDOVER_SECONDS, serve_disk
from kvmdp.peers.wire.endpoint import EndpointError, Peer, connect
from kvmdp.peers.wire.handover import HandoverError
from kvmdp.shortage import NoThreadError
from kvmdp.size import format_size


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "device",
        allow_abbrev=False,
        help="be the disk of a machine that kvmdp run --device-socket has started",
        description="Connect to a machine, be handed its memory, and serve its disk from a file until it ends. Needs "
        "no /dev/kvm.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--connect",
        metavar="PATH",
        help="the machine's --device-socket (default: none, must be given)",
        required=True,
    )
    parser.add_argument(
        "--file",
        metavar="DISK",
        help="file that holds the disk's sectors (default: none, must be given)",
        required=True,
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=HANDOVER_SECONDS,
        metavar="S",
        help=f"seconds to wait for this device's turn: a machine has one at a time (default: {HANDOVER_SECONDS:g})",
    )
    add_format_option(parser)


def run(options: argparse.Namespace) -> int:
    """Serve, print what was done, return the exit status."""
    check_distinct(reads("--connect", options.connect), writes("--file", options.file))
    if not options.timeout > 0:
        raise UsageError(f"--timeout {options.timeout:g}: give more than 0 seconds")
    try:
        file = DiskFile.open(options.file, any_format=options.disk_format is not None)
    except DiskError as error:
        raise UsageError(f"--file: {error}") from None
    with file:
        try:
            connection = connect(options.connect)
        except EndpointError as error:
            raise UsageError(f"--connect: {error}") from None
        with connection:
            try:
                machine = Peer.of(connection)
                say(
                    f"process {os.getpid()} is the disk of process {machine.pid}: {format_size(file.size)} in "
                    f"{options.file}"
                )
                device = serve_disk(connection, machine, file, options.timeout)
            except (EndpointError, HandoverError, NoThreadError, ValueError) as error:
                raise PagingError(f"no session with {options.connect}: {error}") from None
    print(f"disk       {device.requests} requests, {device.sectors} sectors of 512 bytes")
    return EXIT_OK
