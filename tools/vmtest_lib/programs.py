"""Guest programs of the tests, assembled here for the emulated machine, which has no binutils."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import ENVIRONMENT, VmtestError

VARIABLE = "KVMDP_PROGRAMS"  # where the tests look for them
_CHECKOUT = Path(__file__).resolve().parents[2]
_NEEDED = ("as", "ld")


@contextlib.contextmanager
def assembled(*, needed: bool) -> Iterator[Path | None]:
    """Assemble them into a folder that exists as long as the context; None where there is no binutils.

    Raises VmtestError (status 4) there if they are `needed`.
    """
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing and needed:
        raise VmtestError(
            f"{', '.join(missing)} not on PATH; install it with: apt-get install binutils", ENVIRONMENT
        )
    if missing:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": f"{_CHECKOUT}:{_CHECKOUT / 'tests/support'}"}
        environment.pop(VARIABLE, None)
        subprocess.run([sys.executable, "-m", "forms", "--assemble", folder], env=environment, check=True)
        yield Path(folder)
