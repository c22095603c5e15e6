"""Command lines for tests of what every command does: each takes about a second."""

RUN = ("run", "--memory", "2M", "--trap", "mmio")
SLOW = (*RUN, "--latency", "2500us")  # lines of progress come
EXACT = "512 present pages compared with the source: all exact\n"
_COMPARISON = ("-b", "2M", "-v", "1", "--latencies", "0", "--rounds", "1", "--memory-sizes", "none")

# name -> arguments, something that it prints
MEASURING = {
    "probe": (("probe",), "use mmio: 1 of 1 traps work here"),
    "bench": (("bench", "-b", "2M", "--rounds", "1", "--warm-up", "0", "present", "mmio"), "beyond: "),
    "memory-cost": (("bench", "--memory-cost", "-b", "2M", "present", "mmio"), "full: all RAM touched"),
    "compare": (("compare", *_COMPARISON, "present", "mmio"), "x uffd"),
    "coverage": (("compare", "--coverage"), "not missed: "),
}
# To be run before `run`, so that lines of progress come ten times a second. A supervised run's process has it not.
OFTEN = """
from kvmdp.cli import progress
progress._LINE_SECONDS = 0.1
"""
# To be run before `probe` and `compare --coverage`, whose tables would take long.
FEW_CELLS = """
from kvmdp.cli import probe
from kvmdp.lab import coverage
probe.TRAPS = {"mmio": probe.TRAPS["mmio"]}
probe.BACKINGS = {"memfd": probe.BACKINGS["memfd"]}
for access in {*coverage.ACCESSES} - {"read", "device thread"}:
    del coverage.ACCESSES[access]
"""
