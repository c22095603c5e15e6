"""Sources that are named by a scheme, and files whose names look like that."""

import contextlib

import numpy as np
import pytest

from kvmdp.source.base import read_pages
from kvmdp.source.image import ImageSource
from kvmdp.source.registry import SCHEMES, open_source, register
from kvmdp.source.synthetic import SyntheticSource

SIZE = 8 << 12


@pytest.fixture
def opened():
    """Opens a source for the time of a test; what it registers is gone afterwards."""
    before = dict(SCHEMES)
    with contextlib.ExitStack() as stack:
        yield lambda spec: stack.enter_context(contextlib.closing(open_source(spec)))
    SCHEMES.clear()
    SCHEMES.update(before)


@pytest.mark.parametrize(("spec", "seed"), [("synthetic:32K", 0), ("synthetic:32K,7", 7)])
def test_synthetic_memory(opened, spec, seed):
    source = opened(spec)
    pages = SyntheticSource(SIZE, seed)
    assert source.size == pages.size == SIZE
    numbers = np.array([0, 3, 7])
    assert np.array_equal(read_pages(source, numbers), pages.pages(numbers))


def test_a_source_from_outside_is_given_what_stands_behind_its_colon(opened):
    asked = []

    def open_mine(rest):
        asked.append(rest)
        return SyntheticSource(SIZE)

    register("mine+1", open_mine)
    assert isinstance(opened("mine+1://a:b\nc"), SyntheticSource)
    assert isinstance(opened("mine+1:"), SyntheticSource)
    assert asked == ["//a:b\nc", ""]


@pytest.mark.parametrize("name", ["memory", "backup:memory", "C:memory", ":memory", "9p:memory"])
def test_a_file_is_an_image_whatever_its_name(tmp_path, monkeypatch, opened, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(bytes(SIZE))
    for path in (name, str(tmp_path / name)):
        source = opened(path)
        assert isinstance(source, ImageSource)
        assert source.size == SIZE


def test_a_scheme_comes_before_a_file_of_that_name_which_is_named_with_its_folder(
    tmp_path, monkeypatch, opened
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "synthetic:32K").write_bytes(bytes(4096))
    assert opened("synthetic:32K").size == SIZE
    assert opened("./synthetic:32K").size == 4096


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            "sintetic:64M",
            "image 'sintetic:64M' does not exist, nor is there a source 'sintetic': check the path",
        ),
        ("absent", "image 'absent' does not exist: check the path"),
        ("./a:b", "image './a:b' does not exist: check the path"),
        ("synthetic:64M,x", "synthetic memory 64M,x: the seed is a number, such as in 64M,1"),
        ("synthetic:", "'' is not a size"),
    ],
)
def test_what_there_is_not_is_said(tmp_path, monkeypatch, spec, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the sentence is compared below
        open_source(spec)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("scheme", "sentence"),
    [
        ("synthetic", "there is a source synthetic already: give yours another name"),
        ("", "'' is no scheme"),
        ("a/b", "'a/b' is no scheme"),
        ("a:b", "'a:b' is no scheme"),
        ("Mine", "'Mine' is no scheme"),
    ],
)
def test_a_scheme_must_be_new_and_look_like_one(scheme, sentence):
    with pytest.raises(ValueError, match=sentence):
        register(scheme, lambda rest: SyntheticSource(SIZE))
    assert list(SCHEMES) == ["synthetic"]
