"""Ways to make a non-present page trap, one module each; `registry` lists them, `fits` says what goes with what.

A trap knows page tables, memslots and views. It does not know where pages come from, nor what decides.
"""
