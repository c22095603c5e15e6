"""String instructions, in memory and to and from a port: every width, both ways, a border in between."""

from ..exchange import DATA_PORT, pattern
from ..form import DIRECTION, EITHER_OR_BOTH, WINDOW, A, B, C, D, Form

_LETTER = {1: "b", 2: "w", 4: "d", 8: "q"}
_COUNT = 12
_BEFORE = 5  # items in the first page


def _start(second: int, width: int, backwards: bool, skew: int) -> int:
    """Return where a string of _COUNT items begins that goes over the border at `second`; `skew` bytes off it."""
    if backwards:
        return second + (_BEFORE - 1) * width + skew
    return second - _BEFORE * width + skew


def _each(name, code, width, *, source, destination, skew, absent, backwards=False, **rest):
    registers = {"rcx": _COUNT, "rdx": DATA_PORT, **rest.pop("registers", {})}
    if source:
        registers["rsi"] = _start(B, width, backwards, skew)
    if destination:
        registers["rdi"] = _start(D, width, backwards, skew)
    flags = rest.pop("flags", 0) | (DIRECTION if backwards else 0)
    how = " backwards" * backwards + " unaligned" * bool(skew)
    return Form(f"{name}{how}", code, absent, registers=registers, flags=flags, **rest)


def _variants(width):
    """Return the directions and skews that a width has."""
    skews = (0, 1) if width > 1 else (0,)
    return [(backwards, skew) for backwards in (False, True) for skew in skews]


_ONE = {"source": True, "destination": False}, EITHER_OR_BOTH
_OTHER = {"source": False, "destination": True}, ("C", "D", "CD")
_TWO = {"source": True, "destination": True}, ("A", "B", "AB", "C", "D", "CD", "ABCD", "AC", "BD", "AD", "BC")


def _moves(width):
    letter = _LETTER[width]
    for backwards, skew in _variants(width):
        for code, (ends, absent) in (
            (f"movs{letter}", _TWO),
            (f"stos{letter}", _OTHER),
            (f"lods{letter}", _ONE),
        ):
            rest = {"width": width, "skew": skew, "backwards": backwards, "absent": absent, **ends}
            yield _each(f"rep {code}", f"rep {code}", quick=width == 4 and not skew, **rest)
            few = tuple(
                letters for letters in absent if letters in ("A", "C", "AC", "B", "D", "BD", "CD", "AB")
            )
            yield _each(code, code, **{**rest, "absent": few})
        yield _each(
            f"rep movs{letter} of none",
            f"rep movs{letter}",
            width,
            skew=skew,
            backwards=backwards,
            absent=("ABCD",),
            source=True,
            destination=True,
            registers={"rcx": 0},
        )


def _same_bytes(width, backwards, skew):
    """Return what to put at the destination for it to be as the source, all but the item before the last."""
    source, destination = (_start(border, width, backwards, skew) for border in (B, D))
    step = -width if backwards else width
    memory = {}
    for index in range(_COUNT):
        at = source + index * step - WINDOW
        memory[destination + index * step] = pattern()[at : at + width]
    return memory


def _item(width, backwards, skew, index):
    at = _start(D, width, backwards, skew) + index * (-width if backwards else width) - WINDOW
    return int.from_bytes(pattern()[at : at + width], "little")


def _comparisons(width):
    letter = _LETTER[width]
    for backwards, skew in _variants(width):
        rest = {"width": width, "skew": skew, "backwards": backwards}
        ends, absent = _TWO
        equal = _same_bytes(width, backwards, skew)
        different = dict(list(equal.items())[:-2])
        yield _each(
            f"repe cmps{letter} all equal", f"repe cmps{letter}", memory=equal, absent=absent, **ends, **rest
        )
        yield _each(
            f"repe cmps{letter} found", f"repe cmps{letter}", memory=different, absent=absent, **ends, **rest
        )
        yield _each(f"repne cmps{letter}", f"repne cmps{letter}", absent=("ABCD", "AC", "BD"), **ends, **rest)
        yield _each(f"cmps{letter}", f"cmps{letter}", absent=("A", "C", "AC"), **ends, **rest)
        ends, absent = _OTHER
        found = {"rax": _item(width, backwards, skew, _BEFORE + 3)}
        yield _each(
            f"repne scas{letter} found", f"repne scas{letter}", registers=found, absent=absent, **ends, **rest
        )
        yield _each(
            f"repne scas{letter} not found",
            f"repne scas{letter}",
            registers={"rax": 0},
            absent=absent,
            **ends,
            **rest,
        )
        yield _each(
            f"repe scas{letter}",
            f"repe scas{letter}",
            registers={"rax": 0},
            absent=("CD", "C", "D"),
            **ends,
            **rest,
        )
        yield _each(f"scas{letter}", f"scas{letter}", absent=("C", "D"), **ends, **rest)


def _port(width):
    letter = _LETTER[width]
    for backwards, skew in _variants(width):
        rest = {"width": width, "skew": skew, "backwards": backwards}
        for code, (ends, absent) in ((f"ins{letter}", _OTHER), (f"outs{letter}", _ONE)):
            yield _each(f"rep {code}", f"rep {code}", absent=absent, quick=not skew, **ends, **rest)
            yield _each(code, code, absent=(*absent[:1], absent[-1]), **ends, **rest)


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
    *(form for width in (1, 2, 4, 8) for kind in (_moves, _comparisons) for form in kind(width)),
    *(form for width in (1, 2, 4) for form in _port(width)),
    *_long_input(),
    *_others(),
]
