from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvmdp.source.base import read_pages
from kvmdp.source.request import FetchRequest
from kvmdp.source.synthetic import SyntheticSource

PAGE = 4096
MASK = 2**64 - 1


def splitmix64(seed, count):
    """SplitMix64 as its authors define it, one output at a time."""
    outputs = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def content(source, first, count):
    destination = bytearray(b"\xee" * (count * PAGE))
    source.fetch(FetchRequest(first * PAGE), memoryview(destination))
    return np.frombuffer(destination, dtype="<u8").reshape(count, 512)


def test_the_model_of_this_test_is_splitmix64():
    # The first outputs for seed 0, as other implementations publish them.
    assert splitmix64(0, 2) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@pytest.mark.parametrize("seed", [0, 1, 12345, MASK])
def test_content_is_what_the_module_says(seed):
    sequence = splitmix64(seed, 512 + 8)
    expected = [[(word + key) & MASK for word in sequence[:512]] for key in sequence[512:]]
    source = SyntheticSource(8 * PAGE, seed)
    assert content(source, 0, 8).tolist() == expected
    assert [content(source, page, 1)[0].tolist() for page in range(8)] == expected
    assert source.pages(np.arange(8)).tolist() == expected


def test_one_page_and_a_run_agree_far_into_the_image():
    source = SyntheticSource(256 << 30, 7)
    last = (256 << 30) // PAGE - 1
    run = content(source, last - 3, 4)
    assert (run == np.vstack([content(source, last - 3 + i, 1) for i in range(4)])).all()
    numbers = np.array([last, 5, last - 1, 5])
    assert (source.pages(numbers) == read_pages(source, numbers)).all()
    assert (source.pages(numbers)[0] == run[3]).all()


def test_a_page_in_the_wrong_place_differs_in_every_word():
    pages = SyntheticSource(64 * PAGE, 3).pages(np.arange(64))
    for i in range(64):
        for j in range(i):
            assert (pages[i] != pages[j]).all()


def test_another_seed_is_another_image():
    numbers = np.arange(16)
    one, two = SyntheticSource(16 * PAGE, 1), SyntheticSource(16 * PAGE, 2)
    assert (one.pages(numbers) != two.pages(numbers)).all()


def test_extents_are_everything():
    source = SyntheticSource(16 * PAGE)
    assert source.size == 16 * PAGE
    assert source.extents() == [(0, 16 * PAGE)]
    assert "seed 0" in source.name
    source.close()


def test_threads_fill_at_once():
    source = SyntheticSource(1024 * PAGE, 9)
    ram = bytearray(1024 * PAGE)
    view = memoryview(ram)

    def fill_every_fourth(start):
        for page in range(start, 1024, 4):
            source.fetch(FetchRequest(page * PAGE), view[page * PAGE : (page + 1) * PAGE])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill_every_fourth, range(4)))
    assert ram == source.pages(np.arange(1024)).tobytes()


@pytest.mark.parametrize("size", [0, -PAGE, PAGE + 1])
def test_a_size_that_is_not_pages_is_refused(size):
    with pytest.raises(ValueError, match="give a positive multiple of 4096"):
        SyntheticSource(size)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match="out of range: give one from 0 to"):
        SyntheticSource(PAGE, seed)


@pytest.mark.parametrize(("offset", "length"), [(8, PAGE), (0, 8), (4 * PAGE, PAGE)])
def test_a_range_that_is_not_pages_of_the_image_is_refused(offset, length):
    with pytest.raises(ValueError, match="are not whole 4096-byte pages"):
        SyntheticSource(4 * PAGE).fetch(FetchRequest(offset), memoryview(bytearray(length)))
