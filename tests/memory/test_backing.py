"""What RAM is made of: its views, what it gives up, what it cannot be. No guest runs."""

import os
import re
import stat
from pathlib import Path

import pytest

from kvmdp.errors import UnsupportedError
from kvmdp.kvm import Kvm
from kvmdp.memory.backing import AnonymousBacking, FileBacking, MemfdBacking
from kvmdp.memory.backings import BACKINGS, check_backing_options, create_backing

PAGE = 4096
SIZE = 4 << 20
HUGE = 2 << 20
ON_DEMAND = ("memfd", "anonymous", "guest-memfd", "file")


@pytest.fixture
def create():
    """Return what makes a backing for a VM of its own; all is closed at the end."""
    opened = []

    def make(name, size=SIZE, **options):
        opened.append(Kvm())
        opened.append(opened[-1].create_vm())
        opened.append(create_backing(name, size, opened[-1], **options))
        return opened[-1]

    yield make
    for each in reversed(opened):
        each.close()


def _require(create, name, **options):
    try:
        return create(name, **options)
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.kvm
@pytest.mark.parametrize("name", ON_DEMAND)
def test_both_views_show_the_same_bytes_and_pages_that_are_forgotten_have_none(create, name):
    backing = _require(create, name)
    assert (backing.name, backing.size, backing.page_size) == (name, SIZE, PAGE)
    assert (backing.guest is not backing.vmm) is backing.shared
    backing.vmm.view[: 4 * PAGE] = b"\xa5" * (4 * PAGE)
    assert backing.guest.view[: 4 * PAGE] == b"\xa5" * (4 * PAGE)
    backing.forget(PAGE, 2 * PAGE)
    kept, gone = b"\xa5" * PAGE, bytes(PAGE)
    assert backing.guest.view[: 4 * PAGE] == kept + gone + gone + kept
    backing.vmm.view[PAGE : 2 * PAGE] = kept
    assert backing.guest.view[PAGE : 2 * PAGE] == kept


def test_what_a_memfd_forgets_takes_no_memory():
    with MemfdBacking(SIZE) as backing:
        backing.vmm.view[:SIZE] = b"\x01" * SIZE
        assert os.fstat(backing.fd).st_blocks * 512 == SIZE
        backing.forget(0, SIZE // 2)
        assert os.fstat(backing.fd).st_blocks * 512 == SIZE // 2


@pytest.mark.kvm
@pytest.mark.root
@pytest.mark.hugepages
@pytest.mark.parametrize("name", ["hugetlb-2m", "private-hugetlb-2m"])
def test_huge_pages_are_whole_and_are_kept(create, name):
    backing = create(name, reserve=True)
    assert backing.page_size == HUGE
    assert (backing.fd >= 0) is backing.shared is backing.sealed
    backing.vmm.view[:SIZE] = b"\xa5" * SIZE
    backing.forget(0, PAGE)
    backing.forget(HUGE, HUGE)
    assert backing.guest.view[:SIZE] == b"\xa5" * SIZE


@pytest.mark.kvm
def test_only_a_guest_memfd_says_that_memslots_are_to_be_bound_to_it(create):
    assert create("memfd").guest_memfd == -1
    backing = _require(create, "guest-memfd")
    assert backing.guest_memfd >= 0
    assert (backing.fd, backing.sealed) == (-1, False)


def _flags_at(hva):
    """The flags of the mapping that has this address, as /proc tells them."""
    found = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(match[1], 16) <= hva < int(match[2], 16)
        elif found and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {hva:#x}")


@pytest.mark.parametrize(("thp", "flag", "other"), [(True, "hg", "nh"), (False, "nh", "hg")])
@pytest.mark.parametrize("kind", [MemfdBacking, AnonymousBacking, FileBacking])
def test_transparent_huge_pages_are_wanted_in_all_views_or_in_none(kind, thp, flag, other):
    with kind(SIZE, thp=thp) as backing:
        for view in (backing.guest, backing.vmm):
            flags = _flags_at(view.hva)
            assert flag in flags
            assert other not in flags


def test_a_file_is_made_has_what_was_written_and_is_nobody_elses(tmp_path):
    path = tmp_path / "ram"
    with FileBacking(SIZE, str(path)) as backing:
        backing.vmm.view[PAGE : 2 * PAGE] = b"\xa5" * PAGE
        assert (backing.fd, backing.sealed) == (-1, False)
    assert path.read_bytes() == bytes(PAGE) + b"\xa5" * PAGE + bytes(SIZE - 2 * PAGE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_disk_without_room_is_said_before_a_fault_could_find_out(tmp_path):
    path = tmp_path / "ram"
    with pytest.raises(
        UnsupportedError, match=rf"{path} has no room for 1048576T of RAM \(.+\): free some, or name"
    ):
        FileBacking(1 << 60, str(path))
    assert not path.exists()
    path.touch()
    with pytest.raises(UnsupportedError):
        FileBacking(1 << 60, str(path))
    assert path.stat().st_size == 0


def test_an_exception_undoes_the_file(tmp_path):
    path = tmp_path / "ram"
    for was_there in (False, True):
        with pytest.raises(KeyError), FileBacking(SIZE, str(path)):
            raise KeyError
        assert path.exists() == was_there
        path.touch()
    assert path.stat().st_size == 0


def test_a_link_to_a_file_that_is_not_there_yet_will_do(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "ram")
    FileBacking(SIZE, str(tmp_path / "link")).close()
    assert (tmp_path / "ram").stat().st_size == SIZE


def test_a_file_with_something_in_it_is_not_overwritten(tmp_path):
    path = tmp_path / "image"
    path.write_text("precious")
    with pytest.raises(ValueError, match="there is something in it, which RAM would overwrite"):
        check_backing_options("file", SIZE, path=str(path))
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", BACKINGS)
def test_sizes_are_whole_pages_of_the_host(name):
    page = BACKINGS[name].page_size
    check_backing_options(name, 2 * page)
    if page > PAGE:
        with pytest.raises(ValueError, match=r"is not whole huge pages: give a multiple of [12][MG]$"):
            check_backing_options(name, page + PAGE)
