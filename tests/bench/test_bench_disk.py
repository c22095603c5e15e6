import pytest

from kvmdp.bench.disk import measure_disk
from kvmdp.machine.options import MachineOptions


@pytest.mark.kvm
def test_each_place_and_state_has_a_figure_a_round():
    results = measure_disk(MachineOptions(2 << 20, "mmio"), rounds=1)
    assert set(results) == {"in_process", "out_of_process"}
    for states in results.values():
        assert {state: len(figures) for state, figures in states.items()} == {"present": 1, "absent": 1}
        assert all(figure > 0 for figures in states.values() for figure in figures)
