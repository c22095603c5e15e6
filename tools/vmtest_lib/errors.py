"""The one exception of tools/vmtest, and its exit statuses (the same as kvmdp's own)."""

FAILED = 1
USAGE = 2
ENVIRONMENT = 4
INTERRUPTED = 130


class VmtestError(Exception):
    """Something a user can act on: `str(error)` is one clear sentence, `status` the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
