"""Starts the command line: python -m vmtest_lib, with tools/ on PYTHONPATH."""

import sys

from .cli import main

sys.exit(main(sys.argv[1:]))
