"""Random combinations of options: each is proven, refused in a sentence, or fails in one; none hangs or leaves things.

`KVMDP_EFFORT` is quick, normal or full: 30, 100 or 1,000 combinations. `KVMDP_FIRST` is the number of the first, for
others than the usual ones.
"""

import os

import pytest
from effort import by_effort
from random_options.forks import End, Fork
from random_options.judge import USAGE, Ended, findings
from random_options.options import known_options
from random_options.play import Played, play
from random_options.scene import FAMILIES, TABLES, Command, Scene

from kvmdp.cli import main

FIRST = int(os.environ.get("KVMDP_FIRST", "0"))
# How many of 100 combinations.
SHARES = {"run": 68, "peers": 14, "measured": 10, "hugepages": 8}
BLOCK = by_effort(30, 100, 100)
BLOCKS = range(by_effort(1, 1, 10))


@pytest.mark.kvm
@pytest.mark.hugepage_pool
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", BLOCKS)
def test_combinations_end_as_they_should(family, block):
    count = SHARES[family] * BLOCK // 100
    first = FIRST + block * count
    refused, wrong = 0, []
    for played in play(f"{family}:{number}" for number in range(first, first + count)):
        refused += any(each.end.status == USAGE for each in played.ended)
        if played.findings:
            wrong.append(str(played))
    assert not wrong, "\n\n".join(wrong)
    assert family != "run" or refused < count / 2, "most are refused, which tests little"


def test_the_options_of_every_command_are_drawn():
    assert TABLES.keys() == set(main._COMMANDS)
    for command, table in TABLES.items():
        assert known_options(command).keys() == table.keys(), command


# What plays and what judges

COMMAND = Command(["run"], {})


def judged(tmp_path, command=COMMAND, status=0, out="", err="", **end):
    """Return what is found of a command that has ended so."""
    for name in ("work", "tmp"):
        (tmp_path / name).mkdir(exist_ok=True)
    ended = Ended(command, End(status, **{"hung": False, "left": False} | end), out, err, "")
    return findings([ended], tmp_path, {})


@pytest.mark.parametrize(
    ("command", "end"),
    [
        (COMMAND, {}),
        (COMMAND, {"status": 2, "err": "kvmdp: no\n"}),
        (COMMAND, {"status": 4, "err": "said before\nkvmdp: no\n"}),
        (Command(["run"], {}, may_fail=True), {"status": 1, "err": "kvmdp: no\n"}),
        (Command(["run"], {}, refused=True), {"status": 4, "err": "kvmdp: no\n"}),
        (Command(["handler"], {}, served=True), {"status": 130, "err": "kvmdp: interrupted\n"}),
        (Command(["run"], {"--json": "-"}), {"out": '{"ok": true, "vcpus": 1, "trap": "marker"}'}),
    ],
)
def test_what_is_well_is_not_found_fault_with(tmp_path, command, end):
    assert judged(tmp_path, command, **end) == []


@pytest.mark.parametrize(
    ("command", "end", "sentence"),
    [
        (COMMAND, {"status": -9, "hung": True}, "it did not end"),
        (COMMAND, {"status": -11}, "signal 11 ended it"),
        (COMMAND, {"left": True}, "it left processes behind"),
        (COMMAND, {"status": 1, "err": "kvmdp: no\n"}, "it failed"),
        (COMMAND, {"status": 3, "err": "kvmdp: no\n"}, "it ended with 3"),
        (COMMAND, {"status": 130, "err": "kvmdp: interrupted\n"}, "it says that it was interrupted"),
        (COMMAND, {"status": 2}, "its last word is not why it failed"),
        (COMMAND, {"status": 2, "err": "kvmdp: no\nkvmdp: no\n"}, "it gave several reasons"),
        (COMMAND, {"status": 2, "err": "kvmdp: no\n", "out": "pages"}, "it worked before it refused"),
        (COMMAND, {"err": "Traceback (most recent call last)"}, "it said 'Traceback'"),
        (Command(["run"], {}, refused=True), {}, "what makes no sense was not refused: status 0"),
        (Command(["run"], {"--json": "-"}), {"out": "pages"}, "what it wrote is no JSON"),
        (Command(["run"], {"--json": "result.json"}), {}, "what it wrote is no JSON"),
        (
            Command(["run"], {"--json": "-"}),
            {"out": '{"ok": false, "vcpus": 1, "trap": "marker"}'},
            "it ended with 0, and ok is False",
        ),
        (
            Command(["run"], {"--json": "-", "--vcpus": "2"}),
            {"out": '{"ok": true, "vcpus": 1, "trap": "marker"}'},
            "it had 1 vCPUs",
        ),
        (
            Command(["bench"], {"--json": "-"}),
            {"out": '{"complete": true, "failed": {"marker": "no"}}'},
            "it ended with 0, but its result is not complete",
        ),
    ],
)
def test_what_is_not_well_is_found(tmp_path, command, end, sentence):
    assert f"{command.name}: {sentence}" in judged(tmp_path, command, **end)


def test_what_is_left_or_changed_is_found(tmp_path):
    assert judged(tmp_path) == []
    (tmp_path / "tmp" / "kvmdp-sink").touch()
    (tmp_path / "work" / "device.sock").touch()
    assert judged(tmp_path) == [
        "temporary files are left: kvmdp-sink",
        "files are left: device.sock",
    ]


def test_a_command_that_goes_on_for_ever_is_ended_and_its_stacks_are_shown(tmp_path):
    (tmp_path / "work").mkdir()
    end = Fork(["handler", "--listen", "sock", "--synthetic", "2M"], tmp_path, "0", 1).finish()
    assert (end.status, end.hung) == (-9, True)
    assert "kvmdp/peers/handler/server.py" in (tmp_path / "0.stacks").read_text()


def test_a_failure_shows_the_command_lines(tmp_path):
    ended = Ended(
        Command(["run", "--image", "a b"], {}), End(1, hung=False, left=False), "", "kvmdp: no\n", ""
    )
    text = str(Played(Scene("run:17", [ended.command], {}), [ended], ["run: it failed"]))
    assert "run: it failed" in text
    assert "kvmdp run --image 'a b'" in text
    assert "python -m random_options run:17" in text
