"""RAM as the machine's caller reads and writes it."""

from __future__ import annotations

from kvmdp.errors import CancelledError
from kvmdp.page import Outcome
from kvmdp.paging.access import GuestMemory


class MachineMemory(GuestMemory):
    """`GuestMemory` that says what the end of a run means to an access: present pages are there, no page comes."""

    def _check(self, outcome: Outcome, page: int) -> None:
        if outcome is Outcome.CANCELLED and self._pager.error is None:
            raise CancelledError(
                f"the page at gpa {self._layout.gpa_of_page(page):#x} is absent and the run is over: call "
                "Machine.pager.reopen to have pages come again, or Machine.restart to run the guest again"
            )
        super()._check(outcome, page)
