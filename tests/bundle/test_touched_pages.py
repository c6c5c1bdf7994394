"""Both ways to ask which pages a process came to say the same."""

import ctypes
import errno
import mmap
import os
import random

import pytest

from moeopt.bundle import touched_pages as asked
from moeopt.bundle.resident import PAGE
from moeopt.bundle.touched_pages import PAGEMAP, touched_pages

if not PAGEMAP.exists():
    pytest.skip("this system is not asked which pages are mapped", allow_module_level=True)


def unknown(*_):
    raise OSError(errno.ENOTTY, "no such ioctl")


SIZE = 9000 * PAGE


@pytest.fixture(scope="module")
def held():
    """A mapping, where it begins, and which pages of it are the process's own: of 9000, one in three has been read.

    The file is one of memory: what is mapped of it stays so, whatever else the system needs memory for.
    """
    opened = os.memfd_create("w")
    os.truncate(opened, SIZE)
    memory = mmap.mmap(opened, SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(opened)
    for page in range(1, 9000, 3):
        assert memory[page * PAGE] == 0
    own = random.Random(0).sample(range(9000), 90)
    for page in own:
        memory[page * PAGE] = 1
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory)), own


def test_ranges_and_entries_say_the_same(held, monkeypatch):
    """More ranges than one ioctl gives at once; a page that the process wrote to is none of the file's."""
    memory, start, own = held
    stop = start + SIZE
    with PAGEMAP.open("rb", buffering=0) as pagemap:
        first = list(touched_pages(pagemap, start, stop))
        part = list(touched_pages(pagemap, start + 4 * PAGE, start + 8 * PAGE))
        monkeypatch.setattr(asked.fcntl, "ioctl", unknown)
        assert list(touched_pages(pagemap, start, stop)) == first
        assert list(touched_pages(pagemap, start + 4 * PAGE, start + 8 * PAGE)) == part
        assert list(touched_pages(pagemap, start, start)) == []
    pages = {page for begin, end in first for page in range((begin - start) // PAGE, (end - start) // PAGE)}
    assert pages >= set(range(1, 9000, 3)) - set(own) and not pages & set(own)
    assert memory[own[0] * PAGE] == 1


def test_what_is_wrong_is_not_taken_for_an_older_kernel(held, monkeypatch):
    def failing(*_):
        raise OSError(errno.EFAULT, "bad address")

    monkeypatch.setattr(asked.fcntl, "ioctl", failing)
    with PAGEMAP.open("rb", buffering=0) as pagemap, pytest.raises(OSError, match="bad address"):
        touched_pages(pagemap, held[1], held[1] + SIZE)


def test_a_kernel_that_has_ranges_is_asked_for_them(held, monkeypatch):
    with PAGEMAP.open("rb", buffering=0) as pagemap:
        try:
            want = asked._scanned(pagemap, held[1], held[1] + SIZE)
        except OSError as err:
            assert err.errno in (errno.ENOTTY, errno.ENOSYS, errno.EPERM)
            pytest.skip("this kernel, or what stands before it, has no PAGEMAP_SCAN (Linux 6.7)")
        monkeypatch.setattr(asked, "_read", None)
        assert want and list(touched_pages(pagemap, held[1], held[1] + SIZE)) == want
