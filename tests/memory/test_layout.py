import pytest

from kvmdp.memory.layout import GuestLayout, Region
from kvmdp.size import format_size, parse_size

MiB = 1 << 20
GiB = 1 << 30


def test_small_memory_is_one_region():
    layout = GuestLayout(64 * MiB)
    assert layout.regions == (Region(gpa=0, size=64 * MiB, offset=0),)
    assert layout.pages == 16384


@pytest.mark.parametrize("memory", [3 * GiB, 3 * GiB + 4096, 5 * GiB])
def test_memory_above_three_gib_continues_at_four(memory):
    layout = GuestLayout(memory)
    high = (Region(gpa=4 * GiB, size=memory - 3 * GiB, offset=3 * GiB),) if memory > 3 * GiB else ()
    assert layout.regions == (Region(gpa=0, size=3 * GiB, offset=0), *high)


def test_page_numbers_follow_the_ram_file():
    layout = GuestLayout(5 * GiB)
    for region in layout.regions:
        for inside in (0, 4096, region.size - 4096):
            page = (region.offset + inside) // 4096
            assert layout.gpa_of_page(page) == region.gpa + inside
            assert layout.page_of_gpa(region.gpa + inside) == page
            assert layout.page_of_gpa(region.gpa + inside + 4095) == page


@pytest.mark.parametrize("gpa", [-1, 3 * GiB, 4 * GiB - 1, 6 * GiB, 1 << 52])
def test_a_gpa_outside_ram_has_no_page(gpa):
    assert GuestLayout(5 * GiB).page_of_gpa(gpa) is None


@pytest.mark.parametrize("gpa", [64 * MiB, 3 * GiB, 4 * GiB])
def test_a_small_guest_ends_where_its_ram_ends(gpa):
    assert GuestLayout(64 * MiB).page_of_gpa(gpa) is None


def test_runs_are_split_at_the_hole():
    layout = GuestLayout(5 * GiB)
    border = 3 * GiB // 4096
    assert layout.runs(border - 2, 5) == [(3 * GiB - 8192, border - 2, 2), (4 * GiB, border, 3)]
    assert layout.runs(border - 2, 2) == [(3 * GiB - 8192, border - 2, 2)]
    assert layout.runs(border, 3) == [(4 * GiB, border, 3)]
    assert layout.runs(border + 7, 1) == [(4 * GiB + 7 * 4096, border + 7, 1)]


def test_pages_outside_ram_are_refused():
    layout = GuestLayout(2 * MiB)
    with pytest.raises(ValueError, match="pages 512 to 512 are not all in the 512 of RAM"):
        layout.gpa_of_page(512)
    with pytest.raises(ValueError, match="pages 511 to 512"):
        layout.runs(511, 2)
    with pytest.raises(ValueError, match="of RAM"):
        layout.gpa_of_page(-1)
    with pytest.raises(ValueError, match="the least is 1"):
        layout.runs(0, 0)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (0, "0 of guest memory is too little: the least is 2M"),
        (1 * MiB, "1M of guest memory is too little: the least is 2M"),
        (2 * MiB + 1, "2097153 of guest memory is not whole pages: give a multiple of 4096 bytes"),
        (100 << 40, "100T of guest memory is too much: the most is 256G"),
    ],
)
def test_unusable_memory_is_one_sentence(memory, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        GuestLayout(memory)
    assert str(caught.value) == message


def test_the_limits_themselves_are_accepted():
    assert GuestLayout(2 * MiB).pages == 512
    assert GuestLayout(256 * GiB).pages == 1 << 26


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("4k", 4096), (" 64M ", 64 * MiB), ("1536M", 1536 * MiB), ("100T", 100 << 40)],
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "64MB", "1.5G", "-1", "64 M", "0x10", "1e3", "٤", "9" * 19])
def test_parse_size_refuses_with_an_example(text):
    with pytest.raises(
        ValueError, match="is not a size: give a whole number of bytes, or of K, M, G or T, such as 64M"
    ):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (1, "1"),
        (4097, "4097"),
        (4096, "4K"),
        (64 * MiB, "64M"),
        (1536 * MiB, "1536M"),
        (1 << 50, "1024T"),
    ],
)
def test_format_size_is_exact(size, text):
    assert format_size(size) == text
    assert parse_size(text) == size
