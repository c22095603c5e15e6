"""The options of `kvmdp handler` and `kvmdp device`, and what is drawn for each."""

from kvmdp.size import parse_size
from random_options import files
from random_options.machine_options import PAGE_OPTIONS
from random_options.options import NO_SECONDS, Option
from random_options.work_options import NO_DISK, disk

_NO_SOCKET = ("", ".", "absent/sock", "x" * 200, lambda draw: draw.file("no.sock", files.holds(b"")))


def _synthetic(draw):
    size = draw.of("2M", "3M", "4m", "8M")
    draw.pages = parse_size(size) // files.PAGE
    return size + draw.of("", ",0", f",{(1 << 64) - 1}")


HANDLER_OPTIONS = {
    "--listen": Option(lambda _draw: "handler.sock", _NO_SOCKET, 1),
    "--image": PAGE_OPTIONS["--image"],
    "--synthetic": Option(
        _synthetic,
        ("", "x", "4M,x", "4M,-1", "0", "2M,1,1", f"2M,{1 << 64}", "4097"),
        1,
        lambda draw: "--image" not in draw.given,
    ),
    "--image-format": PAGE_OPTIONS["--image-format"],
    "--image-layout": PAGE_OPTIONS["--image-layout"],
    "--latency": PAGE_OPTIONS["--latency"],
    "--bandwidth": PAGE_OPTIONS["--bandwidth"],
}

DEVICE_OPTIONS = {
    "--connect": Option(lambda _draw: "device.sock", ("absent.sock", *_NO_SOCKET), 1),
    "--file": Option(disk, NO_DISK, 1),
    "--timeout": Option(lambda draw: draw.of("5", "1e3"), NO_SECONDS, 0.3),
    "--disk-format": Option(lambda _draw: "raw", ("qcow2", ""), 0.3),
}
