"""Which pages of a mapping are mapped in this process and are the file's own, as Linux tells it in two ways.

Since Linux 6.7 an ioctl of /proc/self/pagemap gives ranges of such pages (PAGEMAP_SCAN), so to ask costs what was
touched. Before, each page of a mapping is an entry of 8 bytes that has to be read: 200 MB of them for 100 GB.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from moeopt.bundle.resident import PAGE

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PAGEMAP = Path("/proc/self/pagemap")
_SCAN = 0xC0606610
"""PAGEMAP_SCAN, _IOWR('f', 16, struct pm_scan_arg): https://docs.kernel.org/admin-guide/mm/pagemap.html"""
_ARGUMENT = struct.Struct("12Q")
_REGION = struct.Struct("3Q")
_REGIONS = 1024
_OF_FILE = 1 << 2 | 1 << 3
"""PAGE_IS_FILE and PAGE_IS_PRESENT: mapped here, and no copy of the process's own."""
_UNKNOWN = {errno.ENOTTY, errno.ENOSYS, errno.EPERM}
"""How a kernel, or what stands between it and the process, says that it has no such ioctl."""


def touched_pages(pagemap: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Addresses [begin, end) of each run of mapped pages of a file in [start, stop), in order.

    Args:
        pagemap: ``PAGEMAP``, open for reading and not buffered.
    """
    try:
        return iter(_scanned(pagemap, start, stop))
    except OSError as err:
        if err.errno not in _UNKNOWN:
            raise
        return _read(pagemap, start, stop)


def _scanned(pagemap: BinaryIO, start: int, stop: int) -> list[tuple[int, int]]:
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no ioctl")
    found: list[tuple[int, int]] = []
    regions = bytearray(_REGION.size * _REGIONS)
    address = torch.frombuffer(regions, dtype=torch.uint8).data_ptr()
    count = _REGIONS
    while count == _REGIONS and start < stop:
        asked = (_ARGUMENT.size, 0, start, stop, 0, address, _REGIONS, 0, 0, _OF_FILE, 0, _OF_FILE)
        count = fcntl.ioctl(pagemap, _SCAN, bytearray(_ARGUMENT.pack(*asked)))
        for begin, end, _ in _REGION.iter_unpack(memoryview(regions)[: count * _REGION.size]):
            if found and found[-1][1] == begin:  # Linux gives 512 ranges at a time, and does not join those
                begin = found.pop()[0]
            found.append((begin, end))
            start = end  # walk_end is not it: Linux 6.18 may leave there where one of those 512 came to an end
    return found


def _read(pagemap: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, int]]:
    pagemap.seek(start // PAGE * 8)
    entries = torch.frombuffer(bytearray(pagemap.read((stop - start) // PAGE * 8)), dtype=torch.int64)
    of_file = (entries < 0) & (entries >> 61 & 1 == 1)  # bit 63: present; bit 61: a page of a file
    edges = torch.nn.functional.pad(of_file.to(torch.int8), (1, 1)).diff().nonzero().flatten() * PAGE + start
    return zip(*edges.reshape(-1, 2).t().tolist(), strict=True)
