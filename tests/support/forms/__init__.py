"""A table of x86-64 instruction forms, and what runs it: with all memory present, and under a trap with pages absent.

`form` says what a form is, the modules of `families` list them, `table` puts them together. `driver.S` is the guest
that runs them, `program` assembles it, `exchange` talks to it. `reference` finds what is right: the same ring on the
same host with all memory present. `trapped` runs forms on a `Machine`, `judge` compares, `known` lists what is known to
differ, `survey` does all that for a trap. `named` has guests that run on their own. `python -m forms --help`
(tools/forms) prints what differs.
"""
