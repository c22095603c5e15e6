"""What the help says: commands, options with their defaults and units, all within a small terminal."""

import argparse
import re

import pytest
from command import kvmdp

from kvmdp import __version__
from kvmdp.cli.main import build_parser
from kvmdp.machine.workloads import WORKLOADS
from kvmdp.trap.registry import TRAPS

UNITS = r"\b(bytes|pages|vCPUs|seconds|ring|number|accesses|passes|rounds|threads|microseconds)\b"


def subparsers():
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


OPTIONS = [
    (f"{command} {action.option_strings[-1]}", action)
    for command, parser in subparsers().items()
    for action in parser._actions
    if action.option_strings and not isinstance(action, argparse._HelpAction)
]


@pytest.fixture(autouse=True)
def small_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_the_help_fits_a_screen_and_shows_how_to_start():
    lines = build_parser().format_help().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    starts = [line.split("  ")[1] for line in lines[lines.index("start with:") + 1 :]]
    assert starts == ["kvmdp probe", "kvmdp run", "kvmdp run --image FILE"]


@pytest.mark.parametrize("command", subparsers())
def test_a_commands_help_fits_the_width(command):
    assert max(map(len, subparsers()[command].format_help().splitlines())) <= 80


def test_the_help_of_bench_names_every_trap():
    words = " ".join(subparsers()["bench"].format_help().split())
    assert f"the traps ({', '.join(TRAPS)})" in words
    assert "off-TRAP" in words


def test_every_option_says_its_default():
    for name, option in OPTIONS:
        assert "(default: " in option.help, name
        if option.default not in (None, False):
            assert f"(default: {option.default}" in option.help, name


def test_every_option_that_takes_a_number_says_of_what():
    for name, option in OPTIONS:
        if option.type in (int, float):
            assert re.search(UNITS, option.help.replace("S seconds", "seconds")), name


@pytest.mark.parametrize("command", subparsers())
def test_a_command_that_takes_sizes_says_how_to_write_them(command):
    text = subparsers()[command].format_help()
    if "SIZE" in text:
        assert "SIZE is in bytes, or has K, M, G or T behind it (powers of 1024)" in " ".join(text.split())


def test_the_help_of_run_names_every_workload():
    help_text = " ".join(subparsers()["run"].format_help().split())
    assert f"what the guest does: {', '.join(WORKLOADS)} (default: checksum)" in help_text


def test_version():
    done = kvmdp("--version")
    assert (done.status, done.out, done.err) == (0, f"kvmdp {__version__}\n", "")
