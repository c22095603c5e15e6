"""Integer instructions with one memory operand: loads, stores, and read-modify-write, locked too."""

from ..form import ADJUST, ALL_FLAGS, CARRY, OVERFLOW, PARITY, SIGN, ZERO, A, B, Form, at_places, operand

_B_REGISTER = {1: "bl", 2: "bx", 4: "ebx", 8: "rbx"}
_C_REGISTER = {1: "cl", 2: "cx", 4: "ecx", 8: "rcx"}
_SHIFTED = ADJUST | OVERFLOW
_ALL_BUT_CARRY = ALL_FLAGS & ~CARRY
_BITS = OVERFLOW | SIGN | ADJUST | PARITY
_SEARCH = CARRY | OVERFLOW | SIGN | ADJUST | PARITY
_COUNT = OVERFLOW | SIGN | ADJUST | PARITY  # after LZCNT and TZCNT


def _each(mnemonic, code, widths, **rest):
    """Return the forms of an instruction for all widths; `{r}` and `{c}` in its code are registers of that width."""
    forms = []
    for width in widths:
        assembly = code.replace("{r}", _B_REGISTER[width]).replace("{c}", _C_REGISTER[width])
        forms += at_places(f"{mnemonic} {8 * width}", assembly, width, **rest)
    return forms


def _loads():
    for name in ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp"):
        undefined = ADJUST if name in ("or", "and", "xor") else 0
        yield from _each(
            f"{name} r,m", f"{name} {{r}}, {{m}}", (1, 2, 4, 8), flags=CARRY, undefined=undefined
        )
    yield from _each("mov r,m", "mov {r}, {m}", (1, 2, 4, 8), quick=True)
    yield from _each("test m,r", "test {m}, {r}", (1, 2, 4, 8), undefined=ADJUST)
    yield from _each("cmp m,i", "cmp {m}, 77", (1, 2, 4, 8))
    for name in ("cmovc", "cmovnc"):
        yield from _each(
            f"{name} taken" if name == "cmovc" else f"{name} not taken",
            f"{name} {{r}}, {{m}}",
            (2, 4, 8),
            flags=CARRY,
        )
    for width in (1, 2, 4):
        for name in ("movzx", "movsx") if width < 4 else ("movsxd",):
            yield from at_places(f"{name} from {8 * width}", f"{name} rbx, {{m}}", width)
    yield from _each("bt m,i", "bt {m}, 11", (2, 4, 8), undefined=_BITS)
    for name in ("bsf", "bsr"):
        yield from _each(name, f"{name} {{r}}, {{m}}", (2, 4, 8), undefined=_SEARCH)
    yield from _each("bsf of 0", "bsf {r}, {m}", (4, 8), undefined=_SEARCH, content=0)
    yield from _each("lzcnt", "lzcnt {r}, {m}", (2, 4, 8), undefined=_COUNT, needs=("abm",), quick=True)
    yield from _each("tzcnt", "tzcnt {r}, {m}", (2, 4, 8), undefined=_COUNT, needs=("bmi1",), quick=True)
    yield from _each("popcnt", "popcnt {r}, {m}", (2, 4, 8), needs=("popcnt",))
    yield from _each("movbe r,m", "movbe {r}, {m}", (2, 4, 8), needs=("movbe",), quick=True)
    for width in (1, 2, 4, 8):
        into = "rbx" if width == 8 else "ebx"
        yield from at_places(f"crc32 of {8 * width}", f"crc32 {into}, {{m}}", width, needs=("sse4_2",))
    for name in ("adcx", "adox"):
        yield from _each(name, f"{name} {{r}}, {{m}}", (4, 8), flags=CARRY | OVERFLOW, needs=("adx",))
    # Segment-relative, 32-bit addresses, absolute addresses of 64 bits, XLAT
    yield Form("mov through FS", "mov rbx, fs:[0x40]", fs_base=A)
    yield Form("mov through FS and a register", "mov rbx, fs:[rcx]", fs_base=A, registers={"rcx": 0x48})
    yield Form("lock xadd through FS", "lock xadd fs:[0x40], rbx", fs_base=A)
    from_base = f"mov rcx, gs:[SELF]; neg rcx; mov rbx, gs:[rcx + {A + 0x40:#x}]"
    yield Form("mov through GS", f"{from_base}; mov ecx, 0; cmp ecx, ecx")
    yield Form(
        "mov with 32-bit address", "mov rbx, [ecx + 0x40]", registers={"rcx": 0x7777_0000_0000_0000 | A}
    )
    yield Form("mov with scaled index", "mov rbx, [rcx + 8*rdx + 0x40]", registers={"rcx": A, "rdx": 9})
    for width, into in ((1, "al"), (2, "ax"), (4, "eax"), (8, "rax")):
        yield Form(f"mov moffs load {8 * width}", f"movabs {into}, [{A + 0x40:#x}]")
        yield Form(f"mov moffs store {8 * width}", f"movabs [{A + 0x40:#x}], {into}")
    yield Form("xlat", "xlatb", registers={"rbx": A + 0x40, "rax": 0x11})


def _three_operands():
    for name in ("andn", "pdep", "pext"):
        needs = ("bmi1",) if name == "andn" else ("bmi2",)
        undefined = ADJUST | PARITY if name == "andn" else 0
        yield from _each(name, f"{name} {{r}}, {{c}}, {{m}}", (4, 8), needs=needs, undefined=undefined)
    for name in ("bextr", "bzhi", "sarx", "shlx", "shrx"):
        needs = ("bmi1",) if name == "bextr" else ("bmi2",)
        undefined = ADJUST | SIGN | PARITY if name in ("bextr", "bzhi") else 0
        yield from _each(
            name,
            f"{name} {{r}}, {{m}}, {{c}}",
            (4, 8),
            needs=needs,
            undefined=undefined,
            registers={"rcx": 0x0905},
        )
    yield from _each("rorx", "rorx {r}, {m}, 9", (4, 8), needs=("bmi2",))
    yield from _each("mulx", "mulx {r}, {c}, {m}", (4, 8), needs=("bmi2",))
    for name in ("blsi", "blsr", "blsmsk"):
        yield from _each(name, f"{name} {{r}}, {{m}}", (4, 8), needs=("bmi1",), undefined=ADJUST | PARITY)


def _multiply_and_divide():
    for name in ("mul", "imul"):
        undefined = SIGN | ZERO | ADJUST | PARITY
        yield from _each(f"{name} m", f"{name} {{m}}", (1, 2, 4, 8), undefined=undefined)
    yield from _each("imul r,m", "imul {r}, {m}", (2, 4, 8), undefined=SIGN | ZERO | ADJUST | PARITY)
    yield from _each("imul r,m,i", "imul {r}, {m}, 77", (2, 4, 8), undefined=SIGN | ZERO | ADJUST | PARITY)
    for name in ("div", "idiv"):
        registers = {"rax": 0x45, "rdx": 0}
        yield from _each(f"{name} m", f"{name} {{m}}", (1, 2, 4, 8), undefined=ALL_FLAGS, registers=registers)


def _stores():
    yield from _each("mov m,r", "mov {m}, {r}", (1, 2, 4, 8), quick=True)
    yield from _each("mov m,i", "mov {m}, 77", (1, 2, 4, 8))
    yield from _each("movnti", "movnti {m}, {r}", (4, 8))
    yield from _each("movbe m,r", "movbe {m}, {r}", (2, 4, 8), needs=("movbe",))
    yield from _each("movdiri", "movdiri {m}, {r}", (4, 8), needs=("movdiri",))
    for name, flags in (("setc", CARRY), ("setnc", CARRY), ("seto", 0), ("setle", ZERO)):
        yield from _each(f"{name} m", f"{name} {{m}}", (1,), flags=flags)


def _read_modify_write():
    for lock in ("", "lock "):
        rest = {"locked": bool(lock)}
        for name in ("add", "or", "adc", "sbb", "and", "sub", "xor"):
            undefined = ADJUST if name in ("or", "and", "xor") else 0
            quick = name == "add"
            code = f"{lock}{name} {{m}}, "
            yield from _each(
                f"{lock}{name} m,r",
                code + "{r}",
                (1, 2, 4, 8),
                flags=CARRY,
                undefined=undefined,
                quick=quick,
                **rest,
            )
            yield from _each(
                f"{lock}{name} m,i", code + "77", (1, 2, 4, 8), flags=CARRY, undefined=undefined, **rest
            )
        for name in ("inc", "dec", "not", "neg"):
            yield from _each(f"{lock}{name} m", f"{lock}{name} {{m}}", (1, 2, 4, 8), flags=CARRY, **rest)
        yield from _each(f"{lock}xadd", f"{lock}xadd {{m}}, {{r}}", (1, 2, 4, 8), quick=True, **rest)
        yield from _compare_and_exchange(lock)
        for name in ("bts", "btr", "btc"):
            yield from _each(
                f"{lock}{name} m,i", f"{lock}{name} {{m}}, 11", (2, 4, 8), undefined=_BITS, **rest
            )
    yield from _each("xchg", "xchg {m}, {r}", (1, 2, 4, 8), locked=True, quick=True)
    for name in ("rol", "ror", "rcl", "rcr", "shl", "shr", "sar"):
        rotates = name in ("rol", "ror", "rcl", "rcr")
        for count, undefined in (
            ("1", 0 if rotates else ADJUST),
            ("5", OVERFLOW if rotates else _SHIFTED),
            ("cl", OVERFLOW if rotates else _SHIFTED),
        ):
            widths = (1, 2, 4, 8) if count == "cl" else (4, 8)
            yield from _each(
                f"{name} m,{count}",
                f"{name} {{m}}, {count}",
                widths,
                flags=CARRY,
                undefined=undefined,
                registers={"rcx": 3},
            )
    for name in ("shld", "shrd"):
        for count in ("5", "cl"):
            yield from _each(
                f"{name} m,r,{count}",
                f"{name} {{m}}, {{r}}, {count}",
                (2, 4, 8),
                undefined=_SHIFTED,
                registers={"rcx": 3},
            )


def _compare_and_exchange(lock):
    rest = {"locked": bool(lock), "quick": bool(lock)}
    held = 0x99AA_BBCC_DDEE_FF00_1122_3344_5566_7788
    for width in (1, 2, 4, 8):
        content = held % (1 << 8 * width)
        for how, accumulator in (("equal", held % (1 << 64)), ("unequal", 1), ("zero", 0)):
            code = f"{lock}cmpxchg {{m}}, {_B_REGISTER[width]}"
            registers = {"rax": accumulator}
            yield from at_places(
                f"{lock}cmpxchg {how} {8 * width}", code, width, content=content, registers=registers, **rest
            )
    for name, width, needs in (("cmpxchg8b", 8, ()), ("cmpxchg16b", 16, ("cx16",))):
        content, half = held % (1 << 8 * width), 4 * width
        for how, low in (("equal", content % (1 << half)), ("unequal", 1)):
            registers = {"rbx": 0xB0B, "rcx": 0xC0C, "rax": low, "rdx": content >> half}
            yield from at_places(
                f"{lock}{name} {how}",
                f"{lock}{name} {{m}}",
                width,
                content=content,
                aligned_only=width == 16,
                registers=registers,
                needs=needs,
                **rest,
            )


def _bit_strings():
    """Bit tests whose register says which bit of the whole memory: another page than the operand's address."""
    for width in (2, 4, 8):
        bits = {"into the next page": 8 * 4096 + 21, "into the page before": -8 * 0x800 - 3, "here": 75}
        for where, bit in bits.items():
            address, letters = (
                (B + 0x40, "A") if "before" in where else (A + 0x40, "B" if "next" in where else "A")
            )
            register = _B_REGISTER[width]
            if width == 2 and "next" in where:
                address, bit = B - 0x100, 0x900
            for name in ("bt", "bts", "btr", "btc", "lock bts", "lock btc"):
                code = f"{name} {operand(width, address)}, {register}"
                yield Form(
                    f"{name} m,r {8 * width} {where}",
                    code,
                    (letters,),
                    registers={"rbx": bit},
                    undefined=_BITS,
                    locked="lock" in name,
                )


def _forms():
    yield from _loads()
    yield from _three_operands()
    yield from _multiply_and_divide()
    yield from _stores()
    yield from _read_modify_write()
    yield from _bit_strings()


FORMS = list(_forms())
