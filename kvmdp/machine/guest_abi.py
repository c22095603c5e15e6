"""The guest ABI, version 1: where things lie in guest-physical space, the parameter block, codes and numbers.

Follows guest/README.md, which says what everything means. guest/abi.inc is the assembler's view with the same
names, and a test compares the two.

Units: bytes, unless a name says pages or words.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint8, c_uint32, c_uint64
from enum import IntEnum, IntFlag

# Address map: everything but RAM lies in the boot slot
BOOT_BASE = 0xD000_0000
IMAGE_SIZE = 0x2_0000
PARAMETERS_BASE = 0xD002_0000
PARAMETERS_SIZE = 0x1000
STACKS_BASE = 0xD004_0000
STACK_SIZE = 0x8000
RING0_STACK_SIZE = 0x4000
PROGRAM_BASE = 0xD010_0000
PROGRAM_SIZE = 0x10_0000
PAGE_TABLES_BASE = 0xD020_0000
MAX_VCPUS = 16

# ParameterBlock.magic and version
MAGIC = int.from_bytes(b"KVMDPGST", "little")
VERSION = 1

# The port that reports go to, the one that gives back what a vCPU writes to it, and the vector of the service gate
REPORT_PORT = 0x510
LOOPBACK_PORT = 0x514

# The disk: its ports, the header of a ring, a request in it (guest/README.md, Disk)
DISK_DOORBELL_PORT = 0x518
DISK_WAIT_PORT = 0x51C
DISK_MAGIC = int.from_bytes(b"KVMDPDSK", "little")
DISK_VERSION = 1
DISK_SECTOR = 512
DISK_RING_MAGIC = 0x00
DISK_RING_VERSION = 0x08
DISK_RING_FEATURES = 0x0C
DISK_RING_ENTRIES = 0x10
DISK_RING_REQUESTS = 0x18
DISK_RING_SUBMITTED = 0x40
DISK_RING_COMPLETED = 0x80
DISK_RING_STATUS = 0x88
DISK_REQUEST_SECTOR = 0x00
DISK_REQUEST_OPERATION = 0x08
DISK_REQUEST_SEGMENTS = 0x0C
DISK_REQUEST_TABLE = 0x10
DISK_REQUEST_STATUS = 0x18
DISK_REQUEST_SIZE = 0x20
DISK_READ = 0
DISK_WRITE = 1
DISK_MAX_ENTRIES = 256
DISK_MAX_SEGMENTS = 64
DISK_MAX_BYTES = 1 << 20
GATE_VECTOR = 0x80

# The selectors the host enters with; the image's GDT has the same segments there
ENTRY_CODE_SELECTOR = 0x08
ENTRY_DATA_SELECTOR = 0x10

# Where in their pages the workloads work: offsets and lengths
CLOCK_OFFSET = 0x140
CLOCK_STEAL_OFFSET = 0x2C0
COPY_CHUNK = 6000
COPY_SHIFT = 13
DISK_RING_PAGES = 3
DISK_ENTRIES = 32
DISK_BATCH = 12
DISK_CHUNK = 8192
DISK_SEGMENT_OUT = 3000
DISK_SEGMENT_IN = 5000
DISK_SHIFT = 137
EXECUTE_OFFSET = 64
EXECUTE_CROSSING = 4091
STRING_OUT_OFFSET = 201
STRING_OUT_BYTES = 8
STRING_IN_OFFSET = 903
STRING_MOVE_SOURCE = 1205
STRING_MOVE_TARGET = 1609
STRING_MOVE_WORDS = 32
STRING_STORE_OFFSET = 2501
STRING_STORE_WORDS = 32
STRING_CROSSING = 4093
STRING_CROSSING_WORDS = 3
VECTOR_SSE_OFFSET = 67
VECTOR_SSE_CROSSING = 4089
VECTOR_AVX_OFFSET = 2149
VECTOR_AVX_CROSSING = 4083

# How many addresses of machine checks a parameter block has room for
MC_ADDRESSES = 192

# What clock found to hold: bits of its checksum
CLOCK_MOVES = 1
CLOCK_SET_AGAIN = 2
CLOCK_STEAL = 4

# What vector adds, 64 bits at a time
VECTOR_ADDEND_0 = 0x0123456789ABCDEF
VECTOR_ADDEND_1 = 0xFEDCBA9876543211
VECTOR_ADDEND_2 = 0x5A5A5A5AA5A5A5A5
VECTOR_ADDEND_3 = 0xC3C3C3C33C3C3C3D


class Report(IntEnum):
    """What the guest writes to `REPORT_PORT`, 32 bits."""

    DONE = 0
    EXCEPTION = 1
    CHECK_FAILED = 2


class Failure(IntEnum):
    """What `ParameterBlock.failure` says after `Report.CHECK_FAILED`."""

    ABI = 1
    WORKLOAD = 2
    DISK = 3


class DiskStatus(IntEnum):
    """How a request of the disk ended; in the header of a ring, why the device does not serve it."""

    OK = 0
    MALFORMED = 1
    ADDRESS = 2
    RANGE = 3
    SPACE = 4
    IO = 5
    POISON = 6


class Gate(IntEnum):
    """Functions of the service gate."""

    HALT = 0
    RDMSR = 1
    WRMSR = 2
    INVLPG = 3
    READ_CR = 4
    WRITE_CR3 = 5
    LIDT = 6


class VectorFlag(IntFlag):
    """Vector instructions that the guest may use beyond SSE2; XCR0 is set if there is one."""

    NONE = 0
    AVX = 1
    AVX2 = 2


class PvFlag(IntFlag):
    """What the guest may have KVM write to its memory."""

    NONE = 0
    CLOCK = 1
    STEAL_TIME = 2


class Order(IntEnum):
    """The order in which `touch` goes through its pages."""

    STRIDED = 0
    RANDOM = 1


class Operation(IntEnum):
    """The locked instruction that `atomic` uses."""

    ADD = 0
    INC = 1
    XADD = 2
    CMPXCHG = 3


class ParameterBlock(ctypes.Structure):
    """What a vCPU is to do, and what it leaves; one a vCPU, 4 KiB."""

    _fields_ = [
        ("magic", c_uint64),
        ("version", c_uint32),
        ("vcpus", c_uint32),
        ("ring", c_uint32),
        ("workload", c_uint32),
        ("flags", c_uint32),
        ("order", c_uint32),
        ("seed", c_uint64),
        ("first_page", c_uint64),
        ("page_count", c_uint64),
        ("tail_words", c_uint64),
        ("stride", c_uint64),
        ("start", c_uint64),
        ("touches", c_uint64),
        ("iterations", c_uint64),
        ("amount", c_uint64),
        ("write", c_uint32),
        ("operation", c_uint32),
        ("pv", c_uint32),
        ("reserved_alignment", c_uint32),
        ("low_ram_end", c_uint64),
        ("reserved_parameters", c_uint8 * 0x80),
        ("checksum", c_uint64),
        ("accesses", c_uint64),
        ("progress", c_uint64),
        ("failure", c_uint64),
        ("clock_first", c_uint64),
        ("clock_last", c_uint64),
        ("clock_version", c_uint64),
        ("steal_version", c_uint64),
        ("exception_count", c_uint64),
        ("exception_vector", c_uint64),
        ("exception_error_code", c_uint64),
        ("exception_cr2", c_uint64),
        ("exception_rip", c_uint64),
        ("exception_rsp", c_uint64),
        ("exception_rflags", c_uint64),
        ("exception_cs", c_uint64),
        ("pf_resume", c_uint64),
        ("pf_count", c_uint64),
        ("mc_resume", c_uint64),
        ("mc_count", c_uint64),
        ("mc_bank", c_uint64),
        ("mc_status", c_uint64),
        ("mc_address", c_uint64),
        ("mc_misc", c_uint64),
        ("mc_mcg_status", c_uint64),
        ("reserved_exceptions", c_uint8 * 0x38),
        ("mc_addresses", c_uint64 * MC_ADDRESSES),
        ("scratch", c_uint8 * 0x800),
    ]

    def __repr__(self) -> str:
        """Return the numbers that are not 0, by name."""
        fields = [(name, getattr(self, name)) for name, *_ in self._fields_]
        numbers = ", ".join(f"{name}={value}" for name, value in fields if isinstance(value, int) and value)
        return f"ParameterBlock({numbers})"


class SavedRegisters(ctypes.Structure):
    """What the #UD handler has on its stack, from RSP on, when it asks the host."""

    _fields_ = [
        ("rdi", c_uint64),
        ("rbx", c_uint64),
        ("rdx", c_uint64),
        ("rcx", c_uint64),
        ("rax", c_uint64),
        ("vector", c_uint64),
        ("error_code", c_uint64),
        ("rip", c_uint64),
        ("cs", c_uint64),
        ("rflags", c_uint64),
        ("rsp", c_uint64),
        ("ss", c_uint64),
    ]


def parameter_block_gpa(vcpu: int) -> int:
    """Return the gpa of the parameter block of vCPU number `vcpu`."""
    return PARAMETERS_BASE + PARAMETERS_SIZE * vcpu


def ring0_stack_top(vcpu: int) -> int:
    """Return the gpa just above the ring-0 stack of vCPU number `vcpu`: its RSP at entry."""
    return STACKS_BASE + STACK_SIZE * vcpu + RING0_STACK_SIZE
