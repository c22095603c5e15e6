"""What importing kvmdp costs: it may not take along what is slow to import and seldom needed."""

import subprocess
import sys

NEW_MODULES = """
import sys, numpy
known = set(sys.modules)
import kvmdp.cli.main
print(*sorted(set(sys.modules) - known))
"""
SLOW = {"asyncio", "bz2", "email", "html", "http", "json", "logging", "lzma", "multiprocessing", "random"}
SLOW |= {"shutil", "socket", "ssl", "subprocess", "tempfile", "unittest", "xml"}


def test_no_command_waits_for_modules_that_few_need():
    command = [sys.executable, "-c", NEW_MODULES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "kvmdp.cli.main" in done.stdout.split()
    assert SLOW.intersection(done.stdout.split()) == set()
