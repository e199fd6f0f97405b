"""Save directories that each node has on a disk of its own.

[Note: a checkpoint on every node]
Where the nodes share no storage, each gets the whole checkpoint: its ranks write their files there, and the first rank
of each node, its leader, receives the other nodes' files from the ranks that wrote them. So any node's directory is
complete by itself: any number of nodes resumes from it, a lost disk loses nothing, and the command sees what it sees on
one machine. It costs the disk, and the way of every byte to every other node; behind training, no time of training.

| after | on each node | the next load |
|---|---|---|
| all have all files, and the manifest, durable | `.staging-…` | takes the checkpoint before |
| each has renamed it to the tag | the tag; on some, if one is killed meanwhile | as before: no `latest` names it |
| each has replaced `latest` | the same; `latest` new on some, if one is killed | as rank 0's says: all have it |

All wait for each other between the rows. A tag that is replaced is old on some nodes and new on others if a kill comes
in the second row: the ranks see different save ids then, and take another tag.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_zero.checkpoint.storage import Location, create_file, open_file
from lightning_zero.checkpoint.tensors import tensor_bytes
from lightning_zero.errors import ZeroError

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is.

    Attributes:
        node: its node's number.
        leads: whether it is the one rank of its node that makes and renames directories.
    """

    node: int
    leads: bool


@dataclass(frozen=True, slots=True)
class Transfer:
    """A file that a rank has, and that others are to have too, under the same name."""

    name: str
    nbytes: int
    sender: int
    receivers: Sequence[int]


def exchange(directory: Location, transfers: Iterable[Transfer], group: dist.ProcessGroup, *, fsync: bool) -> None:
    """Send and receive files, one after the other. Called on every rank, with the same list.

    What goes wrong with a file is raised when all are through: nobody waits for bytes that don't come.
    """
    buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)
    rank, failure = group.rank(), None
    for transfer in transfers:
        try:
            if rank == transfer.sender:
                _send(directory / transfer.name, transfer, buffer, group)
            elif rank in transfer.receivers:
                _receive(directory / transfer.name, transfer, buffer, group, fsync=fsync)
        except (OSError, ZeroError) as error:
            failure = error
    if failure is not None:
        raise failure


def _chunks(transfer: Transfer, buffer: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    for offset in range(0, transfer.nbytes, len(buffer)):
        yield offset, buffer[: min(len(buffer), transfer.nbytes - offset)]


def _send(path: Location, transfer: Transfer, buffer: torch.Tensor, group: dist.ProcessGroup) -> None:
    file, failure = None, None
    for offset, chunk in _chunks(transfer, buffer):
        try:
            file = open_file(path) if file is None else file
            file.read_into(offset, tensor_bytes(chunk))
        except (OSError, ZeroError) as error:  # something has to be sent, all the same
            failure = error
        for receiver in transfer.receivers:
            dist.send(chunk, group=group, group_dst=receiver)
    if failure is not None:
        raise failure


def _receive(
    path: Location, transfer: Transfer, buffer: torch.Tensor, group: dist.ProcessGroup, *, fsync: bool
) -> None:
    chunks = _chunks(transfer, buffer)
    try:
        with create_file(path, transfer.nbytes, fsync=fsync) as file:
            for _, chunk in chunks:
                dist.recv(chunk, group=group, group_src=transfer.sender)
                file.write(tensor_bytes(chunk))
    except OSError:
        for _, chunk in chunks:
            dist.recv(chunk, group=group, group_src=transfer.sender)
        raise
