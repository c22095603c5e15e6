"""The claims: each verdict from a made-up comparison, with the figures it rests on."""

import pytest
from report_documents import bench, comparison, memory_rows

from kvmdp.bench.claims import claims

HUGETLB, MEMORY, CPU, CONCURRENCY, NETWORK, WAIT_QUEUES = range(6)
NAMES = ("present", "marker", "mmio", "userfaultfd", "userfaultfd-sharded")
RATES = {"present": 2e5, "marker": 7e3, "mmio": 5e3, "userfaultfd": 6e3, "userfaultfd-sharded": 6.2e3}


def judged(index, document):
    claim = claims(document)[index]
    return claim["verdict"], claim["why"]


def with_benches(*benches, **more):
    return comparison((), (), NAMES) | {"benches": list(benches)} | more


def at(vcpus=1, latency=0.0, cpus_us=None, **rates):
    named = {name.replace("_", "-"): rate for name, rate in rates.items()}
    return bench(vcpus, latency, NAMES, rates=RATES | named, cpus_us=cpus_us)


def test_each_claim_names_who_said_it_and_has_one_of_three_verdicts():
    for each in claims(comparison()):
        assert list(each) == ["who", "claim", "verdict", "why"]
        assert each["who"] in {"Matlack", "Xu"}
        assert each["verdict"] in {"supported", "weakened", "undecided"}
        assert each["why"].endswith(".")


def test_the_document_is_left_as_it_was():
    document = comparison(vcpus=(1,), latencies=(0.0,))
    document["claims"] = [{"who": "x", "claim": "x", "verdict": "supported", "why": "x"}]
    before = repr(document)
    assert claims(document) == claims(document | {"claims": []})
    assert repr(document) == before


def test_nothing_measured_decides_nothing():
    assert {each["verdict"] for each in claims(with_benches(memory=[]))} == {"undecided"}


def test_huge_pages_are_not_decided_here():
    verdict, why = judged(HUGETLB, comparison())
    assert verdict == "undecided"
    assert "HugeTLB" in why


def test_memory_is_supported_where_only_paging_costs_page_tables():
    verdict, why = judged(MEMORY, with_benches(memory=memory_rows(present_kib=40)))
    assert verdict == "supported"
    assert "8.03 bytes of page tables a guest page" in why
    assert "the bitmap takes 1 bit" in why
    assert "memory-fault 95.9" in why
    assert "0.156 bytes" in why


def test_memory_is_weakened_where_present_memory_costs_the_same():
    verdict, why = judged(MEMORY, with_benches(memory=memory_rows(present_kib=2056)))
    assert verdict == "weakened"
    assert "cost of mapping 4 KiB pages" in why


def test_memory_is_weakened_where_userfaultfd_costs_little():
    rows = [row | {"vmpte_kib": 8} for row in memory_rows()]
    verdict, why = judged(MEMORY, with_benches(memory=rows))
    assert verdict == "weakened"
    assert "not the cost that was claimed" in why


def test_memory_without_figures_of_userfaultfd_is_undecided():
    verdict, why = judged(MEMORY, with_benches(memory=memory_rows(names=("present", "marker"))))
    assert verdict == "undecided"
    assert "no memory figures of userfaultfd" in why


@pytest.mark.parametrize(
    ("marker", "mmio", "verdict"),
    [(100.0, 200.0, "supported"), (200.0, 220.0, "weakened"), (150.0, 220.0, "undecided")],
)
def test_cpu(marker, mmio, verdict):
    costs = {"marker": marker, "mmio": mmio, "userfaultfd": 150.0}
    document = with_benches(*(bench(n, 0.0, NAMES, cpus_us=costs, seed=7) for n in (1, 2)))
    found, why = judged(CPU, document)
    assert found == verdict
    assert "relative to userfaultfd: marker" in why
    assert "A bare exit takes marker 100 us here." in why


def test_software_virtualisation_is_named_where_exits_are_weighed():
    document = with_benches(at())
    document["host"]["kvm"] = "kvm_pvm"
    assert "KVM is PVM" in judged(CPU, document)[1]


def scaled(vcpus, cpus, **growth):
    grown = {name: rate * growth.get(name.replace("-", "_"), 1) for name, rate in RATES.items()}
    document = with_benches(bench(1, 0.0, NAMES, rates=RATES), bench(vcpus, 0.0, NAMES, rates=grown))
    document["host"]["cpus"] = cpus
    return document


def test_concurrency_cannot_be_decided_on_two_cpus():
    verdict, why = judged(CONCURRENCY, scaled(4, 2, marker=1.5, userfaultfd=2))
    assert verdict == "undecided"
    assert "4 vCPUs on 2 CPUs cannot show it" in why
    assert "marker 1.50" in why
    assert "userfaultfd 2.00" in why


def test_concurrency_cannot_be_decided_by_few_vcpus_on_many_cpus():
    assert judged(CONCURRENCY, scaled(4, 64, marker=4))[0] == "undecided"


def test_concurrency_with_many_vcpus():
    assert judged(CONCURRENCY, scaled(32, 64, marker=20, userfaultfd_sharded=9))[0] == "supported"
    # A sharded baseline that scales as well takes the edge off the claim.
    assert judged(CONCURRENCY, scaled(32, 64, marker=20, userfaultfd_sharded=19.5))[0] == "weakened"


def test_concurrency_needs_two_numbers_of_vcpus():
    assert judged(CONCURRENCY, with_benches(at(1)))[0] == "undecided"


def test_a_network_that_hides_the_difference_supports_its_claim():
    slow = dict.fromkeys(("marker", "mmio", "userfaultfd"), 1500.0)
    verdict, why = judged(NETWORK, with_benches(at(1, 500e-6, **slow), at(4, 500e-6, **slow)))
    assert verdict == "supported"
    assert "500 us network latency" in why
    assert "simulated" in why
    assert "Fetches in flight at 4 vCPUs, on average: marker 1.60" in why


def test_exits_faster_behind_a_network_weaken_its_claim():
    verdict, why = judged(NETWORK, with_benches(at(1, 500e-6), at(4, 500e-6, marker=9e3)))
    assert verdict == "weakened"
    assert "marker at 4 vCPUs" in why
    assert "mmio at" not in why


def test_exits_behind_a_network_meet_the_fastest_form_of_userfaultfd():
    slow = {"marker": 1500.0, "mmio": 1000.0, "userfaultfd": 1000.0, "userfaultfd_sharded": 1500.0}
    verdict, why = judged(NETWORK, with_benches(at(1, 500e-6, **slow), at(4, 500e-6, **slow)))
    assert verdict == "supported", "faster than one reader, but not than the sharded userfaultfd"
    assert "marker at 4 vCPUs" not in why.partition("relative to")[0]


@pytest.mark.parametrize("places", [[(1, 0.0), (4, 0.0)], [(1, 30e-6), (4, 30e-6)], [(1, 500e-6)]])
def test_a_fast_network_or_one_vcpu_decides_nothing_about_it(places):
    assert judged(NETWORK, with_benches(*(at(*place) for place in places)))[0] == "undecided"


@pytest.mark.parametrize(
    ("marker", "sharded", "verdict"),
    [
        ((9e3, 9e3), 6e3, "weakened"),
        ((4e3, 4e3), 6e3, "supported"),
        # Faster than one reader, but not than the sharded userfaultfd: that is the fair opponent.
        ((9e3, 9e3), 12e3, "supported"),
        ((9e3, 4e3), 6e3, "undecided"),
    ],
)
def test_wait_queues(marker, sharded, verdict):
    rates = dict(zip((1, 2), marker, strict=True))
    benches = (at(vcpus, marker=rate, mmio=4e3, userfaultfd_sharded=sharded) for vcpus, rate in rates.items())
    found, why = judged(WAIT_QUEUES, with_benches(*benches))
    assert found == verdict
    assert "relative to the fastest form of userfaultfd" in why


def test_ratios_are_taken_round_by_round():
    document = with_benches(at(1))
    entries = {each["name"]: each for each in document["benches"][0]["contenders"]}
    # Both twice as slow in the second half of the run: the ratio must not notice.
    for name, rate in (("marker", 9000.0), ("userfaultfd", 6000.0), ("userfaultfd-sharded", 5000.0)):
        for turn, each in enumerate(entries[name]["rounds"]):
            each["seconds"] = each["pages"] / (rate if turn < 2 else rate / 2)
        entries[name]["pages_per_second"]["median"] = rate
    assert "marker 1.50 (1.50-1.50) at 1 vCPU" in judged(WAIT_QUEUES, document)[1]
