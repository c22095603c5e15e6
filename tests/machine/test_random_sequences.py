"""Random sequences of everything that makes pages come and go agree with a simple model after each step.

`KVMDP_EFFORT=full` runs 1,000 of them.
"""

import itertools

import pytest
from effort import by_effort
from harness import BACKINGS, TRAPS
from sequences import PAGES, REGION, RandomSequence

REGIONS = PAGES // REGION

pytestmark = pytest.mark.kvm

MACHINES = [(trap, backing) for trap in TRAPS for backing in BACKINGS]
MACHINES += [("layered", "memfd")]
MACHINES += [pytest.param("userfaultfd", backing, marks=pytest.mark.userfaultfd) for backing in BACKINGS]
SEQUENCES = by_effort(9, 90, 1000)
EACH = -(-SEQUENCES // len(MACHINES))


@pytest.mark.parametrize(("trap", "backing"), MACHINES)
def test_after_each_step_the_machine_agrees_with_the_model(trap, backing, tmp_path):
    for seed in range(EACH):
        assert steps_agreed(seed, trap, backing, tmp_path) > 0


def steps_agreed(seed, trap, backing, folder):
    """Run a sequence, which looks at everything after each step and ends at the first that differs."""
    sequence = RandomSequence(seed, trap, backing, folder)
    try:
        sequence.run()
    except BaseException as error:
        steps = "\n".join(sequence.steps)
        error.add_note(
            f"RandomSequence({seed}, {trap!r}, {backing!r}, folder).run() did these steps:\n{steps}"
        )
        raise
    return len(sequence.steps)


def test_a_seed_says_all(tmp_path):
    sequences = [RandomSequence(5, "mmio", "memfd", tmp_path) for _ in range(2)]
    for each in sequences:
        each.run()
    assert sequences[0].steps == sequences[1].steps != []


@pytest.mark.parametrize("trap", ["memory-fault", "mmio"])
def test_among_them_are_machines_whose_memslots_are_cut_and_merged_by_regions(trap, tmp_path):
    counts = []
    for seed in range(8):
        sequence = RandomSequence(seed, trap, "memfd", tmp_path)
        sequence.run()
        if sequence.in_regions:
            counts.append(sequence.memslots)
    assert 0 < len(counts) < 8
    assert max(map(max, counts)) > 2 * REGIONS
    assert any(after < REGIONS < before for each in counts for before, after in itertools.pairwise(each))
