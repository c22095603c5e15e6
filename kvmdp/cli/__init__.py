"""The command line: one module a subcommand; it prints and never computes."""
