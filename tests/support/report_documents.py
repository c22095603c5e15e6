"""Made-up documents for the tests of the report: no figure in them was measured."""

import random

CONTENDERS = (
    "present",
    "marker",
    "memory-fault",
    "mmio",
    "userfaultfd",
    "userfaultfd-r2",
    "userfaultfd-r4",
    "userfaultfd-sharded",
    "userfaultfd-r4:vcpus=4",
)
TRAPS = {"present": None, "marker": "marker", "memory-fault": "memory-fault", "mmio": "mmio"}
PAGE_US = {"present": 4.5, "marker": 140.0, "memory-fault": 180.0, "mmio": 210.0}
FLOORS = {"marker": 100.0, "memory-fault": 110.0}


def spread(values):
    ordered = sorted(values)
    return {"median": ordered[len(ordered) // 2], "min": ordered[0], "max": ordered[-1]}


def trap_of(name):
    return TRAPS.get(name, "userfaultfd")


def made_round(name, vcpus, latency, chance, rate=None, cpu_us=None):
    pages = 16384 * vcpus
    page_us = PAGE_US.get(name, 160.0)
    if rate is None:
        alone = page_us + (1e6 * latency if trap_of(name) else 0)
        rate = 1e6 / max(alone / vcpus, page_us / 2) * chance.uniform(0.97, 1.03)
    cpu = (page_us if cpu_us is None else cpu_us) * chance.uniform(0.95, 1.05) * pages / 1e6
    return {
        "seconds": pages / rate,
        "pages": pages,
        "faults": pages if trap_of(name) else 0,
        "user_s": round(cpu * 0.6, 6),
        "system_s": round(cpu * 0.4, 6),
        "voluntary_switches": pages if trap_of(name) == "userfaultfd" else pages // 9,
        "involuntary_switches": pages // 100,
    }


def rate_of(round_):
    return round_["pages"] / round_["seconds"]


def cpu_of(round_):
    return 1e6 * (round_["user_s"] + round_["system_s"]) / (round_["faults"] or round_["pages"])


def entry(name, vcpus, latency, rounds, chance):
    buckets = [0] * 24
    slowness = CONTENDERS.index(name) / 10 if name in CONTENDERS else 0.5
    if trap_of(name):
        for _ in range(2000):
            micros = 1e6 * latency + chance.lognormvariate(3 + slowness, 0.5)
            buckets[int(micros).bit_length() - 1 if micros >= 1 else 0] += 1
    floor = FLOORS.get(name)
    return {
        "name": name,
        "trap": trap_of(name),
        "vcpus": vcpus,
        "rounds": rounds,
        "pages_per_second": spread([rate_of(each) for each in rounds]),
        "page_us": spread([1e6 / rate_of(each) for each in rounds]),
        "own_cost_us": spread([1e6 / rate_of(each) - floor for each in rounds]) if floor else None,
        "cpu_us_per_fault": spread([cpu_of(each) for each in rounds]),
        "switches_per_fault": {"median": 1.11, "min": 1.01, "max": 1.25},
        "latency_us": {"p50": 22.5, "p90": 41.25, "p99": 133.5, "max": 2048.75, "buckets": buckets},
        "in_flight": round(0.4 * vcpus, 2),
        "memory": {"vmpte_kib": 520, "bitmap_bytes": 8192, "memslots": 3, "slot_kib": 80},
    }


def bench(vcpus=1, latency=0.0, names=CONTENDERS, rounds=5, rates=None, cpus_us=None, host_cpus=2, seed=0):
    """A bench document. `rates` and `cpus_us` (name -> figure) set what the claims are tested with."""
    chance = random.Random(f"{seed} {vcpus} {latency}")
    made = {
        name: [
            made_round(name, vcpus, latency, chance, (rates or {}).get(name), (cpus_us or {}).get(name))
            for _ in range(rounds)
        ]
        for name in names
    }
    ratios = []
    for metric, figure in (("pages_per_second", rate_of), ("cpu_us_per_fault", cpu_of)):
        for name in names:
            if name != "userfaultfd" and "userfaultfd" in names:
                pairs = zip(made[name], made["userfaultfd"], strict=True)
                ratio = spread([figure(a) / figure(b) for a, b in pairs])
                ratios.append({"a": name, "b": "userfaultfd", "metric": metric, **ratio})
    return {
        "schema": "kvmdp.bench/1",
        "version": "0.1.0",
        "complete": True,
        "host": host(host_cpus),
        "options": {
            "bytes_per_vcpu": 64 << 20,
            "vcpus": vcpus,
            "ring": 3,
            "workload": "touch",
            "order": "sequential",
            "write": True,
            "overlap": False,
            "backing": "memfd",
            "fault_around": 1,
            "latency": latency,
            "bandwidth": 0.0,
            "rounds": rounds,
        },
        "floor_us": {
            trap: {"median": low, "min": low - 3, "max": low + 9} if (low := FLOORS.get(trap)) else None
            for trap in dict.fromkeys(trap_of(name) for name in names if trap_of(name))
        },
        "contenders": [entry(name, vcpus, latency, made[name], chance) for name in names],
        "ratios": ratios,
        "skipped": {},
    }


def host(cpus=2):
    return {
        "cpu": "Made-up CPU <1 & 2>",
        "cpus": cpus,
        "memory_bytes": 16 << 30,
        "kernel": "6.18.0",
        "kvm": "kvm_intel",
        "nested_paging": True,
        "thp": "madvise",
        "thp_shmem": "never",
        "python": "3.11.7",
    }


def trace(name, vcpus=2, faults=3000, seed=0):
    chance = random.Random(f"{seed} {name}")
    pages = vcpus * 16384
    time, records, step = 0.0, [], pages // faults
    shares = [list(range(at * 16384, (at + 1) * 16384, step)) for at in range(vcpus)]
    for index in range(min(map(len, shares))):
        for vcpu, share in enumerate(shares):
            time += chance.uniform(60, 110)
            records.append([round(time, 3), share[index] * 4096, 4096 * step, f"vcpu {vcpu}", 25.5, step])
        if index % 40 == 0:
            records.append([round(time, 3), chance.randrange(pages) * 4096, 4096, "device", 40.25, 1])
    return {"vcpus": vcpus, "memory_bytes": pages * 4096, "records": records}


def memory_rows(
    names=("present", "marker", "memory-fault", "mmio", "userfaultfd"), sizes=(1, 4), present_kib=40
):
    return [
        {
            "contender": name,
            "gib": size,
            "vmpte_kib": present_kib * size if name == "present" else 2056 * size,
            "bitmap_bytes": 32768 * size,
            "slot_kib": 90000 if name == "memory-fault" else 60 if name == "marker" else 0,
            "memslots": 16384 if name == "memory-fault" else 2,
            "granule": 65536 if name == "memory-fault" else None,
            "fault_around": 512,
        }
        for name in names
        for size in sizes
    ]


def comparison(vcpus=(1, 2, 4), latencies=(0.0, 30e-6, 500e-6), names=CONTENDERS, **more):
    return {
        "schema": "kvmdp.compare/1",
        "version": "0.1.0",
        "complete": True,
        "host": host(more.get("host_cpus", 2)),
        "benches": [bench(count, latency, names, **more) for latency in latencies for count in vcpus],
        "traces": {name: trace(name) for name in ("marker", "memory-fault", "userfaultfd") if name in names},
        "memory": memory_rows(),
        "claims": [],
    }
