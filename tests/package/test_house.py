"""The house: every import of the product runs down, and no file is longer than a reader takes in at once."""

import ast
from itertools import chain
from pathlib import Path

import kvmdp

ROOT = Path(kvmdp.__file__).parent
MOST_LINES = 400
# The floors, ground floor first. A room or a file at the top imports from floors below, and a room from itself.
FLOORS = """
closing page errors size
abi
cgroup interruption own_clock
last_acts shortage
child temporary thread waiting
secluded
kvm
memory
source
paging
trap
vcpu
peers
jobs
machine
lab
bench
cli
"""
FLOOR = {name: number for number, names in enumerate(FLOORS.strip().splitlines()) for name in names.split()}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("kvmdp", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(node):
    """The modules of the product that a statement imports, wherever in a module it stands."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in MODULES]
    if isinstance(node, ast.ImportFrom) and node.module in MODULES:
        assert not node.level, "a relative import"
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else node.module for name in inside]
    return []


def room_of(module):
    """The room, or the file at the top, that a module is in."""
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_its_floor():
    assert {room_of(module) for module in MODULES} - {""} == FLOOR.keys()


def test_every_import_runs_down():
    upward = set()
    for module, path in MODULES.items():
        room = room_of(module)
        nodes = ast.walk(ast.parse(path.read_text()))
        for name in chain.from_iterable(map(imported, nodes)):
            other = room_of(name)
            if room and other and other != room and FLOOR[other] >= FLOOR[room]:
                upward.add(f"{module} imports {name}")
    assert not upward


def test_the_core_knows_neither_kvm_nor_traps_nor_processes():
    core = [path for module, path in MODULES.items() if room_of(module) == "paging"]
    rooms = {
        room_of(name)
        for path in core
        for name in chain.from_iterable(map(imported, ast.walk(ast.parse(path.read_text()))))
    }
    assert not rooms & {"kvm", "trap", "vcpu", "peers", "machine"}


def test_no_file_is_too_long():
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert not {module: count for module, count in lines.items() if count > MOST_LINES}
