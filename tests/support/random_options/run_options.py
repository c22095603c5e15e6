"""The options of `kvmdp run`, in the order in which they are drawn: each may look at what those before it are."""

from kvmdp.size import parse_size
from kvmdp.trap.registry import TRAPS
from random_options import files
from random_options.machine_options import (
    HUGE,
    MACHINE_OPTIONS,
    MEMORY_OPTIONS,
    PAGE_OPTIONS,
    TRAP_OPTIONS,
    goes,
    image,
)
from random_options.options import NO_SECONDS, Option, has
from random_options.work_options import RESULT_OPTIONS, WORK_OPTIONS


def _huge_memory(draw):
    text = draw.of("2M", "4M", "6M", "8M")
    draw.pages = parse_size(text) // files.PAGE
    return text


# A machine alone has none of these: those of machines that have peers are given them.
PEER_OPTIONS = {
    "--handler": Option(
        lambda _draw: "handler.sock",
        ("absent.sock", ".", "", "x" * 200, lambda draw: draw.file("no.sock", files.holds(b""))),
        0,
        has("--handler"),
    ),
    "--handler-timeout": Option(lambda draw: draw.of("5", "1e3"), NO_SECONDS, 0.3, has("--handler")),
    "--device-socket": Option(
        lambda _draw: "device.sock",
        ("", ".", "absent/sock", "x" * 200, lambda draw: draw.file("no.sock", files.holds(b""))),
        0,
        has("--device-socket"),
    ),
    "--device-timeout": Option(lambda draw: draw.of("5", "8.5"), NO_SECONDS, 1, has("--device-socket")),
}

_ORDER = (
    MACHINE_OPTIONS,
    PAGE_OPTIONS,
    MEMORY_OPTIONS,
    WORK_OPTIONS,
    TRAP_OPTIONS,
    RESULT_OPTIONS,
    PEER_OPTIONS,
)
RUN_OPTIONS = {name: option for table in _ORDER for name, option in table.items()}
# Of a machine whose RAM is huge pages.
HUGE_RUN_OPTIONS = RUN_OPTIONS | {
    "--trap": Option(
        lambda draw: draw.rng.choice(["auto", *(trap for trap in TRAPS if goes(trap, HUGE[0]))]), share=0.9
    ),
    "--backing": Option(lambda draw: draw.of(*HUGE), ("hugetlb", "private-hugetlb-1g"), 1),
    "--image": Option(image, share=0),
    "--memory": Option(_huge_memory, ("0", "3M"), 1),
}
