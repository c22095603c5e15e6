"""SSE, AVX and x87: loads and stores, with alignment and without, masked, gathered, and whole states."""

from ..exchange import FX_STATE
from ..form import EITHER_OR_BOTH, A, B, C, E, Form, at_places

_AVX = ("avx",)
_AVX2 = ("avx2",)
_INDICES = E + 0x100  # of gathers


def _sse():
    for name in ("movups", "movupd", "movdqu", "lddqu"):
        yield from at_places(f"{name} load", f"{name} xmm1, {{m}}", 16, quick=name == "movups")
    for name in ("movups", "movdqu"):
        yield from at_places(f"{name} store", f"{name} {{m}}, xmm1", 16, quick=name == "movups")
    for name in ("movaps", "movapd", "movdqa", "movntdqa"):
        yield from at_places(f"{name} load", f"{name} xmm2, {{m}}", 16, aligned_only=True)
    for name in ("movaps", "movdqa", "movntps", "movntdq"):
        yield from at_places(f"{name} store", f"{name} {{m}}, xmm2", 16, aligned_only=True)
    for name, width in (
        ("movss", 4),
        ("movsd", 8),
        ("movd", 4),
        ("movq", 8),
        ("movlps", 8),
        ("movhps", 8),
        ("movlpd", 8),
        ("movhpd", 8),
    ):
        yield from at_places(f"{name} load", f"{name} xmm3, {{m}}", width)
        yield from at_places(f"{name} store", f"{name} {{m}}, xmm3", width)
    for name in ("paddd", "pxor", "addps", "mulpd", "pshufb", "pcmpeqd", "pmulld", "pclmulqdq"):
        immediate = ", 0x11" if name == "pclmulqdq" else ""
        yield from at_places(f"{name} load", f"{name} xmm4, {{m}}{immediate}", 16, aligned_only=True)
    for name, width in (
        ("addss", 4),
        ("addsd", 8),
        ("sqrtsd", 8),
        ("cvtsi2sd xmm5, {m}", 8),
        ("cvttsd2si rbx, {m}", 8),
        ("ucomisd", 8),
        ("pmovzxbw", 8),
    ):
        code = name if "{m}" in name else f"{name} xmm5, {{m}}"
        yield from at_places(f"{name.split()[0]} load", code, width)
    for name, width in (("pinsrb", 1), ("pinsrw", 2), ("pinsrd", 4), ("pinsrq", 8)):
        yield from at_places(f"{name}", f"{name} xmm6, {{m}}, 1", width)
        yield from at_places(
            f"{name.replace('ins', 'ext')}", f"{name.replace('ins', 'ext')} {{m}}, xmm6, 1", width
        )
    for name, registers in (("maskmovdqu", {"rdi": A + 0x43}), ("maskmovdqu across", {"rdi": B - 7})):
        absent = EITHER_OR_BOTH if "across" in name else ("A",)
        yield Form(name, "maskmovdqu xmm1, xmm2", absent, registers=registers)
    yield from at_places("movq mm load", "movq mm1, {m}", 8)
    yield from at_places("movq mm store", "movq {m}, mm1", 8)


def _avx():
    for width, register in ((16, "xmm"), (32, "ymm")):
        rest = {"needs": _AVX}
        yield from at_places(
            f"vmovups load {8 * width}", f"vmovups {register}1, {{m}}", width, quick=True, **rest
        )
        yield from at_places(
            f"vmovups store {8 * width}", f"vmovups {{m}}, {register}1", width, quick=True, **rest
        )
        yield from at_places(
            f"vmovaps load {8 * width}", f"vmovaps {register}1, {{m}}", width, aligned_only=True, **rest
        )
        yield from at_places(
            f"vmovaps store {8 * width}", f"vmovaps {{m}}, {register}1", width, aligned_only=True, **rest
        )
        yield from at_places(f"vaddps {8 * width}", f"vaddps {register}1, {register}2, {{m}}", width, **rest)
        yield from at_places(
            f"vpaddd {8 * width}", f"vpaddd {register}1, {register}2, {{m}}", width, needs=_AVX2
        )
        yield from at_places(
            f"vfmadd {8 * width}", f"vfmadd231ps {register}1, {register}2, {{m}}", width, needs=("fma",)
        )
        for name in ("vmaskmovps", "vpmaskmovd", "vpmaskmovq"):
            needs = _AVX if name == "vmaskmovps" else _AVX2
            yield from at_places(
                f"{name} load {8 * width}", f"{name} {register}1, {register}2, {{m}}", width, needs=needs
            )
            yield from at_places(
                f"{name} store {8 * width}", f"{name} {{m}}, {register}2, {register}1", width, needs=needs
            )
    for name, width in (("vbroadcastss", 4), ("vbroadcastsd", 8), ("vbroadcastf128", 16)):
        yield from at_places(name, f"{name} ymm1, {{m}}", width, needs=_AVX)
    yield from at_places("vinsertf128", "vinsertf128 ymm1, ymm2, {m}, 1", 16, needs=_AVX)
    yield from at_places("vextractf128", "vextractf128 {m}, ymm2, 1", 16, needs=_AVX)
    yield from at_places("vcvtph2ps", "vcvtph2ps xmm1, {m}", 8, needs=("f16c",))
    yield from at_places("vmovhps", "vmovhps xmm1, xmm2, {m}", 8, needs=_AVX)


def _gathers():
    """Gathers whose lanes lie in one page, in two, over the border, and in three; also with half of them masked."""
    other = C - A
    lanes = {
        "in one page": (("A",), (0x40, 0x80, 0x20, 0x400)),
        "in two pages": (EITHER_OR_BOTH, (0x40, 0x1040, 0x80, 0x1080)),
        "over the border": (EITHER_OR_BOTH, (0xFFE, 0xFFD, 0xFFF, 0xFFC)),
        "in three pages": (("AC", "ABC", "B", "C"), (0x40, 0x1040, other + 0x80, other + 0xC0)),
    }
    for where, (absent, offsets) in lanes.items():
        for name, width in (
            ("vpgatherdd", 4),
            ("vgatherdps", 4),
            ("vpgatherdq", 4),
            ("vpgatherqq", 8),
            ("vgatherqpd", 8),
        ):
            yield _gather(f"{name} {where}", name, width, offsets, absent, quick=where == "in two pages")
        half = "; vpsrldq xmm3, xmm3, 8"
        yield _gather(f"vpgatherdd half {where}", "vpgatherdd", 4, offsets, absent, mask=half)


def _gather(title, mnemonic, width, offsets, absent, mask="", **rest):
    """Return a gather of lanes at `offsets` from A, with indices of `width` bytes."""
    indices = b"".join((each % (1 << 8 * width)).to_bytes(width, "little") for each in offsets)[:16]
    code = (
        f"movdqu xmm2, [{_INDICES:#x}]; vpcmpeqd xmm3, xmm3, xmm3{mask}; {mnemonic} xmm1, [rbx + xmm2], xmm3"
    )
    return Form(title, code, absent, registers={"rbx": A}, memory={_INDICES: indices}, needs=_AVX2, **rest)


def _x87():
    for name, width in (
        ("fld m32", 4),
        ("fld m64", 8),
        ("fld m80", 10),
        ("fild m16", 2),
        ("fild m32", 4),
        ("fild m64", 8),
        ("fbld", 10),
        ("fadd m32", 4),
        ("fmul m64", 8),
        ("fiadd m32", 4),
        ("fcom m64", 8),
        ("ficomp m16", 2),
    ):
        yield from at_places(name, f"{name.split()[0]} {{m}}", width)
    for name, width in (
        ("fst m32", 4),
        ("fstp m64", 8),
        ("fstp m80", 10),
        ("fist m16", 2),
        ("fistp m64", 8),
        ("fisttp m32", 4),
        ("fbstp", 10),
    ):
        yield from at_places(name, f"{name.split()[0]} {{m}}", width)
    for place, absent in ((A + 0x40, ("A",)), (B - 1, EITHER_OR_BOTH)):
        where = " across" if absent is EITHER_OR_BOTH else ""
        yield Form(f"fnstcw{where}", f"fnstcw [{place:#x}]", absent)
        yield Form(f"fnstsw{where}", f"fnstsw [{place:#x}]", absent)
        yield Form(f"fldcw{where}", f"fldcw [{place:#x}]", absent, memory={place: b"\x7f\x02"})
        yield Form(f"ldmxcsr{where}", f"ldmxcsr [{place:#x}]", absent, memory={place: b"\xa1\x9f\0\0"})
        yield Form(f"stmxcsr{where}", f"stmxcsr [{place:#x}]", absent)
    for place, where, absent in ((A + 0x80, "", ("A",)), (B - 0x40, " across", EITHER_OR_BOTH)):
        # Where the last x87 instruction was, and its operand: a kernel that runs another task need not keep it.
        pointers = ((place + 12, 16),)
        yield Form(
            f"fnsave{where}", f"fnsave [{place:#x}]; frstor [{place:#x}]", absent, leaves_open=pointers
        )
        pointers = ((place + 0x30 + 12, 16),)
        code = f"fnstenv [{place + 0x30:#x}]; fldenv [{place + 0x30:#x}]"
        yield Form(f"fnstenv{where}", code, absent, leaves_open=pointers)
        loaded = bytearray(FX_STATE)
        loaded[160:416] = bytes(reversed(loaded[160:416]))
        yield Form(f"fxsave{where}", f"fxsave [{place:#x}]", absent, quick=True)
        through_fs = {"absent": absent, "fs_base": place}
        yield Form(f"fxsave through FS{where}", "fxsave fs:[0]", **through_fs)
        yield Form(
            f"fxrstor through FS{where}", "fxrstor fs:[0]", memory={place: bytes(loaded)}, **through_fs
        )
        yield Form(f"fxsave64{where}", f"fxsave64 [{place:#x}]", absent)
        yield Form(
            f"fxrstor{where}", f"fxrstor [{place:#x}]", absent, memory={place: bytes(loaded)}, quick=True
        )
        mask = {"rax": 7, "rdx": 0}
        for name in ("xsave", "xsaveopt", "xsavec"):
            header = {place + 512: bytes(64)}
            yield Form(
                f"{name}{where}", f"{name} [{place:#x}]", absent, registers=mask, memory=header, needs=(name,)
            )
        image = {place: bytes(loaded), place + 512: (3).to_bytes(8, "little") + bytes(56)}
        yield Form(
            f"xrstor{where}", f"xrstor [{place:#x}]", absent, registers=mask, memory=image, needs=("xsave",)
        )


FORMS = [*_sse(), *_avx(), *_gathers(), *_x87()]
