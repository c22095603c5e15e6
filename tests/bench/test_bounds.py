import pytest

from kvmdp.bench.check import judge, read_bounds

SPREAD = {"median": 2.0, "min": 1.0, "max": 3.0}
DOCUMENT = {
    "contenders": [{"name": "marker", "in_flight": 4, "latency_us": {"p99": 7}}],
    "ratios": [{"a": "marker", "b": "mmio", "metric": "pages_per_second", **SPREAD}],
    "device": {"read_4k_ratio": SPREAD},
}


def judged(tmp_path, row, document=DOCUMENT):
    file = tmp_path / "bounds.toml"
    file.write_text("[[bound]]\n" + row)
    (bound,) = read_bounds(str(file))
    return judge(bound, document)


@pytest.mark.parametrize(
    ("row", "good", "sentence"),
    [
        (
            'metric = "pages_per_second"\na = "marker"\nb = "mmio"\nmin = 2',
            True,
            "pages_per_second of marker / mmio: at least 2; measured 2",
        ),
        (
            'metric = "latency_us.p99"\ncontender = "marker"\nmax = 6',
            False,
            "latency_us.p99 of marker: at most 6; measured 7",
        ),
        (
            'metric = "device.read_4k_ratio"\nmax = 2.5',
            True,
            "device.read_4k_ratio: at most 2.5; measured 2",
        ),
        (
            'metric = "device.read_2k_ratio"\nmax = 2.5',
            False,
            "device.read_2k_ratio: at most 2.5; not measured",
        ),
        (
            'metric = "in_flight"\ncontender = "mmio"\nmax = 9',
            False,
            "in_flight of mmio: at most 9; not measured",
        ),
    ],
)
def test_a_bound_is_of_the_document_of_a_contender_or_of_a_ratio(tmp_path, row, good, sentence):
    assert judged(tmp_path, row) == (good, sentence)


def test_what_was_not_asked_for_is_not_measured(tmp_path):
    row = 'metric = "device.read_4k_ratio"\nmax = 2.5'
    assert judged(tmp_path, row, DOCUMENT | {"device": None}) == (
        False,
        "device.read_4k_ratio: at most 2.5; not measured",
    )


@pytest.mark.parametrize("row", ['metric = "x"\na = "marker"\nmax = 1', 'b = "x"\nmax = 1', "max = 1"])
def test_half_a_bound_is_refused(tmp_path, row):
    with pytest.raises(ValueError, match=r"bound 1: give metric, and contender, a and b, or neither$"):
        judged(tmp_path, row)
