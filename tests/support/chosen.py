"""Which combinations of a test's parameters are run.

A test that is parametrized several times over stands for the product of all values. A bug that needs three certain
values at once is rare, so of that product run

    quick     as many as let each value occur
    normal    as many as let any two values of any two parameters meet
    full      all

and of the parameters named in the marker `whole` all combinations, but for quick.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence

import pytest
from effort import EFFORT

# Of a combination: what stands for each parameter's value, in a fixed order.
Row = tuple[int, ...]
Meetings = frozenset[tuple[object, ...]]


def choose(items: Sequence[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Split collected tests into those that are run and those that are not, in the order in which they came."""
    if EFFORT == "full":
        return list(items), []
    products: dict[tuple[str, str], list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            products[str(item.path), item.originalname].append(item)
    left_out = {item for product in products.values() for item in _left_out(product)}
    return [item for item in items if item not in left_out], [item for item in items if item in left_out]


def _left_out(product: Sequence[pytest.Function]) -> set[pytest.Item]:
    names = list(product[0].callspec.params)
    marker = product[0].get_closest_marker("whole")
    whole = [names.index(name) for name in marker.args] if marker else []
    # A value is the same object in each combination, and need not be hashable.
    rows = [tuple(id(item.callspec.params[name]) for name in names) for item in product]
    chosen = covering(rows, _values if EFFORT == "quick" else lambda row: _pairs(row, whole))
    return {item for number, item in enumerate(product) if number not in chosen}


def covering(rows: Sequence[Row], meetings: Callable[[Row], Meetings]) -> set[int]:
    """Choose rows, by their numbers, so that what meets in any row meets in a chosen one: few, and always the same."""
    left = {number: meetings(row) for number, row in enumerate(rows)}
    wanted: set[tuple[object, ...]] = set().union(*left.values())
    chosen = set()
    while wanted:
        best = max(left, key=lambda number: len(wanted & left[number]))
        wanted -= left.pop(best)
        chosen.add(best)
    return chosen


def _values(row: Row) -> Meetings:
    return frozenset(enumerate(row))


def _pairs(row: Row, whole: Sequence[int]) -> Meetings:
    values = list(enumerate(row))
    return frozenset(itertools.combinations(values, min(2, len(row)))) | {
        tuple(values[each] for each in whole)
    }
