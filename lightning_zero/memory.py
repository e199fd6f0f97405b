"""What a process asks the system's memory for, beyond what torch does by itself.

The first touch of a page costs the kernel five times as much as the copy that goes there: it has to find the page and
to zero it. Two ways out, and neither is needed for anything to be right: huge pages, which it gives out 512 at a time,
and pages that are kept when they are freed. Each function does nothing where the system knows no such thing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time

import torch
from torch import Tensor

_PAGE_BYTES = 4096
_HUGE_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14  # asm-generic/mman-common.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_FROM_HEAP, _LEAST_TRIMMED = 32 << 20, 256 << 20
_GRACE_SECONDS = 0.002
_LEAST_BYTES_PER_SECOND = 4e9
_LARGEST_STEP_BYTES = 8 << 20


def prefault(memory: Tensor) -> Tensor:
    """Have the system give the pages of uninitialised, contiguous host memory now, in huge ones where those are faster.

    As a rule they are: 15 to 40 GB/s, and 3 to 5 GB/s for pages of the usual size. They aren't where a virtual
    machine's host has yet to back them, at 0.4 GB/s, while small ones are there that somebody has used before: then
    the rest are small. To try again later costs more than it brings.
    Source: madvise(2), https://docs.kernel.org/admin-guide/mm/transhuge.html.

    Returns:
        The same tensor, whose values are as undefined as before.
    """
    if memory.nbytes <= _LARGEST_FROM_HEAP or not memory.is_cpu:
        return memory  # it is small, or has pages that were used before
    flat = memory.view(-1).view(torch.uint8)
    touched = _touch_huge_pages(flat) if sys.platform == "linux" else 0
    flat[touched:][::_PAGE_BYTES].zero_()
    return memory


def _touch_huge_pages(flat: Tensor) -> int:
    """Touch bytes in huge pages until the end, or until they come slowly: how many it has touched."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return 0
    # Between two steps it waits for the interpreter's lock, which another thread may hold for 5 ms: so they are large,
    # and that time is no part of what the pages take.
    touched, step_bytes, are_fast = 0, _HUGE_PAGE_BYTES, True
    while are_fast and touched < len(flat):
        began, address = time.thread_time(), flat.data_ptr() + touched
        step = flat[touched : touched + step_bytes - address % _HUGE_PAGE_BYTES]
        first_page = address - address % _PAGE_BYTES
        madvise(ctypes.c_void_p(first_page), ctypes.c_size_t(address + len(step) - first_page), _MADV_HUGEPAGE)
        step[::_PAGE_BYTES].zero_()
        touched += len(step)
        are_fast = time.thread_time() - began <= _GRACE_SECONDS + len(step) / _LEAST_BYTES_PER_SECOND
        step_bytes = min(2 * step_bytes, _LARGEST_STEP_BYTES)
    return touched


def keep_freed_memory() -> None:
    """Have the C library keep memory that was freed, up to 256 MiB of it, for what is allocated next.

    A backward frees gradients as it goes. By default glibc gives such memory back to the system at once, and the next
    step pays for every page again: a twentieth of a small model's step. Blocks of more than 32 MiB are given back as
    ever. An environment that sets glibc's limits is left alone, and so is any other C library. Source: mallopt(3).
    """
    asked = "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ
    if asked or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
    mallopt(_M_TRIM_THRESHOLD, _LEAST_TRIMMED)
