"""torchrun's own restarts (`--max-restarts`): new processes, and a store in which the dead ones' words still are.

torchrun lends its processes its store, and the restarted ones too. There they find the addresses of those that were
killed, and wait for them until the time-out: under DDP by chance, and where more than one group is made nearly always
(https://github.com/pytorch/pytorch/issues/135712). So the processes of one start agree on a name, under which the
store has nothing yet, and make their groups there.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lightning_zero.errors import UnreachableRankError

_PREFIX = "lightning_zero/start"
_POLL_SECONDS = 0.05


def store_is_lent() -> bool:
    """Whether this process is one of torchrun's, and has its store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def init_process_group(backend: str, timeout: timedelta | None, **options: Any) -> None:
    """As `dist.init_process_group`, for a process that was lent a store. Called on every rank.

    Raises:
        UnreachableRankError: the others don't come within the time-out.
    """
    timeout = dist.constants.default_pg_timeout if timeout is None else timeout
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    own = store_of_one_start(store, rank, world_size, timeout)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=timeout, **options)


def store_of_one_start(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """A part of a store that only the processes of one start have, whoever was here before. Called on every rank.

    Each says a word that nobody has said before. The first rank repeats what it hears, beginning with its own, which
    names the start, until all have found theirs in that, and have said so under this name.

    Raises:
        UnreachableRankError: the others don't come within the time-out.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    own = secrets.token_hex(8)

    def wait_a_moment() -> None:
        if time.monotonic() > deadline:
            raise UnreachableRankError(f"rank {rank} waited in vain for the other ranks to start ({timeout})")
        time.sleep(_POLL_SECONDS)

    first = f"{_PREFIX}/0"
    if rank == 0:
        name = own
        words = [f"{_PREFIX}/{other}" for other in range(1, world_size)]
        answers = [f"{_PREFIX}/{name}/{other}" for other in range(1, world_size)]
        while answers and not store.check(answers):
            if store.check(words):
                store.set(first, " ".join([name, *(word.decode() for word in store.multi_get(words))]))
            wait_a_moment()
    else:
        store.set(f"{_PREFIX}/{rank}", own)
        while own not in (repeated := store.get(first).decode().split() if store.check([first]) else []):
            wait_a_moment()
        name = repeated[0]
        store.set(f"{_PREFIX}/{name}/{rank}", "")
    return PrefixStore(f"{_PREFIX}/{name}", store)
