"""What goes wrong on one rank, on its way to all of them.

[Note: all ranks fail together]
Between two collectives no rank raises: whatever goes wrong on it becomes a `Failure`, which travels with the next
collective. Then every rank raises the same CheckpointWriteError, which names the rank that failed. So nobody waits for
a rank that has given up. What each step's failure leaves behind:

| fails | where | on disk | what every rank raises |
|---|---|---|---|
| the tags or steps differ | `Proposal` | nothing new | TagMismatchError, with what each rank wanted |
| the staging directory can't be made | `Proposal` | nothing new | CheckpointWriteError |
| a shard or `trainer.pt` can't be written | `prepare`, `write` | the staging directory goes | CheckpointWriteError |
| a file of another rank isn't visible to rank 0 | `finish` | the staging directory goes | CheckpointWriteError |
| the commit, before the tag has its name | `finish` | the staging directory goes | CheckpointWriteError |
| the commit, after that (`latest`) | `finish` | the new tag, whole, under its name | CheckpointWriteError |
| an interrupt | before `finish` | the staging directory goes | KeyboardInterrupt, of that rank; the others wait |
| a rank is killed | any | staging, which the next save removes | CheckpointWriteError, or the group's time-out |

But for the last row of the commit's, no earlier tag is touched in any case, and `latest` names what it named.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_zero.checkpoint.messages import tell_all
from lightning_zero.checkpoint.storage import Location
from lightning_zero.errors import CheckpointWriteError, ZeroError

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong on one rank, in a form that travels; `error` stays behind."""

    rank: int
    text: str
    error: BaseException | None = field(default=None, compare=False)

    def __reduce__(self) -> tuple[type[Failure], tuple[int, str]]:
        return Failure, (self.rank, self.text)


def attempt(rank: int, where: Location, action: Callable[[], _T]) -> _T | Failure:
    """Do it; whatever goes wrong travels to the other ranks and is raised on all: nothing is swallowed."""
    try:
        return action()
    except Exception as error:
        text = str(error) if isinstance(error, ZeroError) else f"{type(error).__name__}: {error}"
        return Failure(rank, f"rank {rank} on {socket.gethostname()}, writing to {where}: {text}", error)


def unreachable(directory: Location, error: RuntimeError, *, saved: bool = False) -> CheckpointWriteError:
    """What a group's RuntimeError means: a peer has died, or didn't come within the time-out."""
    outcome = "is saved, but" if saved else "was not saved:"
    return CheckpointWriteError(
        f"{directory} {outcome} this rank waited in vain for the others. A save has to be called on every rank "
        f"(not under `if rank == 0`), at the same place; or a rank has died, or can't be reached any more ({error})"
    )


# ------------------------------------------------------------------------------------------------ collectives


def begin_all_gather(group: dist.ProcessGroup | None, value: _T) -> Callable[[], list[_T]]:
    """Begin to bring every rank's value to every rank; what is returned waits for them."""
    if group is None:
        return lambda: [value]
    wait = tell_all(group, pickle.dumps(value))
    return lambda: [pickle.loads(content) for content in wait()]


def all_gather(group: dist.ProcessGroup | None, value: _T) -> list[_T]:
    """Every rank's value, on every rank."""
    return begin_all_gather(group, value)()


def gather(group: dist.ProcessGroup | None, value: _T) -> list[_T]:
    """Every rank's value on rank 0, and nothing elsewhere: reports are long, and rank 0 alone reads them."""
    if group is None:
        return [value]
    values: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(value, values, dst=dist.get_global_rank(group, 0), group=group)
    return values or []


def broadcast(group: dist.ProcessGroup | None, value: _T) -> _T:
    """Rank 0's value, on every rank."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=dist.get_global_rank(group, 0), group=group)
    return values[0]
