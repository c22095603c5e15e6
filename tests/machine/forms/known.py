"""What is known to differ under a trap from what memory that is present gives, and why."""

# (trap, ring, name of a form) -> the reason, in a sentence. It is run all the same, and may differ; nothing else may.
KNOWN: dict[tuple[str, int, str], str] = {}
