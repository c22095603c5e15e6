"""Traps by userfaultfd: an absent page is missing from the guest view, or has a marker there."""
