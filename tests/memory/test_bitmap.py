"""The bitmap against a plain model: a numpy array of bool with one element a page."""

import fcntl
import mmap
import os
import random
from pathlib import Path

import numpy as np
import pytest

from kvmdp.memory.bitmap import PresentBitmap, bitmap_from_pages, runs_of, words_for

# Around the borders of words, and of the byte in a word; one with several steps of the search.
SIZES = [1, 7, 8, 63, 64, 65, 127, 128, 129, 200, 512, 4096, 20000]


def words_of(model):
    """The model as a sparse bitmap, bit by bit as the format is defined."""
    words = np.zeros(words_for(len(model)), dtype=np.uint64)
    for page in np.flatnonzero(model):
        words[page // 64] |= np.uint64(1 << (int(page) % 64))
    return words


def runs_in(model):
    runs, start = [], None
    for page, bit in enumerate([*model.tolist(), False]):
        if bit and start is None:
            start = page
        elif not bit and start is not None:
            runs.append([start, page - start])
            start = None
    return runs


def first_run(model, start, limit):
    inside = runs_in(model[start:limit])
    return (start + inside[0][0], inside[0][1]) if inside else None


def raw_words(bitmap):
    """What a peer sees: the memfd's bytes."""
    return np.frombuffer(os.pread(bitmap.fd, 8 * words_for(bitmap.pages), 0), dtype="<u8")


def random_range(rng, pages):
    first = rng.choice([0, rng.randrange(pages), rng.randrange(pages) // 64 * 64])
    longest = pages - first
    return first, rng.choice([1, longest, rng.randint(1, longest), min(64, longest), min(65, longest)])


def random_words(rng, pages):
    """A sparse bitmap with bits set past the last page, which must have no effect, and its model."""
    model = np.array([rng.random() < 0.3 for _ in range(pages)])
    words = words_of(model)
    if pages % 64:
        words[-1] |= np.uint64((1 << 64) - (1 << pages % 64))
    return words, model


def check(bitmap, model, rng):
    pages = len(model)
    assert raw_words(bitmap).tolist() == words_of(model).tolist()
    assert bitmap.count() == model.sum()
    assert bitmap.present_runs().tolist() == runs_in(model)
    assert bitmap.absent_runs().tolist() == runs_in(~model)
    assert bitmap.export_userfault_bitmap().tolist() == words_of(~model).tolist()
    for _ in range(4):
        first, count = random_range(rng, pages)
        part = model[first : first + count]
        assert bitmap.test(first) == part[0]
        assert bitmap.test_range(first, count) == part.all()
        assert bitmap.count_range(first, count) == part.sum()
        assert bitmap.next_present_run(first, first + count) == first_run(model, first, first + count)
        assert bitmap.next_absent_run(first, first + count) == first_run(~model, first, first + count)
        assert bitmap.next_present_run(first) == first_run(model, first, pages)
        assert bitmap.next_absent_run(first) == first_run(~model, first, pages)


@pytest.mark.parametrize("pages", SIZES)
def test_random_operations_agree_with_the_model(pages):
    rng = random.Random(pages)
    model = np.zeros(pages, dtype=bool)
    with PresentBitmap(pages) as bitmap:
        check(bitmap, model, rng)
        for _ in range(60 if pages <= 512 else 12):
            first, count = random_range(rng, pages)
            words, chosen = random_words(rng, pages)
            match rng.randrange(4):
                case 0 | 1:
                    bitmap.set_range(first, count)
                    model[first : first + count] = True
                case 2:
                    bitmap.clear_range(first, count)
                    model[first : first + count] = False
                case 3:
                    bitmap.import_userfault_bitmap(words)
                    model = ~chosen
            check(bitmap, model, rng)


@pytest.mark.parametrize("pages", SIZES)
def test_every_single_page(pages):
    with PresentBitmap(pages) as bitmap:
        for page in range(0, pages, 1 + pages // 300):
            bitmap.set_range(page, 1)
            assert bitmap.test(page)
            assert bitmap.present_runs().tolist() == [[page, 1]]
            assert bitmap.next_present_run(0) == (page, 1)
            bitmap.clear_range(page, 1)
            assert not bitmap.test(page)
        assert bitmap.count() == 0


@pytest.mark.parametrize("pages", [64, 100, 262144])
def test_it_takes_whole_words(pages):
    with PresentBitmap(pages) as bitmap:
        assert bitmap.mapped_bytes == os.fstat(bitmap.fd).st_size == words_for(pages) * 8


@pytest.mark.parametrize("pages", SIZES)
def test_full_and_empty(pages):
    with PresentBitmap(pages) as bitmap:
        assert bitmap.next_present_run(0) is None
        assert bitmap.next_absent_run(0) == (0, pages)
        bitmap.set_range(0, pages)
        assert bitmap.test_range(0, pages)
        assert bitmap.count() == pages
        assert bitmap.next_absent_run(0) is None
        assert bitmap.next_present_run(0) == (0, pages)
        assert bitmap.next_present_run(pages) is None
        bitmap.clear_range(pages - 1, 1)
        assert bitmap.next_absent_run(0) == (pages - 1, 1)


def test_userfault_polarity_is_the_inverse_without_padding():
    with PresentBitmap(70) as bitmap:
        assert bitmap.export_userfault_bitmap().tolist() == [2**64 - 1, 2**6 - 1]
        bitmap.import_userfault_bitmap(np.array([1, 2], dtype=np.uint64))
        assert bitmap.absent_runs().tolist() == [[0, 1], [65, 1]]
        assert raw_words(bitmap).tolist() == [2**64 - 2, 2**6 - 1 - 2]


def test_results_are_copies():
    with PresentBitmap(64) as bitmap:
        exported = bitmap.export_userfault_bitmap()
        bitmap.set_range(0, 64)
        assert exported.tolist() == [2**64 - 1]


def test_arguments_are_not_changed():
    words = np.array([5, 2**64 - 1], dtype=np.uint64)
    with PresentBitmap(70) as bitmap:
        bitmap.import_userfault_bitmap(words)
        runs_of(words, 70)
    assert words.tolist() == [5, 2**64 - 1]


def test_bitmap_from_pages():
    assert bitmap_from_pages(130, np.array([129, 0, 64, 63, 0])).tolist() == [2**63 + 1, 1, 2]
    assert bitmap_from_pages(64, np.array([], dtype=np.int64)).tolist() == [0]
    for wrong in ([64], [-1, 3]):
        with pytest.raises(ValueError, match="not all in the 64 of RAM"):
            bitmap_from_pages(64, np.array(wrong))


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (100, 1), (99, 2), (0, 101), (50, 1 << 40)])
def test_a_range_outside_is_refused_and_changes_nothing(first, count):
    with PresentBitmap(100) as bitmap:
        for operation in (
            bitmap.set_range,
            bitmap.clear_range,
            bitmap.test_range,
            bitmap.count_range,
        ):
            with pytest.raises(ValueError, match=f"pages {first} to .* are not all in the 100 of RAM"):
                operation(first, count)
        assert bitmap.count() == 0


def test_other_wrong_arguments():
    with PresentBitmap(100) as bitmap:
        for page in (-1, 100):
            with pytest.raises(ValueError, match="not all in the 100 of RAM"):
                bitmap.test(page)
        with pytest.raises(ValueError, match="the least is 1"):
            bitmap.set_range(3, 0)
        with pytest.raises(ValueError, match="from page 5 up to 4"):
            bitmap.next_absent_run(5, 4)
        with pytest.raises(ValueError, match="RAM has 100 pages"):
            bitmap.next_present_run(0, 101)
        for words in (np.zeros(1, dtype=np.uint64), np.zeros(2, dtype=np.int64)):
            with pytest.raises(ValueError, match=r"a bitmap of 100 pages is uint64\[2\], not"):
                bitmap.import_userfault_bitmap(words)
    with pytest.raises(ValueError, match="the least is 1"):
        PresentBitmap(0)


def test_a_peer_sees_changes_as_they_happen():
    with PresentBitmap(1000) as bitmap, PresentBitmap.attach(bitmap.fd, 1000) as view:
        assert view.count() == 0
        bitmap.set_range(300, 17)
        assert view.test(316)
        assert view.next_present_run(0) == (300, 17)
        bitmap.clear_range(300, 1)
        assert view.present_runs().tolist() == [[301, 16]]


def test_a_view_outlives_the_descriptor_it_was_made_from():
    bitmap = PresentBitmap(64)
    view = PresentBitmap.attach(bitmap.fd, 64)
    bitmap.set_range(3, 1)
    bitmap.close()
    assert view.test(3)
    view.close()


def test_a_view_cannot_write():
    with PresentBitmap(64) as bitmap, PresentBitmap.attach(bitmap.fd, 64) as view:
        assert not hasattr(view, "set_range")
        assert not hasattr(view, "import_userfault_bitmap")


def test_nobody_else_can_map_it_writable():
    with PresentBitmap(64) as bitmap:
        reopened = os.open(f"/proc/self/fd/{bitmap.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            for fd in (bitmap.fd, reopened):
                with pytest.raises(PermissionError):
                    mmap.mmap(fd, 8, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
                with pytest.raises(PermissionError):
                    os.pwrite(fd, b"\xff", 0)
        finally:
            os.close(reopened)
        assert bitmap.count() == 0


@pytest.mark.parametrize("length", [0, 8, 4096 * 4])
def test_nobody_can_change_its_size(length):
    with PresentBitmap(4096) as bitmap:
        with pytest.raises(PermissionError):
            os.ftruncate(bitmap.fd, length)
        assert os.fstat(bitmap.fd).st_size == 512


def test_attach_refuses_what_is_too_short():
    with (
        PresentBitmap(64) as bitmap,
        pytest.raises(ValueError, match="a memfd of 8 bytes does not hold a bitmap of 65 pages"),
    ):
        PresentBitmap.attach(bitmap.fd, 65)


def test_attach_refuses_what_its_owner_could_shrink(tmp_path):
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    plain = os.open(tmp_path / "plain", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        for fd in (unsealed, plain):
            os.ftruncate(fd, 8)
            with pytest.raises(ValueError, match="F_SEAL_SHRINK"):
                PresentBitmap.attach(fd, 64)
    finally:
        os.close(unsealed)
        os.close(plain)


def descriptors():
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_close_leaves_no_descriptor_and_refuses_further_use():
    before = descriptors()
    bitmap = PresentBitmap(64)
    view = PresentBitmap.attach(bitmap.fd, 64)
    assert fcntl.fcntl(bitmap.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert fcntl.fcntl(view.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    for opened in (bitmap, view):
        opened.close()
        opened.close()
        with pytest.raises(ValueError, match="closed"):
            opened.test(0)
    assert descriptors() == before
