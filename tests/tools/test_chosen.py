"""How the suite is shared out, and which combinations of parameters it runs."""

import itertools
import os
from pathlib import Path

import chosen
import pytest
import streams

TESTS = Path(__file__).resolve().parents[1]
PRODUCT = list(itertools.product(range(5), range(3), range(2), range(4)))


def pairs(row):
    return chosen._pairs(row, whole=())


def test_any_two_values_meet_in_a_fraction_of_the_product():
    rows = [PRODUCT[number] for number in chosen.covering(PRODUCT, pairs)]
    assert set().union(*map(pairs, rows)) == set().union(*map(pairs, PRODUCT))
    assert 20 <= len(rows) <= 25  # of 120; there are 20 pairs of the two largest


def test_the_same_are_chosen_each_time():
    assert chosen.covering(PRODUCT, pairs) == chosen.covering(PRODUCT, pairs)


def test_all_combinations_of_what_is_whole_are_run():
    rows = [
        PRODUCT[number]
        for number in chosen.covering(PRODUCT, lambda row: chosen._pairs(row, whole=(0, 1, 3)))
    ]
    assert {(a, b, d) for a, b, _, d in rows} == {(a, b, d) for a, b, _, d in PRODUCT}
    assert len(rows) == 60


def test_of_one_or_two_parameters_all_is_run():
    for product in ([(each,) for each in range(7)], list(itertools.product(range(4), range(3)))):
        assert len(chosen.covering(product, pairs)) == len(product)


@pytest.mark.parametrize("cpus", [1, 2])
def test_each_test_file_is_in_one_stream(monkeypatch, cpus):
    monkeypatch.setattr(streams, "EFFORT", "normal")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    given = streams.shares()
    assert len(given) == cpus
    files = [
        file
        for path in itertools.chain(*given)
        for file in (Path(path).rglob("test_*.py") if Path(path).is_dir() else [Path(path)])
    ]
    assert sorted(files) == sorted(TESTS.rglob("test_*.py"))


def test_what_is_run_in_a_minute_is_there():
    assert all((TESTS / name).exists() for names in streams.QUICK for name in names)
