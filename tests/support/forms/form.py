"""What a form is: code, what its registers and memory hold before it, and which pages may be absent.

RAM that forms use is eight pages, named by letters. The letters of a pair are neighbours: A and B the first operand's,
with the border of two memslot regions of 2 MiB between them; C and D a second operand's; S and T the stack's; E and F
those of code.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

PAGE = 4096
WINDOW = (2 << 20) - 3 * PAGE
LETTERS = "CDABSTEF"
WINDOW_BYTES = len(LETTERS) * PAGE
A, B, C, D, S, T, E, F = (WINDOW + LETTERS.index(letter) * PAGE for letter in "ABCDSTEF")
MEMORY = 4 << 20  # all of RAM: what lies behind it is not mapped
STACK = S + 0x800  # RSP, where a form does not say

CARRY, PARITY, ADJUST, ZERO, SIGN, TRAP, DIRECTION, OVERFLOW = (1 << n for n in (0, 2, 4, 6, 7, 8, 10, 11))
ALL_FLAGS = CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW

REGISTERS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *(f"r{number}" for number in range(8, 16)),
)
LANDED = 0x600D  # in R15 after a jump to Symbol.LANDING


class Symbol(Enum):
    """A value that is known when the form is run."""

    LANDING = "where the code goes on with another R15"
    CODE = "the selector in CS"
    DATA = "the selector in SS"


Value = int | Symbol


@dataclass(frozen=True)
class Form:
    """An instruction, or a few, in one of its forms.

    `code` is in Intel syntax; `{here}` in it is what to add to the address of a RIP-relative operand if `at` says that
    the code lies in RAM. `absent` has for each case the letters of the pages that are absent. `registers` and `flags`
    are what differs from those that every form begins with; `memory` what differs from the pattern in the eight pages:
    bytes, or a value of 8 bytes, by address. `undefined` flags are not compared. `needs` are flags of /proc/cpuinfo.
    `fs_base` is the base of FS, if not 0.
    `delivers` says that an event's frame goes to memory that is absent; `leaves_open` is what is not compared of the
    eight pages: address and number of bytes.
    Two vCPUs run it at the same time unless it is to be `alone`; `locked` says that then it is one step in memory.
    `quick` ones are run where there is little time.
    """

    name: str
    code: str
    absent: tuple[str, ...] = ("A",)
    registers: Mapping[str, Value] = field(default_factory=dict)
    memory: Mapping[int, bytes | Value] = field(default_factory=dict)
    flags: int = 0
    undefined: int = 0
    needs: tuple[str, ...] = ()
    delivers: bool = False
    leaves_open: tuple[tuple[int, int], ...] = ()
    rings: tuple[int, ...] = (3, 0)
    at: int | None = None
    fs_base: int = 0
    locked: bool = False
    alone: bool = False
    quick: bool = False

    def __post_init__(self):
        assert self.absent, f"{self.name} has no case"
        assert self.registers.keys() <= set(REGISTERS), f"{self.name} names a register that is none"
        assert set("".join(self.absent)) <= set(LETTERS), f"{self.name} names a page that is none"

    def but(self, **changes) -> "Form":
        """Return this form with changes."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Case:
    """A form with the pages `absent` when it begins."""

    form: Form
    absent: str

    @property
    def name(self) -> str:
        return f"{self.form.name} [{self.absent}]"


def cases_of(forms) -> Iterator[Case]:
    """Return the cases of forms, in order."""
    return (Case(form, absent) for form in forms for absent in form.absent)


# What the families share

POINTER = {
    1: "byte ptr",
    2: "word ptr",
    4: "dword ptr",
    8: "qword ptr",
    10: "tbyte ptr",
    16: "xmmword ptr",
    32: "ymmword ptr",
}
EITHER_OR_BOTH = ("A", "B", "AB")


def operand(width: int, address: int, segment: str = "") -> str:
    """Return the operand of `width` bytes at an absolute address."""
    return f"{POINTER[width]} {segment}[{address:#x}]"


@dataclass(frozen=True)
class Place:
    """Where an operand lies: its name, its address, and which of its pages may be absent."""

    name: str
    address: int
    absent: tuple[str, ...]


def places(width: int, *, aligned_only: bool = False) -> list[Place]:
    """Return where an operand of `width` bytes is put: aligned within a page, unaligned, and across a page border."""
    found = [Place("", A + 0x40, ("A",))]
    if width > 1 and not aligned_only:
        found.append(Place("across", B - width // 2, EITHER_OR_BOTH))
        if width > 2:
            found.append(Place("last byte across", B - width + 1, ("AB",)))
    return found


def at_places(
    name: str, code: str, width: int, *, content: int | None = None, aligned_only: bool = False, **rest
) -> list[Form]:
    """Return a form for each place of its operand, which `{m}` in `code` stands for, and which holds `content`."""
    return [
        Form(
            " ".join(filter(None, (name, place.name))),
            code.replace("{m}", operand(width, place.address)),
            place.absent,
            memory={} if content is None else {place.address: content.to_bytes(width, "little")},
            **rest,
        )
        for place in places(width, aligned_only=aligned_only)
    ]
