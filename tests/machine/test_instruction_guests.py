"""Guests whose instructions were once emulated wrongly, or not at all: the right value under every trap."""

import pytest
from forms.named import NAMED
from forms.reference import cpu_flags
from harness import every_trap, require_trap

pytestmark = [pytest.mark.kvm, pytest.mark.assembled]


@every_trap
@pytest.mark.parametrize("guest", NAMED, ids=lambda guest: guest.name)
def test_guest_gives_the_right_value(guest, trap):
    if guest.needs not in cpu_flags():
        pytest.skip(f"this CPU has no {guest.needs}")
    require_trap(trap)
    assert [hex(checksum) for checksum in guest.run(trap)] == [hex(checksum) for checksum in guest.right()]
