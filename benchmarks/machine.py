"""What the machine allows: the same bytes, by the same number of processes at the same time, with nothing around them.

    python -m benchmarks.machine [--megabytes 256] [--directory DIR]

The buffers are touched before anything is timed, so that these are figures of disks and of memory, not of page faults.
Every benchmark runs this in its rounds, so that a figure of that run can be told as a ratio to that run's limits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.ranks import Figures, run_ranks

if TYPE_CHECKING:
    from torch import Tensor

PIECE_BYTES = 8 << 20
TAKES = 3
"""What memory gives is the median of so many: others who use the machine change it by half within seconds."""
LIMITS = {
    "write_fsync": "write + fsync",
    "copy": "copy, warm to warm",
    "read": "read, page cache to warm memory",
    "all_reduce": "all_reduce",
}


def warm_buffer(nbytes: int) -> Tensor:
    """Host memory of which every page has been touched."""
    import torch

    return torch.ones(nbytes, dtype=torch.uint8)


def write_seconds(path: Path, buffer: Tensor, *, keep: bool = False) -> float:
    """Write a buffer into a fresh file, in big writes, with an fsync; all ranks at once. The file goes again."""
    import torch.distributed as dist

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
    if not keep:
        path.unlink()
    return took


def copy_seconds(source: Tensor, target: Tensor) -> float:
    """Copy one warm buffer to another, by one thread of each rank, all ranks at once."""
    import torch.distributed as dist

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
    is_new: bool = False


def read_seconds(ranges: Sequence[Range], targets: Sequence[Tensor]) -> float:
    """Read ranges of files from the page cache into memory, a tensor for each, all ranks at once."""
    import torch.distributed as dist

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


def all_reduce_seconds(buffer: Tensor) -> float:
    """Add up a buffer over all ranks, as DDP does with the gradients."""
    import torch
    import torch.distributed as dist

    numbers = buffer.view(torch.float32)
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(numbers)
    return time.perf_counter() - began


def machine_limits(directory: Path | None, megabytes: int = 256) -> Figures:
    """GB/s of each rank, all at once, of the slowest."""
    with tempfile.TemporaryDirectory(prefix="machine-limits-", dir=directory) as folder:
        ranks = run_ranks("benchmarks.machine", "--rank", "--megabytes", megabytes, "--directory", folder)
    return {name: min(rank[name] for rank in ranks) for name in LIMITS}


def limits_text(limits: Sequence[Figures]) -> str:
    """A line for under a table: the median of each limit."""
    parts = [f"{text} {statistics.median(each[name] for each in limits):.1f}" for name, text in LIMITS.items()]
    return f"The machine's limits in this run, GB/s a rank, all ranks at once: {', '.join(parts)}."


def _measure(directory: Path, nbytes: int, turns: int = TAKES) -> Figures:
    """One rank's."""
    import torch.distributed as dist

    buffer, target = warm_buffer(nbytes), warm_buffer(nbytes)
    seconds: dict[str, list[float]] = {name: [] for name in LIMITS}
    for _ in range(turns):
        path = directory / f"rank-{dist.get_rank()}"
        seconds["write_fsync"].append(write_seconds(path, buffer, keep=True))
        seconds["read"].append(read_seconds([Range(path, 0, nbytes)], [target]))
        path.unlink()
        seconds["copy"].append(copy_seconds(buffer, target))
        seconds["all_reduce"].append(all_reduce_seconds(target))
    return {name: nbytes / statistics.median(took) / 1e9 for name, took in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="of each rank")
    parser.add_argument("--directory", type=Path, default=None, help="on the disk that is to be measured")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.rank:
        print(limits_text([machine_limits(arguments.directory, arguments.megabytes)]))
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    print(json.dumps(_measure(arguments.directory, arguments.megabytes * 10**6)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
