"""The offer of a handler: what it says arrives, and what cannot be is refused."""

import socket

import pytest

from kvmdp.peers.wire import offer
from kvmdp.peers.wire.offer import Offer, OfferError


@pytest.fixture
def ends():
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        yield here, there


@pytest.mark.parametrize("made", [Offer(64 << 20, None), Offer(4096, 2 << 20), Offer(1 << 40, 0xD0000000)])
def test_an_offer_arrives_as_it_was_made(ends, made):
    here, there = ends
    offer.send(here, made)
    assert offer.receive(there) == made


def test_a_hole_within_a_page_is_refused(ends):
    here, there = ends
    offer.send(here, Offer(4096, 0x1234))
    with pytest.raises(
        OfferError, match="an offer of memory with a hole at 0x1234, which is not where a page begins"
    ):
        offer.receive(there)
