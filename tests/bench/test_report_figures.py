"""The figures: well-formed, self-contained, and their numbers those of the document."""

import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from report_documents import CONTENDERS, bench, comparison, memory_rows, trace

from kvmdp.bench.claims import claims
from kvmdp.bench.report.chart import WIDTH
from kvmdp.bench.report.folder import files
from kvmdp.bench.report.results import from_bench
from kvmdp.bench.report.scale import duration, linear_ticks, log_ticks, memory
from kvmdp.bench.report.svg import _COLOURS, SERIES, line_style
from kvmdp.bench.report.tracefigures import thin

SVG = "{http://www.w3.org/2000/svg}"
FIGURES = ("pages-per-second", "latency", "cpu", "pages-present", "fault-map", "memory")
AWKWARD = 'a<b>&"c"\x00\ud800</style><script>alert(1)</script>'


def written(document):
    return files(document | {"claims": claims(document)})


def svgs(contents):
    return {name: ElementTree.fromstring(text) for name, text in contents.items() if name.endswith(".svg")}


def rows(contents, name):
    return list(csv.DictReader(io.StringIO(contents[f"{name}.csv"])))


@pytest.fixture(scope="module")
def document():
    return comparison()


@pytest.fixture(scope="module")
def contents(document):
    return written(document)


def cut_short():
    """A comparison ended early: contenders skipped, without rounds, and benches that never began."""
    document = comparison(vcpus=(1, 2), latencies=(0.0, 30e-6), names=("present", "marker", "userfaultfd"))
    document["complete"] = False
    document["benches"].pop()
    last = document["benches"][-1]
    last["complete"] = False
    last["contenders"] = last["contenders"][:2]
    last["contenders"][1]["rounds"] = last["contenders"][1]["rounds"][:1]
    last["skipped"] = {"mmio": "no reason"}
    document["traces"] = {"marker": {"vcpus": 1, "memory_bytes": 4096, "records": []}}
    document["memory"] = memory_rows(names=("marker",))
    return document


INCOMPLETE = {
    "cut short": cut_short,
    "nothing": lambda: comparison((), (), ()) | {"memory": []},
    "one bench": lambda: from_bench(bench(2, 30e-6)),
    "only present": lambda: comparison((1,), (0.0,), ("present",)) | {"traces": {}, "memory": []},
    "no userfaultfd": lambda: comparison((1, 2), (0.0,), ("marker", "mmio")),
    "only traces": lambda: comparison((), (), ()) | {"traces": {"marker": trace("marker")}, "memory": []},
    "one fault": lambda: comparison((), (), ()) | {"traces": {"marker": trace("m", 1, 1)}, "memory": []},
    "odd names": lambda: comparison((1,), (0.0,), ("present", AWKWARD, "userfaultfd")),
    "no faults": lambda: without_faults(comparison((1,), (0.0,), ("marker", "userfaultfd"))),
}


def without_faults(document):
    for each in document["benches"][0]["contenders"]:
        each["latency_us"] = {"p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0, "buckets": [0] * 24}
    return document


def test_each_figure_has_panels_and_numbers(contents):
    for name in FIGURES:
        assert f"{name}-1.svg" in contents
        assert len(rows(contents, name)) > 0
        assert f'<h2 id="{name}">' in contents["index.html"]
    assert set(contents) >= {"index.html", "compare.json"}


def test_svgs_are_named_and_described(contents):
    for name, root in svgs(contents).items():
        assert root.tag == f"{SVG}svg"
        title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
        assert title.text
        assert description.text
        assert root.get("aria-labelledby").split() == [title.get("id"), description.get("id")]
        assert root.get("viewBox").startswith(f"0 0 {WIDTH:g} "), name
        assert "width" not in root.attrib


def test_nothing_is_fetched_and_nothing_is_run(contents):
    for name, text in contents.items():
        if name.endswith((".svg", ".html")):
            assert "<script" not in text
            assert not re.search(r"\son[a-z]+=", text)
            assert not re.search(
                r"https?:|@import|@font-face|url\((?!#)", text.replace("http://www.w3.org/2000/svg", "")
            )


def test_every_reference_in_an_svg_has_its_target_and_its_class_a_style(contents):
    for root in svgs(contents).values():
        known = [each.get("id") for each in root.iter() if each.get("id")]
        assert len(known) == len(set(known))
        used = [each.get("fill") for each in root.iter() if (each.get("fill") or "").startswith("url(#")]
        assert {each[5:-1] for each in used} <= set(known)
        style = root.find(f"{SVG}style").text
        classes = {name for each in root.iter() for name in (each.get("class") or "").split()}
        assert all(f".{name}" in style for name in classes)
        assert set(re.findall(r"var\(--(\w+)\)", style)) <= set(_COLOURS)


def test_identifiers_of_the_page_are_unique(contents):
    found = re.findall(r'\sid="([^"]+)"', contents["index.html"])
    assert len(found) == len(set(found))
    links = re.findall(r'href="#([^"]+)"', contents["index.html"])
    assert set(links) <= set(found)


def test_files_that_the_page_names_are_there(contents):
    named = re.findall(r'href="([^"#]+)"', contents["index.html"])
    assert set(named) == set(contents) - {"index.html"}


def test_marks_stay_in_the_drawing(contents):
    for name, root in svgs(contents).items():
        height = float(root.get("viewBox").split()[3])
        for text in root.iter(f"{SVG}text"):
            if text.get("transform") is None:
                assert 0 <= float(text.get("x")) <= WIDTH, name
                assert 0 <= float(text.get("y")) <= height, name
        for bar in root.iter(f"{SVG}rect"):
            if bar.get("x") is not None:
                assert float(bar.get("x")) + float(bar.get("width")) <= WIDTH, name


def test_labels_below_the_plot_do_not_touch(contents):
    for name, root in svgs(contents).items():
        lines = {}
        for text in root.iter(f"{SVG}text"):
            if text.get("text-anchor") == "middle" and text.get("transform") is None:
                lines.setdefault(text.get("y"), []).append((float(text.get("x")), 3.5 * len(text.text)))
        for line in lines.values():
            for (x, half), (other, other_half) in pairwise(sorted(line)):
                assert x + half < other - other_half, name


def test_the_numbers_of_the_benches_are_the_documents(document, contents):
    spreads = {
        "pages-per-second": [("pages_per_second", "pages/s")],
        "cpu": [("cpu_us_per_fault", "CPU us a fault"), ("switches_per_fault", "context switches a fault")],
    }
    for name, fields in spreads.items():
        found = {
            (float(r["network latency, us"]), int(r["vCPUs"]), r["contender"]): r
            for r in rows(contents, name)
        }
        assert len(found) == 9 * len(CONTENDERS)
        for each in document["benches"]:
            for entry in each["contenders"]:
                row = found[round(1e6 * each["options"]["latency"], 3), entry["vcpus"], entry["name"]]
                for key, column in fields:
                    for which in ("median", "min", "max"):
                        assert float(row[f"{column}, {which}"]) == entry[key][which]


def test_ratios_and_floors_are_the_documents(document, contents):
    first = document["benches"][0]
    row = next(row for row in rows(contents, "pages-per-second") if row["contender"] == "marker")
    ratio = next(each for each in first["ratios"] if each["a"] == "marker")
    assert float(row["ratio to userfaultfd, median"]) == ratio["median"]
    assert float(row["floor, us, median"]) == 100.0
    baseline = next(row for row in rows(contents, "pages-per-second") if row["contender"] == "userfaultfd")
    assert baseline["ratio to userfaultfd, median"] == ""
    assert baseline["floor, us, median"] == ""


def test_latency_buckets_are_the_documents(document, contents):
    entry = document["benches"][0]["contenders"][1]
    row = rows(contents, "latency")[0]
    assert row["contender"] == entry["name"] == "marker"
    assert [int(row[f"faults from {2**k} us"]) for k in range(24)] == entry["latency_us"]["buckets"]
    assert float(row["p99, us"]) == 133.5


def test_memory_is_the_documents(document, contents):
    found = [
        (
            row["contender"],
            float(row["RAM, GiB"]),
            int(row["page tables (VmPTE), KiB"]),
            int(row["bitmap, bytes"]),
        )
        for row in rows(contents, "memory")
    ]
    assert found == [
        (r["contender"], r["gib"], r["vmpte_kib"], r["bitmap_bytes"]) for r in document["memory"]
    ]


def test_the_csv_of_the_map_has_every_fault(document, contents):
    found = [[row["time, us"], row["gpa"], row["origin"]] for row in rows(contents, "fault-map")]
    records = [record for each in document["traces"].values() for record in each["records"]]
    assert found == [[str(record[0]), str(record[1]), record[3]] for record in records]


def test_pages_present_grow_to_all_that_were_traced(document, contents):
    records = document["traces"]["marker"]["records"]
    curve = [row for row in rows(contents, "pages-present") if row["contender"] == "marker"]
    counts = [int(row["pages present"]) for row in curve]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == sum(record[2] for record in records) // 4096
    assert float(curve[-1]["time, us"]) == records[-1][0]


def test_the_time_of_a_share_is_that_of_the_fault_that_reached_it():
    records = [[10.0 * turn, 4096 * turn, 4096, "vcpu 0", 1.0, 1] for turn in range(1, 1001)]
    traced = {"marker": {"vcpus": 1, "memory_bytes": 4 << 20, "records": records}}
    page = written(comparison((), (), ()) | {"traces": traced, "memory": []})["index.html"]
    cells = "".join(
        f"<td>{time}</td>" for time in ("1", "1,000", "1,000", "2,500", "5,000", "7,500", "9,000", "10,000")
    )
    assert f'<th scope="row">marker</th>{cells}' in page


def test_the_page_says_what_the_tables_say(document, contents):
    page = contents["index.html"]
    entry = document["benches"][0]["contenders"][1]
    assert f"<td>{entry['pages_per_second']['median']:,.0f}</td>" in page
    assert "Made-up CPU &lt;1 &amp; 2&gt;" in page
    for each in claims(document):
        assert each["claim"].replace("'", "&#x27;") in page or each["claim"] in page
    assert 'scope="col"' in page
    assert 'scope="row"' in page
    assert page.count("<figcaption>") == len(FIGURES)


@pytest.mark.parametrize("case", INCOMPLETE)
def test_missing_data_breaks_no_figure(case):
    contents = written(INCOMPLETE[case]())
    for root in svgs(contents).values():
        assert "nan" not in ElementTree.tostring(root, encoding="unicode").replace("dominant", "")
    assert "<script" not in contents["index.html"]
    assert contents["index.html"].endswith("</html>\n")


def test_what_is_missing_is_said():
    page = written(cut_short())["index.html"]
    assert "Partial." in page
    assert "mmio was skipped: no reason" in page
    assert "marker, 1 vCPU, 30 us network latency: 1 of 5 rounds." in page
    assert "Nothing was measured of present, marker, userfaultfd at 2 vCPUs, 30 us network latency." in page
    assert "Nothing was measured of userfaultfd at 1 vCPU, 30 us network latency." in page
    assert "No memory figures of userfaultfd." in page
    assert "No traced run of userfaultfd." in page
    assert "marker: its trace has no fault." in page


def test_a_complete_comparison_misses_nothing():
    document = comparison((1, 2), (0.0,), ("present", "marker", "userfaultfd"))
    assert "Nothing: all that was planned was measured." in written(document)["index.html"]


def test_the_same_document_gives_the_same_bytes(document, contents):
    assert written(comparison()) == contents


def test_a_large_map_is_thinned_and_says_so():
    document = comparison((), (), ()) | {"traces": {"marker": trace("marker", 4, 65536)}, "memory": []}
    contents = written(document)
    svg = contents["fault-map-1.svg"]
    dots = re.findall(r'class="dots s\d"', svg)
    assert len(dots) == 5
    drawn = int(re.search(r"([\d,]+) of [\d,]+ faults drawn", svg)[1].replace(",", ""))
    assert 0 < drawn <= 20_000
    assert len(rows(contents, "fault-map")) == len(document["traces"]["marker"]["records"])


def test_thinning_keeps_every_origin_and_leaves_few_points_alone():
    places = [(index % 100 / 100, index // 100 / 100) for index in range(10_000)]
    whose = ["device" if index == 4321 else "vcpu 0" for index in range(10_000)]
    assert thin(places, whose, 10_000) == list(range(10_000))
    kept = thin(places, whose, 50)
    assert 4321 in kept
    assert len(kept) <= 50
    assert kept == sorted(kept)


def test_series_are_told_apart_without_colour():
    assert len({line_style(index) for index in range(3 * SERIES)}) == 3 * SERIES


def luminance(colour):
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [0, 1])
def test_colours_stand_out_from_the_ground(dark):
    ground = _COLOURS["ground"][dark]
    for index in range(SERIES):
        assert contrast(_COLOURS[f"s{index}"][dark], ground) >= 3
    for name in ("ink", "soft"):
        assert contrast(_COLOURS[name][dark], ground) >= 4.5


@pytest.mark.parametrize("high", [1e-6, 0.3, 1, 7, 99, 100, 101, 12345.6, 3e9])
def test_linear_ticks_reach_the_highest_value_with_few_round_steps(high):
    ticks = linear_ticks(high)
    assert ticks[0] == 0
    assert ticks[-2] < high <= ticks[-1] * (1 + 1e-9)
    assert 2 <= len(ticks) <= 7


def test_log_ticks_enclose_the_values():
    assert log_ticks(1, 1000) == [1, 10, 100, 1000]
    assert log_ticks(8, 8, 8) == [8, 64]
    low, *_, high = log_ticks(3, 5000, 8)
    assert low <= 3
    assert high >= 5000


def test_numbers_are_written_in_units_that_suit_them():
    assert [duration(each) for each in (0.5, 30, 500, 2000, 2.5e6)] == [
        "0.5 us",
        "30 us",
        "500 us",
        "2 ms",
        "2.5 s",
    ]
    assert [memory(each) for each in (0.125, 32, 2048, 1 << 20)] == ["128 B", "32 KiB", "2 MiB", "1 GiB"]
