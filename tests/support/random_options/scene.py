"""Commands that belong together, drawn by a number."""

import dataclasses
import random
import shlex
from collections.abc import Callable
from pathlib import Path

from random_options.bench_options import (
    BENCH_OPTIONS,
    COMPARE_OPTIONS,
    HUGE_BENCH_OPTIONS,
    PROBE_OPTIONS,
    REPORT_OPTIONS,
)
from random_options.options import Draw
from random_options.peer_options import DEVICE_OPTIONS, HANDLER_OPTIONS
from random_options.run_options import HUGE_RUN_OPTIONS, RUN_OPTIONS

_NONSENSE = 0.2  # how often a command makes no sense
_NONSENSE_BESIDE = 0.07  # from which the others suffer

# What there is to draw from: for each command, its options and operands.
TABLES = {
    "run": RUN_OPTIONS,
    "handler": HANDLER_OPTIONS,
    "device": DEVICE_OPTIONS,
    "bench": BENCH_OPTIONS,
    "compare": COMPARE_OPTIONS,
    "report": REPORT_OPTIONS,
    "probe": PROBE_OPTIONS,
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line and what may come of it.

    `given` are its options. `refused`: it has to end with status 2, or 4. `may_fail`: it may end with 1, though never
    of a mismatch. `until`: the file that shows that the next command may begin beside this one; None has the next wait
    for its end. `served`: it goes on until it is interrupted.
    """

    arguments: list[str]
    given: dict[str, str | None]
    refused: bool = False
    may_fail: bool = False
    until: str | None = None
    served: bool = False

    @property
    def name(self):
        """The subcommand."""
        return self.arguments[0]

    def __str__(self):
        return shlex.join(["kvmdp", *self.arguments])


@dataclasses.dataclass(frozen=True)
class Scene:
    """`commands`, in the order of their beginning, and the `files` that they need: name -> what makes one at a path."""

    name: str
    commands: list[Command]
    files: dict[str, Callable[[Path], None]]

    def __str__(self):
        return "\n".join(f"    {command}{' &' if command.until else ''}" for command in self.commands)


class _Drawing:
    """A scene being drawn."""

    def __init__(self, name):
        family, _, number = name.partition(":")
        self.rng = random.Random(int(number))
        self.scene = Scene(name, [], {})
        FAMILIES[family](self)

    def command(self, name, given=(), pages=None, table=None, nonsense=_NONSENSE, **about):
        """Draw a command, in a share of the cases with `nonsense` in it.

        What it is `given` is not drawn. `pages` is what the guest has, if that is known before.
        """
        draw = Draw(self.rng, self.scene.files)
        draw.given |= given
        draw.pages = pages
        table = table or TABLES[name]
        draw.add({option: value for option, value in table.items() if option not in draw.given})
        draw.spoil(table, nonsense)
        arguments = draw.arguments(name)
        self.scene.commands.append(Command(arguments, draw.given, draw.refused, draw.may_fail, **about))
        return draw

    def machine(self):
        """A machine alone."""
        self.command("run")

    def huge_machine(self):
        """A machine whose RAM is huge pages, or a comparison of some."""
        if self.rng.random() < 0.1:
            self.command("bench", table=HUGE_BENCH_OPTIONS)
        else:
            self.command("run", table=HUGE_RUN_OPTIONS)

    def peers(self):
        """A machine with a handler, a device or both."""
        given, pages = {}, None
        kind = self.rng.choice(("handler", "device", "both"))
        if kind != "device":
            handler = self.command("handler", nonsense=_NONSENSE_BESIDE, until="handler.sock", served=True)
            given["--handler"], pages = "handler.sock", handler.pages
            if "--image" in handler.given and self.rng.random() < 0.7:
                given["--image"] = handler.given["--image"]
        if kind != "handler":
            given |= {"--workload": "disk", "--device-socket": "device.sock"}
        self.command("run", given, pages, nonsense=_NONSENSE_BESIDE, until=given.get("--device-socket"))
        if kind != "handler":
            self.command("device", nonsense=_NONSENSE_BESIDE)

    def measured(self):
        """A comparison and its report, or either."""
        kind = self.rng.choices(("bench", "compare", "report", "probe"), (6, 2, 1, 1))[0]
        measured = self.command(kind, nonsense=_NONSENSE_BESIDE)
        if measured.given.get("--json") == "result.json" and self.rng.random() < 0.6:
            self.command("report", {"file": "result.json"})
        if kind == "probe":
            return
        if measured.given.get("--trace") == "trace.jsonl" and self.rng.random() < 0.6:
            self.command("report", {"file": "trace.jsonl"})


FAMILIES = {
    "run": _Drawing.machine,
    "hugepages": _Drawing.huge_machine,
    "peers": _Drawing.peers,
    "measured": _Drawing.measured,
}


def draw_scene(name):
    """Return the scene FAMILY:NUMBER, always the same."""
    return _Drawing(name).scene


def make_files(scene, folder):
    """Make the files of a scene in a folder that exists."""
    for name, make in scene.files.items():
        make(folder / name)
