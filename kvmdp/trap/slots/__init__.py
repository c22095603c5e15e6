"""Traps by memslot: an absent page has none, or one that KVM refuses to map."""
