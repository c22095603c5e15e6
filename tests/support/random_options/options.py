"""What an option may be given: values that make sense, given what else has been drawn, and values that make none."""

import argparse
import dataclasses
import functools
from collections.abc import Callable

from kvmdp.cli.main import build_parser

FLAG = None  # the value of an option that takes none
_STRAY = 0.1  # how often an option is given that has no use with the rest

NO_NUMBER = ("", "x", "1.5", "-", "0x10")
NO_SIZE = ("", "x", "-1", "1.5M", "64MB")
NO_SECONDS = ("", "x", "0", "-1", "nan")


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a command.

    `sense` draws a value, `nonsense` are values that are to be refused: texts, or what makes one of a Draw. It is given
    in a `share` of the commands in which it has a use, `when` says whether that is so.
    """

    sense: Callable[["Draw"], str | None]
    nonsense: tuple[str | Callable[["Draw"], str], ...] = ()
    share: float = 0.2
    when: Callable[["Draw"], bool] = lambda _draw: True


class Draw:
    """A command being drawn: what it is `given` so far, and the `files` it needs, name -> what makes one at a path.

    `refused`: it is given something that makes no sense, so it has to end with status 2. `may_fail`: it may end with
    status 1, though never of a mismatch.
    """

    def __init__(self, rng, files):
        self.rng = rng
        self.given = {}
        self.files = files
        self.refused = self.may_fail = False
        self.pages = None  # that the guest uses, once that is known

    def often(self, share):
        return self.rng.random() < share

    def of(self, *values):
        return self.rng.choice(values)

    def file(self, name, make):
        """Have a file made; returns its name."""
        self.files[name] = make
        return name

    def add(self, table):
        """Draw options in the order of their table, of which each may look at those before it."""
        for name, option in table.items():
            if option.when(self) and self.often(option.share):
                self.given[name] = option.sense(self)

    def spoil(self, table, share):
        """Have one option make no sense, in a `share` of the commands; or give one that has no use, in some others."""
        if self.often(share):
            names = [name for name, option in table.items() if option.nonsense and option.when(self)]
            name = self.rng.choice(names)
            value = self.rng.choice(table[name].nonsense)
            self.given[name] = value if isinstance(value, str) else value(self)
            self.refused = True
        elif self.often(_STRAY):
            names = [name for name, option in table.items() if not option.when(self)]
            if names:
                name = self.rng.choice(names)
                self.given[name] = table[name].sense(self)

    def arguments(self, command):
        """Return the command line, its options in any order and any spelling."""
        names = [*self.given]
        self.rng.shuffle(names)
        arguments = [command]
        for name in names:
            arguments += self._spelled(self.of(*known_options(command)[name]), self.given[name])
        return arguments

    def _spelled(self, name, value):
        if value is FLAG:
            return [name]
        if not name.startswith("-"):  # operands
            return value.split(" ")
        joined = value[:1] == "-" or self.often(0.5)
        if name.startswith("--"):
            return [f"{name}={value}"] if joined else [name, value]
        return [f"{name}{value}"] if joined and value else [name, value]


def has(name):
    """Return what says whether an option is given."""
    return lambda draw: name in draw.given


def is_one_of(name, *values):
    """Return what says whether an option is given as one of `values`; None is not given."""
    return lambda draw: draw.given.get(name) in values


def flag(share=0.2, when=lambda _draw: True):
    """Return an option that takes no value."""
    return Option(lambda _draw: FLAG, (), share, when)


def known_options(command):
    """Return all options and operands that the parser of a command has: longest spelling -> all spellings."""
    return {max(names, key=len): names for names in _actions(command)}


def choices_of(command, option):
    """Return what the parser of a command says an option is one of."""
    (choices,) = (choices for names, choices in _actions(command).items() if option in names)
    return tuple(choices)


@functools.cache
def _actions(command):
    """Return the spellings of each option, or the name of an operand, and what it is one of."""
    (commands,) = (
        each for each in build_parser(command)._actions if isinstance(each, argparse._SubParsersAction)
    )
    return {
        tuple(action.option_strings) or (action.dest,): action.choices
        for action in commands.choices[command]._actions
        if not isinstance(action, argparse._HelpAction)
    }
