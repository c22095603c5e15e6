"""Where the bytes of guest memory come from: a protocol, one module a kind of source, and wrappers."""
