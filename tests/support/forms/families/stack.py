"""Pushes and pops, calls, jumps and returns, near and far, frames."""

from ..form import ALL_FLAGS, DIRECTION, STACK, A, B, Form, S, Symbol, T

_LANDING, _CODE, _DATA = Symbol.LANDING, Symbol.CODE, Symbol.DATA
_POINTER = A + 0x40  # of memory operands
_HALF = T - 4  # RSP for an access of 8 bytes across S and T


def _push_and_pop():
    for code in ("push rbx", "push 77", "push bx", "pushfq", "pushfw", "push fs"):
        yield Form(code, code, ("S",), quick=code == "push rbx")
        yield Form(f"{code} across", code, ("S", "T", "ST"), registers={"rsp": T + 1})
    for code in ("pop rbx", "pop bx"):
        yield Form(code, code, ("S",), quick=code == "pop rbx")
        yield Form(f"{code} across", code, ("S", "T", "ST"), registers={"rsp": T - 1})
    flags = {STACK: 0x3202 & ~0x200 | ALL_FLAGS}
    yield Form("popfq", "popfq", ("S",), memory=flags)
    yield Form("popfw", "popfw", ("S",), memory=flags)
    yield Form("popfq direction", "popfq", ("S",), memory={STACK: 0x3002 | DIRECTION})
    yield Form("pop fs", "pop fs", ("S",), memory={STACK: 0})
    yield Form("push m", f"push qword ptr [{_POINTER:#x}]", ("A", "S", "AS"), quick=True)
    yield Form("push m16", f"push word ptr [{_POINTER:#x}]", ("A", "S", "AS"))
    yield Form(
        "push m across to stack across",
        f"push qword ptr [{B - 4:#x}]",
        ("AB", "ST", "ABST", "A", "B", "S", "T"),
        registers={"rsp": T + 4},
    )
    yield Form("push [rsp]", "push qword ptr [rsp + 8]", ("S",))
    yield Form("pop m", f"pop qword ptr [{_POINTER:#x}]", ("A", "S", "AS"), quick=True)
    yield Form("pop m16", f"pop word ptr [{_POINTER:#x}]", ("A", "S", "AS"))
    yield Form(
        "pop m across from stack across",
        f"pop qword ptr [{B - 4:#x}]",
        ("AB", "ST", "ABST", "A", "B", "S", "T"),
        registers={"rsp": _HALF},
    )
    yield Form("pop [rsp]", "pop qword ptr [rsp + 8]", ("S",))
    yield Form(
        "pop [rsp] in the next page", "pop qword ptr [rsp]", ("S", "T", "ST"), registers={"rsp": T - 8}
    )


def _near():
    call = "call 1f; nop; 1: nop"
    yield Form("call near", call, ("S",))
    yield Form("call near across", call, ("S", "T", "ST"), registers={"rsp": T + 4})
    to = {_POINTER: _LANDING}
    yield Form("call m", f"call qword ptr [{_POINTER:#x}]", ("A", "S", "AS"), memory=to, quick=True)
    yield Form(
        "call m across to stack across",
        f"call qword ptr [{B - 4:#x}]",
        ("AB", "ST", "ABST", "B", "T"),
        registers={"rsp": T + 4},
        memory={B - 4: _LANDING},
    )
    yield Form("call [rsp]", "call qword ptr [rsp]", ("S",), memory={STACK: _LANDING})
    yield Form("jmp m", f"jmp qword ptr [{_POINTER:#x}]", memory=to)
    yield Form("jmp m across", f"jmp qword ptr [{B - 4:#x}]", ("A", "B", "AB"), memory={B - 4: _LANDING})
    yield Form("ret", "ret", ("S",), memory={STACK: _LANDING}, quick=True)
    yield Form("ret n", "ret 24", ("S",), memory={STACK: _LANDING})
    yield Form("ret across", "ret", ("S", "T", "ST"), registers={"rsp": _HALF}, memory={_HALF: _LANDING})


def _far():
    to = {_POINTER: _LANDING, _POINTER + 8: _CODE}
    call = f"rex.w call fword ptr [{_POINTER:#x}]"
    yield Form("call far", call, ("A", "S", "AS"), memory=to, quick=True)
    for rsp, name in (
        (T + 8, "in two pages"),
        (T + 4, "second store across"),
        (T + 12, "first store across"),
    ):
        yield Form(
            f"call far, stack {name}",
            call,
            ("S", "T", "ST", "A", "AST", "AT", "AS"),
            registers={"rsp": rsp},
            memory=to,
        )
    # AMD's CPUs know no far pointer with an offset of 64 bits: pointer and what is pushed have 32.
    to = {_POINTER: _LANDING, _POINTER + 4: _CODE}
    call = f"call fword ptr [{_POINTER:#x}]"
    yield Form("call far 32", call, ("A", "S", "AS"), memory=to)
    yield Form(
        "call far 32, stack in two pages", call, ("S", "T", "ST", "AST"), registers={"rsp": T + 4}, memory=to
    )
    yield Form("jmp far 32", f"jmp fword ptr [{_POINTER:#x}]", memory=to)
    yield Form("retf 32", ".byte 0xCB", ("S",), memory={STACK: _LANDING, STACK + 4: _CODE})
    across = {B - 4: _LANDING, B + 4: _CODE}
    yield Form(
        "call far m across", f"rex.w call fword ptr [{B - 4:#x}]", ("A", "B", "AB", "ABS"), memory=across
    )
    yield Form("jmp far", f"rex.w jmp fword ptr [{_POINTER:#x}]", memory=to)
    yield Form(
        "jmp far across",
        f"rex.w jmp fword ptr [{B - 8:#x}]",
        ("A", "B", "AB"),
        memory={B - 8: _LANDING, B: _CODE},
    )
    for code in ("retfq", "rex64 retf 16"):
        name = "retf n" if "16" in code else "retf"
        yield Form(name, code, ("S",), memory={STACK: _LANDING, STACK + 8: _CODE}, quick=True)
        for rsp, where in ((T - 8, "in two pages"), (T - 4, "first across"), (T - 12, "second across")):
            yield Form(
                f"{name} {where}",
                code,
                ("S", "T", "ST"),
                registers={"rsp": rsp},
                memory={rsp: _LANDING, rsp + 8: _CODE},
            )
    for rsp, where, absent in (
        (STACK, "", ("S",)),
        *((T - 8 * count, f"{count} in the first page", ("S", "T", "ST")) for count in (1, 2, 3, 4)),
        (T - 12, "across", ("S", "T", "ST")),
    ):
        frame = {
            rsp: _LANDING,
            rsp + 8: _CODE,
            rsp + 16: 0x3002 | ALL_FLAGS,
            rsp + 24: S + 0x400,
            rsp + 32: _DATA,
        }
        yield Form(f"iretq {where}".strip(), "iretq", absent, registers={"rsp": rsp}, memory=frame)


def _frames():
    frame = {"rbp": A + 0x100}
    yield Form("leave", "leave", registers=frame, quick=True)
    yield Form("leave across", "leave", ("A", "B", "AB"), registers={"rbp": B - 4})
    yield Form("leave 16", "leavew", registers=frame)
    for level in range(4):
        absent = ("S", "A", "AS") if level > 1 else ("S",)
        yield Form(f"enter {level}", f"enter 0x20, {level}", absent, registers=frame, quick=level in (0, 2))
        pages = ("S", "T", "ST") if level < 2 else ("S", "T", "ST", "A", "B", "ABST", "AT", "BS")
        registers = {"rsp": T + 12, "rbp": B + 12}
        yield Form(f"enter {level} across", f"enter 0x20, {level}", pages, registers=registers)
    yield Form("enter 31", "enter 0x20, 31", ("A", "S", "AS"), registers={"rbp": A + 0x200})


FORMS = [*_push_and_pop(), *_near(), *_far(), *_frames()]
