"""Plays scenes, and has them judged."""

import contextlib
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from random_options.forks import Fork
from random_options.judge import Ended, findings, huge_pages, what
from random_options.scene import Scene, draw_scene, make_files

DEADLINE = (
    120  # seconds: for a command that has a tenth of a second's work, on a machine that has much else to do
)
_LOOK_SECONDS = 0.005

_huge_pages = threading.Lock()


@dataclass
class Played:
    """A scene that has been played: how its commands ended, and the `findings`."""

    scene: Scene
    ended: list[Ended] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def __str__(self):
        found = "".join(f"  {each}\n" for each in self.findings)
        again = f"PYTHONPATH=tests/support python -m random_options {self.scene.name}"
        return f"{self.scene.name} (again: {again})\n{found}{chr(10).join(map(str, self.ended))}"


def play(names):
    """Play scenes, as many at a time as there are CPUs; yields each when it has been played."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(_play_one, names)


def _play_one(name):
    scene = draw_scene(name)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not name.startswith("hugepages"):
            return _play_in(folder, scene)
        stack.enter_context(_huge_pages)
        before = huge_pages()
        played = _play_in(folder, scene)
        after = huge_pages()
        if after != before:
            played.findings.append(f"huge pages were {before} and are {after}")
        return played


def _play_in(folder, scene):
    """Play a scene in an empty folder."""
    work = folder / "work"
    work.mkdir()
    (folder / "tmp").mkdir()
    make_files(scene, work)
    inputs = {each.name: what(each) for each in work.iterdir()}
    played = Played(scene)
    beside = []
    for number, command in enumerate(scene.commands):
        fork = Fork(command.arguments, folder, str(number), DEADLINE)
        beside.append((fork, number, command))
        if command.until is None:
            _finish(beside, played, folder)
        else:
            _wait_for(work / command.until, fork)
    while beside:
        _finish(beside, played, folder)
    played.findings = findings(played.ended, folder, inputs)
    return played


def _wait_for(path, fork):
    while not path.exists() and not fork.has_ended():
        time.sleep(_LOOK_SECONDS)


def _finish(beside, played, folder):
    fork, number, command = beside.pop()
    if command.served:
        fork.interrupt()
    end = fork.finish()
    said = [(folder / f"{number}.{kind}").read_text(errors="replace") for kind in ("out", "err", "stacks")]
    played.ended.append(Ended(command, end, *said))
