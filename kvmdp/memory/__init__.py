"""Guest memory: where it lies, what it is made of, which of its pages are present."""
