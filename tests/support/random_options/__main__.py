"""Plays scenes by hand, FAMILY:NUMBER or FAMILY:NUMBER-NUMBER; or makes the files of one and prints its commands."""

import argparse
import sys
from pathlib import Path

import forked

from random_options.play import play
from random_options.scene import draw_scene, make_files


def _names(text):
    family, _, numbers = text.partition(":")
    first, _, last = numbers.partition("-")
    return [f"{family}:{number}" for number in range(int(first), int(last or first) + 1)]


def _main():
    parser = argparse.ArgumentParser(prog="random_options", description=__doc__)
    parser.add_argument("scenes", nargs="+", metavar="SCENE", help="such as run:17 or peers:0-99")
    parser.add_argument("--files", metavar="DIR", type=Path, help="make the files there, and play nothing")
    options = parser.parse_args()
    names = [name for text in options.scenes for name in _names(text)]
    if options.files is not None:
        for scene in map(draw_scene, names):
            make_files(scene, options.files)
            print(scene)
        return 0
    found = False
    with forked.server():
        for played in play(names):
            found = found or bool(played.findings)
            if len(names) == 1 or played.findings:
                print(played, flush=True)
    return int(found)


sys.exit(_main())
