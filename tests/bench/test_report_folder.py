"""The report's folder: made, replaced if ours, left alone if not; whole or not at all."""

import errno
import json
import stat
from pathlib import Path

import pytest
from report_documents import comparison

from kvmdp.bench.report.folder import ReportError, check_folder, files, write_report


@pytest.fixture(scope="module")
def document():
    return comparison((1,), (0.0,), ("present", "marker", "userfaultfd"))


def listing(folder):
    return {each.name: each.read_text() for each in folder.iterdir()}


def test_the_folder_is_made(tmp_path, document):
    write_report(document, tmp_path / "out")
    assert listing(tmp_path / "out") == files(document)
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == document
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(tmp_path, document):
    write_report(document, tmp_path)
    assert listing(tmp_path) == files(document)


def test_our_own_is_replaced(tmp_path, document):
    folder = tmp_path / "out"
    write_report(comparison((1, 2), (0.0, 500e-6)), folder)
    assert (folder / "latency-4.svg").exists()
    write_report(document, folder)
    assert listing(folder) == files(document)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_twice_gives_the_same_bytes(tmp_path, document):
    for name in ("a", "b"):
        write_report(document, tmp_path / name)
    assert listing(tmp_path / "a") == listing(tmp_path / "b")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": "kvmdp.bench/1"}', "not JSON"])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, document, text):
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(ReportError, match="holds no report of kvmdp"):
        write_report(document, tmp_path)
    assert listing(tmp_path) == {"compare.json": text}


def test_somebodys_file_in_our_folder_is_not_lost(tmp_path, document):
    folder = tmp_path / "out"
    write_report(document, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ReportError, match=r"holds notes\.txt"):
        write_report(document, folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ReportError, match="that is a file"):
        check_folder(tmp_path / "out")


def test_the_parent_must_be_there(tmp_path):
    with pytest.raises(ReportError, match="there is no folder"):
        check_folder(tmp_path / "absent" / "out")


def test_a_link_to_our_folder_stays_a_link(tmp_path, document):
    write_report(document, tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    write_report(document, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert listing(tmp_path / "out") == files(document)


def test_names_that_no_encoding_holds_are_written(tmp_path):
    write_report(comparison((1,), (0.0,), ("marker", "half a pair \ud800")), tmp_path)
    assert "half a pair \\ud800" in (tmp_path / "cpu.csv").read_text()


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "somewhere")


def test_without_space_nothing_is_changed_or_left_behind(tmp_path, document, monkeypatch):
    folder = tmp_path / "out"
    write_report(document, folder)
    before = listing(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="the report was not written: No space left") as caught:
            write_report(document | {"complete": False}, folder)
    assert caught.value.filename == str(folder)
    assert listing(folder) == before
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_if_the_last_step_fails_the_old_report_is_back(tmp_path, document, monkeypatch):
    folder = tmp_path / "out"
    write_report(document, folder)
    before = listing(folder)
    replace = Path.replace
    steps = []

    def second_fails(self, target):
        steps.append(target)
        return full() if len(steps) == 2 else replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", second_fails)
        with pytest.raises(OSError, match="the report was not written"):
            write_report(document | {"complete": False}, folder)
    assert listing(folder) == before
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_others_may_read_what_the_umask_lets_them(tmp_path, document):
    (tmp_path / "plain").mkdir()
    write_report(document, tmp_path / "out")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "out")}
    assert len(modes) == 1
