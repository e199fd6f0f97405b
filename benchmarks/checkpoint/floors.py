"""What the machine allows: the same bytes, by the same number of processes at the same time, with nothing around them.

The buffers are touched before anything is timed, so that these are figures of disks and of memory, not of page faults.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

PIECE_BYTES = 8 << 20


def warm_buffer(nbytes: int) -> Tensor:
    """Host memory of which every page has been touched."""
    return torch.ones(nbytes, dtype=torch.uint8)


def write_seconds(path: Path, buffer: Tensor) -> float:
    """Write a buffer into a fresh file, in big writes, with an fsync; all ranks at once. The file goes again."""
    view = buffer.numpy().data
    dist.barrier()
    began = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for begin in range(0, len(view), PIECE_BYTES):
        os.write(fd, view[begin : begin + PIECE_BYTES])
    os.fsync(fd)
    os.close(fd)
    took = time.perf_counter() - began
    dist.barrier()
    path.unlink()
    return took


def copy_seconds(source: Tensor, target: Tensor) -> float:
    """Copy one warm buffer to another, by one thread of each rank, all ranks at once."""
    dist.barrier()
    began = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - began


@dataclass(frozen=True)
class Range:
    """Bytes of a file that a rank needs, and whether they go where memory is already (parameters) or to new memory."""

    path: Path
    offset: int
    nbytes: int
    is_new: bool


def read_seconds(ranges: Sequence[Range], targets: Sequence[Tensor]) -> float:
    """Read ranges of files from the page cache into memory, a tensor for each, all ranks at once."""
    descriptors = {path: os.open(path, os.O_RDONLY) for path in {each.path for each in ranges}}
    views = [target.numpy().data for target in targets]
    dist.barrier()
    began = time.perf_counter()
    for each, view in zip(ranges, views, strict=True):
        done = 0
        while done < each.nbytes:
            done += os.preadv(descriptors[each.path], [view[done:]], each.offset + done)
    took = time.perf_counter() - began
    for descriptor in descriptors.values():
        os.close(descriptor)
    return took
