"""String instructions, in memory and to and from a port: every width, both ways, a border in between."""

from dataclasses import dataclass

from ..exchange import DATA_PORT, pattern
from ..form import DIRECTION, EITHER_OR_BOTH, WINDOW, A, B, C, D, Form

_LETTER = {1: "b", 2: "w", 4: "d", 8: "q"}
_COUNT = 12
_BEFORE = 5  # items in the page where a string begins
_SOUGHT = 0x4141_4141_4141_4141  # of which every part is the same

_SOURCE, _DESTINATION = "rsi", "rdi"
_BORDERS = {_SOURCE: B, _DESTINATION: D}
_ENDS = {
    "movs": (_SOURCE, _DESTINATION),
    "cmps": (_SOURCE, _DESTINATION),
    "lods": (_SOURCE,),
    "outs": (_SOURCE,),
    "stos": (_DESTINATION,),
    "scas": (_DESTINATION,),
    "ins": (_DESTINATION,),
}
_ABSENT = {
    (_SOURCE,): EITHER_OR_BOTH,
    (_DESTINATION,): ("C", "D", "CD"),
    (_SOURCE, _DESTINATION): ("A", "B", "AB", "C", "D", "CD", "ABCD", "AC", "BD", "AD", "BC"),
}


@dataclass(frozen=True)
class _Shape:
    """How a string lies: items of `width` bytes over the border, `skew` bytes off it, upwards or `backwards`."""

    width: int
    backwards: bool
    skew: int

    def item(self, border: int, index: int) -> int:
        """Return the address of item `index` of the string at `border`."""
        if self.backwards:
            return border + (_BEFORE - 1 - index) * self.width + self.skew
        return border - (_BEFORE - index) * self.width + self.skew

    def form(self, prefix: str, mnemonic: str, how: str = "", registers=(), **rest) -> Form:
        """Return a form of a string instruction, with or without a prefix."""
        ends = _ENDS[mnemonic]
        code = f"{prefix}{mnemonic}{_LETTER[self.width]}"
        words = [code, how, "backwards" * self.backwards, "unaligned" * bool(self.skew)]
        starts = {end: self.item(_BORDERS[end], 0) for end in ends}
        flags = DIRECTION if self.backwards else 0
        return Form(
            " ".join(filter(None, words)),
            code,
            **{"absent": _ABSENT[ends], **rest},
            registers={"rcx": _COUNT, "rdx": DATA_PORT, **starts, **dict(registers)},
            flags=flags,
        )


def _shapes(widths):
    return [
        _Shape(width, backwards, skew)
        for width in widths
        for backwards in (False, True)
        for skew in ((0, 1) if width > 1 else (0,))
    ]


def _repeated(shape):
    for mnemonic in ("movs", "stos", "lods"):
        yield shape.form("rep ", mnemonic, quick=shape.width == 4 and not shape.skew)
    yield shape.form("rep ", "movs", "of none", {"rcx": 0}, absent=("ABCD",))
    equal = {shape.item(D, index): _bytes_at(shape.item(B, index), shape.width) for index in range(_COUNT)}
    yield shape.form("repe ", "cmps", "all equal", memory=equal)
    yield shape.form("repe ", "cmps", "found", memory=dict(list(equal.items())[:-2]))
    yield shape.form("repne ", "cmps", absent=("ABCD", "A", "C", "AC", "BD"))
    sought = {
        shape.item(D, index): _SOUGHT.to_bytes(8, "little")[: shape.width] for index in range(_COUNT - 2)
    }
    yield shape.form("repe ", "scas", "found", {"rax": _SOUGHT}, memory=sought)
    yield shape.form("repne ", "scas", "not found", {"rax": ~_SOUGHT}, memory=sought)
    found = int.from_bytes(_bytes_at(shape.item(D, _BEFORE + 3), shape.width), "little")
    yield shape.form("repne ", "scas", "found", {"rax": found})


def _bytes_at(address: int, length: int) -> bytes:
    """Return what the pattern has there."""
    return pattern()[address - WINDOW :][:length]


def _repeated_port(shape):
    for mnemonic in ("ins", "outs"):
        yield shape.form("rep ", mnemonic, quick=not shape.skew)


def _single(width, mnemonic):
    """Return one item, of more than one byte across the border, both ways."""
    first = {_SOURCE: "A", _DESTINATION: "C"}
    ends = _ENDS[mnemonic]
    for backwards in (False, True):
        yield _Shape(width, backwards, 0).form(
            "",
            mnemonic,
            registers={end: _BORDERS[end] - 0x40 for end in ends},
            absent=tuple(
                letters for letters in _ABSENT[ends] if set(letters) <= {first[end] for end in ends}
            ),
        )
        if width > 1:
            across = {end: _BORDERS[end] - width // 2 for end in ends}
            yield _Shape(width, backwards, 0).form("", mnemonic, "across", across)


def _long_input():
    """More input than one exit brings."""
    for backwards in (False, True):
        flags = DIRECTION if backwards else 0
        start = D + 0x500 if backwards else D - 0x500
        registers = {"rdi": start, "rcx": 0xA00, "rdx": DATA_PORT}
        yield Form(
            f"rep insb long{' backwards' * backwards}",
            "rep insb",
            ("C", "D", "CD"),
            registers=registers,
            flags=flags,
        )
        registers = {"rsi": B + 0x500 if backwards else B - 0x500, "rcx": 0xA00, "rdx": DATA_PORT}
        yield Form(
            f"rep outsb long{' backwards' * backwards}",
            "rep outsb",
            EITHER_OR_BOTH,
            registers=registers,
            flags=flags,
        )


def _others():
    rest = {"rsi": A + 0x40, "rdi": C + 0x40, "rcx": 4}
    yield Form(
        "rep movsb through FS",
        "rep movs byte ptr es:[rdi], byte ptr fs:[rsi]",
        ("A", "C", "AC"),
        registers={**rest, "rsi": 0x40},
        fs_base=A,
    )
    yield Form(
        "rep movsd with 32-bit addresses",
        "addr32 rep movsd",
        ("A", "C", "AC"),
        registers={name: value | 0x7777 << 32 for name, value in rest.items()},
    )
    yield Form(
        "rep movsq overlapping",
        "rep movsq",
        EITHER_OR_BOTH,
        registers={"rsi": B - 40, "rdi": B - 32, "rcx": 12},
    )
    yield Form(
        "rep movsb long",
        "rep movsb",
        ("A", "B", "C", "D", "AB", "CD", "ABCD"),
        registers={"rsi": B - 0x800, "rdi": D - 0x7F0, "rcx": 0x1000},
    )
    yield Form("rep stosq long", "rep stosq", ("C", "D", "CD"), registers={"rdi": D - 0x800, "rcx": 0x200})


FORMS = [
    *(form for shape in _shapes((1, 2, 4, 8)) for form in _repeated(shape)),
    *(form for shape in _shapes((1, 2, 4)) for form in _repeated_port(shape)),
    *(
        form
        for mnemonic in _ENDS
        for width in ((1, 2, 4) if mnemonic in ("ins", "outs") else (1, 2, 4, 8))
        for form in _single(width, mnemonic)
    ),
    *_long_input(),
    *_others(),
]
