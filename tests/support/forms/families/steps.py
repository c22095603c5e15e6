"""Instructions that are stepped over with RFLAGS.TF, or that come in the shadow of a MOV to SS."""

from ..exchange import DATA_PORT
from ..form import STACK, TRAP, A, B, C, D, F, Form, S, Symbol

_POINTER = A + 0x40
# On a stack of their own: vCPUs that share it would see each other's flags, and in ring 0 each other's frames.
_ALONE = {"alone": True}
_STEP = "pushfq; or byte ptr [rsp + 1], 1; popfq; "
_STEP_BYTES = 7


def _stepped():
    landing = {_POINTER: Symbol.LANDING}
    for name, code, absent, rest in (
        ("mov r,m", f"mov rbx, [{_POINTER:#x}]", ("A",), {}),
        ("mov m,r", f"mov [{_POINTER:#x}], rbx", ("A",), {}),
        ("mov m,r across", f"mov [{B - 4:#x}], rbx", ("A", "B", "AB"), {}),
        ("add m,r", f"add [{_POINTER:#x}], rbx", ("A",), {}),
        ("lock xadd across", f"lock xadd [{B - 4:#x}], rbx", ("A", "B", "AB"), {}),
        ("lzcnt", f"lzcnt rbx, [{_POINTER:#x}]", ("A",), {"needs": ("abm",)}),
        ("movups load", f"movups xmm1, [{_POINTER:#x}]", ("A",), {}),
        ("push m", f"push qword ptr [{_POINTER:#x}]", ("A",), {}),
        ("pop m", f"pop qword ptr [{_POINTER:#x}]", ("A",), {}),
        ("jmp m", f"jmp qword ptr [{_POINTER:#x}]", ("A",), {"memory": landing}),
        ("call m", f"call qword ptr [{_POINTER:#x}]", ("A",), {"memory": landing}),
        ("movsq", "movsq", ("A", "C", "AC"), {"registers": {"rsi": A + 8, "rdi": C + 8}}),
        ("rep movsd", "rep movsd", ("A", "C", "AC"), {"registers": {"rsi": A + 8, "rdi": C + 8, "rcx": 5}}),
        ("rep stosq", "rep stosq", ("C", "D", "CD"), {"registers": {"rdi": D - 8, "rcx": 2}}),
        ("insd", "insd", ("C",), {"registers": {"rdi": C + 8, "rdx": DATA_PORT}}),
        ("rep insd", "rep insd", ("C", "D", "CD"), {"registers": {"rdi": D - 6, "rdx": DATA_PORT, "rcx": 3}}),
        ("outsd", "outsd", ("A",), {"registers": {"rsi": A + 8, "rdx": DATA_PORT}}),
        ("div by 0", f"div dword ptr [{_POINTER:#x}]", ("A",), {"memory": {_POINTER: 0}}),
    ):
        yield Form(f"step over {name}", _STEP + code, absent, quick=True, **rest, **_ALONE)
    yield Form("step over a fetch", f"{_STEP}mov ebx, 77", ("F",), at=F - _STEP_BYTES, **_ALONE)
    yield Form("step over a fetch across", f"{_STEP}mov ebx, 77", ("F",), at=F - _STEP_BYTES - 2, **_ALONE)
    # The flag comes from memory that is absent.
    yield Form("popfq of the flag", "popfq; nop; nop", ("S",), memory={STACK: 0x3002 | TRAP}, **_ALONE)
    frame = {S + 0x900: Symbol.LANDING, S + 0x908: Symbol.CODE, S + 0x910: 0x3002 | TRAP}
    frame |= {S + 0x918: STACK, S + 0x920: Symbol.DATA}
    yield Form("iretq of the flag", "iretq", ("S",), registers={"rsp": S + 0x900}, memory=frame)


def _shadowed():
    """Neither a step nor an interrupt comes between a MOV to SS and the next instruction."""
    selector = {_POINTER: Symbol.DATA}
    for name, code in (
        ("mov ss,m", f"mov ss, word ptr [{_POINTER:#x}]; mov ebx, 77"),
        ("mov ss,r; mov r,m", f"mov eax, ss; {{step}}mov ss, eax; mov rbx, [{_POINTER:#x}]"),
        ("mov ss,r; mov m,r", f"mov eax, ss; {{step}}mov ss, eax; mov [{_POINTER:#x}], rbx"),
        ("mov ss,m; mov r,m", f"mov ss, word ptr [{_POINTER:#x}]; mov rbx, [{C + 8:#x}]"),
    ):
        absent = ("A", "C", "AC") if "C" in code or f"{C + 8:#x}" in code else ("A",)
        stepped = code.replace("{step}", _STEP) if "{step}" in code else _STEP + code
        yield Form(f"step over {name}", f"{stepped}; nop", absent, memory=selector, **_ALONE)


FORMS = [*_stepped(), *_shadowed()]
