"""A process that this one starts for a moment, and does not leave behind."""

from __future__ import annotations

import subprocess
from typing import Any

from kvmdp.shortage import starting_process


class ChildProcess(subprocess.Popen[bytes]):
    """A process that is over when its block is: killed, if it has not ended by itself.

    subprocess.run kills one too, but does not wait for its end after an interruption. Raises NoThreadError, and what
    subprocess.Popen does, whose arguments it takes.
    """

    def __init__(self, command: list[str], **options: Any) -> None:
        with starting_process():
            super().__init__(command, **options)

    def __exit__(self, *_: object) -> None:
        self.kill()
        super().__exit__(None, None, None)
