"""Segment loads, descriptor tables, hints, direct stores, what faults, and code that lies in absent pages."""

from ..form import EITHER_OR_BOTH, MEMORY, STACK, A, B, C, D, E, F, Form, Symbol, T

_POINTER = A + 0x40
_LFS = ".byte 0x48, 0x0F, 0xB4, 0x1C, 0x25"  # lfs rbx, [32-bit address], with an offset of 64 bits


def _segments():
    for register in ("ds", "es", "fs"):
        yield Form(f"mov {register},m", f"mov {register}, word ptr [{_POINTER:#x}]", memory={_POINTER: 0})
        yield Form(
            f"mov {register},m across",
            f"mov {register}, word ptr [{B - 1:#x}]",
            EITHER_OR_BOTH,
            memory={B - 1: bytes(2)},
        )
    yield Form("mov ss,m", f"mov ss, word ptr [{_POINTER:#x}]", memory={_POINTER: Symbol.DATA})
    for register in ("ds", "ss", "cs"):
        yield Form(f"mov m,{register}", f"mov word ptr [{_POINTER:#x}], {register}")
    # A selector of 0 wherever the CPU looks for it: AMD's know no far pointer with an offset of 64 bits.
    yield Form("lfs", f"{_LFS}; .long {_POINTER:#x}", memory={_POINTER + 4: bytes(6)})
    yield Form("lfs across", f"{_LFS}; .long {B - 8:#x}", EITHER_OR_BOTH, memory={B - 4: bytes(6)})


def _tables():
    # KVM spins on these, where it makes the access itself, until the watchdog looks: a second for each page.
    yield Form("sgdt", f"sgdt [{_POINTER:#x}]")
    yield Form("sidt across", f"sidt [{B - 4:#x}]", ("AB",))
    yield Form("str m", f"str word ptr [{_POINTER:#x}]", alone=True)
    yield Form("sldt m", f"sldt word ptr [{_POINTER:#x}]")
    yield Form("smsw m", f"smsw word ptr [{_POINTER:#x}]")


def _hints():
    for code in ("prefetcht0", "prefetchnta", "prefetchw", "clflush"):
        yield Form(code, f"{code} byte ptr [{_POINTER:#x}]")
    yield Form("clflushopt", f"clflushopt byte ptr [{_POINTER:#x}]", needs=("clflushopt",))
    yield Form("nop m", f"nop dword ptr [{_POINTER:#x}]")
    yield Form("lea", f"lea rbx, [{_POINTER:#x}]")


def _direct_stores():
    registers = {"rbx": C + 0x40}
    for source, absent in ((A + 0x80, ("A", "C", "AC")), (B - 32, ("A", "B", "AB", "ABC", "C"))):
        where = "" if len(absent) == 3 else " across"
        yield Form(
            f"movdir64b{where}",
            f"movdir64b rbx, [{source:#x}]",
            absent,
            registers=registers,
            needs=("movdir64b",),
        )


def _faults():
    """What raises an exception, with memory absent as without."""
    rsp = {"rsp": 0xD004_3F00}  # ring 0 pushes the frame where RSP points
    last = MEMORY - 4
    yield Form("mov beyond RAM", "mov rbx, [rcx]", registers={**rsp, "rcx": MEMORY})
    yield Form("movs from beyond RAM", "movsb", ("C",), registers={**rsp, "rsi": MEMORY, "rdi": C})
    yield Form("movs to beyond RAM", "movsb", ("A",), registers={**rsp, "rsi": A, "rdi": MEMORY})
    yield Form("push from beyond RAM", "push qword ptr [rcx]", ("S",), registers={"rcx": MEMORY}, rings=(3,))
    yield Form("add across the end of RAM", "add [rcx], rbx", registers={**rsp, "rcx": last})
    yield Form("divide by 0", f"div dword ptr [{_POINTER:#x}]", registers=rsp, memory={_POINTER: 0})
    yield Form(
        "divide overflow", f"div qword ptr [{_POINTER:#x}]", registers={**rsp, "rdx": 5}, memory={_POINTER: 1}
    )
    yield Form("movaps unaligned", f"movaps xmm1, [{_POINTER + 8:#x}]", registers=rsp)


def _delivered():
    """What pushes the frame of an event where RSP points."""
    rest = {"rings": (0,), "delivers": True, "alone": True}
    for rsp, where, absent in ((STACK, "", ("S",)), (T + 16, " across", ("S", "T", "ST"))):
        registers = {"rsp": rsp}
        yield Form(f"int{where}", "mov eax, 99; int 0x80", absent, registers=registers, quick=True, **rest)
        registers = {**registers, "rcx": MEMORY}
        yield Form(f"page fault{where}", "mov rbx, [rcx]", absent, registers=registers, **rest)


def _fetched():
    """Code in absent pages; the border of pages lies in the first instruction."""
    for name, code, length in (
        ("mov", "mov rbx, 0x1122334455667788", 10),
        ("short mov", "mov ebx, 77", 5),
        ("load", f"mov rbx, [{_POINTER:#x}]", 8),
        ("add m,i", f"add dword ptr [{_POINTER:#x}], 0x12345678", 11),
        ("lock xadd", f"lock xadd [{_POINTER:#x}], rbx", 10),
        ("load RIP-relative", f"mov rbx, [rip + {_POINTER:#x} + {{here}}]", 7),
        ("store RIP-relative", f"mov dword ptr [rip + {_POINTER:#x} + {{here}}], 77", 10),
        ("lock add RIP-relative", f"lock add qword ptr [rip + {_POINTER:#x} + {{here}}], 77", 9),
        ("lzcnt RIP-relative", f"lzcnt rbx, [rip + {_POINTER:#x} + {{here}}]", 9),
        ("movups RIP-relative", f"movups xmm1, [rip + {_POINTER:#x} + {{here}}]", 8),
        ("call", "call 1f; nop; 1: nop", 5),
        ("rep movsd", "rep movsd", 2),
    ):
        operand = ("A",) if "A" in code or f"{_POINTER:#x}" in code else ()
        registers = {"rsi": B - 8, "rdi": D - 12, "rcx": 5} if name == "rep movsd" else {}
        more = {"ABCD"} if registers else set(operand)
        pages = ("E", *(f"E{letters}" for letters in more))
        yield Form(f"fetched {name}", code, pages, at=E + 0x80, registers=registers, quick=True)
        for first in sorted({1, length // 2, length - 1}):
            pages = ("E", "F", "EF", *(f"EF{letters}" for letters in more))
            yield Form(
                f"fetched {name}, {first} bytes in the first page",
                code,
                pages,
                at=F - first,
                registers=registers,
            )
    yield Form("fetched at the border", "mov rbx, 77", ("E", "F", "EF"), at=F - 7)


FORMS = [*_segments(), *_tables(), *_hints(), *_direct_stores(), *_faults(), *_delivered(), *_fetched()]
