"""The userfaultfd calls in their awkward cases: pages that are there already, calls cut short, no permission."""

import ctypes
import errno
import os

import pytest

from kvmdp.abi import libc
from kvmdp.abi import userfaultfd as abi
from kvmdp.errors import UnsupportedError
from kvmdp.memory.backing import MemfdBacking
from kvmdp.memory.mapping import Mapping
from kvmdp.trap.uffd import descriptor as uffd_module
from kvmdp.trap.uffd.descriptor import Uffd, supported_features

PAGE = 4096
PAGES = 8


def is_poisoned(mapping, page):
    """Whether an access would end in a SIGBUS: the kernel, asked to read there, fails instead."""
    reader, writer = os.pipe()
    try:
        os.write(writer, mapping.view[page * PAGE : page * PAGE + 1])
    except OSError as error:
        return error.errno == errno.EFAULT
    finally:
        os.close(reader)
        os.close(writer)
    return False


@pytest.fixture
def uffd():
    try:
        offered = supported_features()
    except UnsupportedError as error:
        pytest.skip(str(error))
    if not offered & abi.UFFD_FEATURE_POISON:
        pytest.skip("no UFFD_FEATURE_POISON: use Linux 6.6 or later")
    wanted = abi.UFFD_FEATURE_POISON | abi.UFFD_FEATURE_MISSING_SHMEM | abi.UFFD_FEATURE_MINOR_SHMEM
    descriptor = Uffd(wanted, kernel_faults=False)
    yield descriptor
    descriptor.close()
    descriptor.close()


@pytest.fixture
def private(uffd):
    """Anonymous memory, registered."""
    with Mapping.anonymous(PAGES * PAGE) as mapping:
        uffd.register(mapping.hva, mapping.length, abi.UFFDIO_REGISTER_MODE_MISSING)
        yield mapping
        uffd.unregister(mapping.hva, mapping.length)


@pytest.fixture
def staging():
    with Mapping.anonymous(PAGES * PAGE) as mapping:
        for page in range(PAGES):
            mapping.view[page * PAGE] = page + 1
        yield mapping


def test_markers_go_on_absent_pages_and_copies_replace_them(uffd, private, staging):
    assert uffd.poison(private.hva, PAGES * PAGE)
    assert all(is_poisoned(private, page) for page in range(PAGES))
    uffd.copy(private.hva, staging.hva, PAGES * PAGE)
    assert [private.view[page * PAGE] for page in range(PAGES)] == list(range(1, PAGES + 1))


def test_a_marker_that_meets_pages_says_so_and_takes_the_rest(uffd, private, staging):
    uffd.copy(private.hva + 3 * PAGE, staging.hva + 3 * PAGE, 2 * PAGE)
    assert not uffd.poison(private.hva, PAGES * PAGE)
    assert [is_poisoned(private, page) for page in range(PAGES)] == [
        page not in (3, 4) for page in range(PAGES)
    ]
    assert not uffd.poison(private.hva, PAGE)  # a marker is there already
    assert (private.view[3 * PAGE], private.view[4 * PAGE]) == (4, 5)


def test_a_copy_that_meets_pages_leaves_them_and_takes_the_rest(uffd, private, staging):
    uffd.copy(private.hva + 2 * PAGE, staging.hva + 2 * PAGE, PAGE)
    private.view[2 * PAGE] = 99  # the guest's own write
    uffd.copy(private.hva, staging.hva, PAGES * PAGE)
    assert [private.view[page * PAGE] for page in range(PAGES)] == [1, 2, 99, 4, 5, 6, 7, 8]


def test_a_continue_maps_what_the_file_holds_and_fails_on_a_hole(uffd):
    with MemfdBacking(PAGES * PAGE) as backing:
        guest = backing.guest
        uffd.register(
            guest.hva, guest.length, abi.UFFDIO_REGISTER_MODE_MISSING | abi.UFFDIO_REGISTER_MODE_MINOR
        )
        uffd.poison(guest.hva, guest.length)
        backing.vmm.view[: 4 * PAGE] = bytes([7]) * (4 * PAGE)
        assert uffd.continue_(guest.hva + PAGE, PAGE) == PAGE
        assert uffd.continue_(guest.hva, 4 * PAGE) == 3 * PAGE
        assert uffd.continue_(guest.hva, 4 * PAGE) == 0
        assert bytes(guest.view[: 4 * PAGE]) == bytes([7]) * (4 * PAGE)
        with pytest.raises(OSError, match="UFFDIO_CONTINUE at") as caught:
            uffd.continue_(guest.hva + 4 * PAGE, PAGE)
        assert caught.value.errno == errno.EFAULT
        assert is_poisoned(guest, 4)
        uffd.unregister(guest.hva, guest.length)


def test_a_range_that_is_not_registered_is_an_error_that_names_the_call(uffd, staging):
    with pytest.raises(OSError, match=f"UFFDIO_POISON at {staging.hva:#x}") as caught:
        uffd.poison(staging.hva, PAGE)
    assert caught.value.errno == errno.ENOENT


def test_calls_that_stop_half_way_or_must_be_made_again_reach_the_end(uffd, private, monkeypatch):
    # EAGAIN with nothing done, then one page a call: what an address space in change does.
    original, calls = libc.libc.ioctl, []

    def one_page_at_a_time(fd, number, argument):
        request = ctypes.cast(argument, ctypes.POINTER(abi.uffdio_poison))[0]
        calls.append(request.range.len // PAGE)
        if len(calls) == 1:
            request.updated = -errno.EAGAIN
            ctypes.set_errno(errno.EAGAIN)
            return -1
        length, request.range.len = request.range.len, PAGE
        assert original(fd, number, argument) == 0
        if length == PAGE:
            return 0
        ctypes.set_errno(errno.EAGAIN)
        return -1

    monkeypatch.setattr(uffd, "_ioctl", one_page_at_a_time)
    assert uffd.poison(private.hva, 4 * PAGE)
    assert calls == [4, 4, 3, 2, 1]
    assert [is_poisoned(private, page) for page in range(4)] == [True] * 4


def test_reading_without_events_gives_none(uffd):
    assert uffd.read((abi.uffd_msg * 4)()) == 0


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(uffd_module, "supported_features", lambda: 0)
    with pytest.raises(UnsupportedError, match=r"lacks poison markers \(UFFDIO_POISON, Linux 6.6\)"):
        Uffd(abi.UFFD_FEATURE_POISON, kernel_faults=False)


@pytest.mark.parametrize(
    ("number", "kernel_faults", "message"),
    [
        (errno.ENOSYS, False, "no userfaultfd: use one built with CONFIG_USERFAULTFD"),
        (errno.EPERM, False, "docker run --device /dev/userfaultfd"),
        (errno.EPERM, True, "docker run --device /dev/userfaultfd"),
    ],
)
def test_a_refused_userfaultfd_is_said_with_its_remedy(monkeypatch, number, kernel_faults, message):
    def refuse(user_mode_only):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(uffd_module, "_open", refuse)
    with pytest.raises(UnsupportedError, match=message):
        uffd_module._open_permitted(kernel_faults)


@pytest.mark.parametrize("user_mode", [None, errno.EINVAL])  # EINVAL: not before Linux 5.11
def test_a_privilege_that_is_missing_is_said_with_its_remedy(monkeypatch, user_mode):
    def refuse(user_mode_only):
        if user_mode_only and user_mode is None:
            return os.open(os.devnull, os.O_RDONLY)
        raise OSError(user_mode if user_mode_only else errno.EPERM, "refused")

    monkeypatch.setattr(uffd_module, "_open", refuse)
    with pytest.raises(UnsupportedError, match=r"vm\.unprivileged_userfaultfd=1"):
        uffd_module._open_permitted(kernel_faults=True)


def test_a_lack_of_descriptors_is_not_taken_for_a_lack_of_userfaultfd(monkeypatch):
    def refuse(user_mode_only):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(uffd_module, "_open", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        uffd_module._open_permitted(kernel_faults=False)


def test_without_privilege_user_mode_faults_do(monkeypatch):
    asked = []

    def permit_user_mode(user_mode_only):
        asked.append(user_mode_only)
        if not user_mode_only:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return 77

    monkeypatch.setattr(uffd_module, "_open", permit_user_mode)
    assert uffd_module._open_permitted(kernel_faults=False) == (77, False)
    assert asked == [False, True]
