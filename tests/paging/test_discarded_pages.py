"""Pages that are discarded while their claim is being committed, and a trap that cannot be told of it."""

import errno

import pytest
from fakes import pager_of

from kvmdp.page import Outcome, PageFault
from kvmdp.shortage import ShortageError


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "no more"), ShortageError("no huge page is left")], ids=["error", "shortage"]
)
def test_a_trap_that_cannot_map_a_discarded_page_pauses_the_machine_and_ends_the_claim(error):
    def refuse(_first, _count):
        raise error

    with pager_of() as pager:
        pager.trap.on_admit = pager.note_discarded
        pager.trap.reassert = refuse
        if isinstance(error, ShortageError):
            assert pager.resolve(PageFault(3)) is Outcome.FAILED
        else:
            with pytest.raises(OSError, match="no more"):
                pager.resolve(PageFault(3))
        assert str(error.args[-1]) in str(pager.error)
        assert not pager.ledger.claims
        assert pager.resolve(PageFault(3), timeout=5) is Outcome.FAILED
