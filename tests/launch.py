"""A multi-process test is one decorator: `@distributed(world_size=2)`.

The body runs in real processes with a real gloo process group. They are forked from a server that has torch and
Lightning imported already, so that a launch costs a tenth of a second and not four. No thread that computes
lives in that server, which is what makes the fork safe.
"""

import functools
import importlib
import multiprocessing
import os
import pickle
import queue
import random
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lightning.pytorch", "torchmetrics", "lightning_zero", "tests.preload"])

TIMEOUT_SECONDS = 120


def free_port() -> int:
    """Below the range from which the kernel takes ports for connections."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("there is no free port")


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank, all of them on this machine."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
    }


def distributed(world_size: int, *, process_group: bool = True) -> Callable[..., Any]:
    """Run a test's body once on each of `world_size` ranks; any rank's failure fails the test.

    With `process_group=False` only the environment variables are set, as torchrun would, and the body
    (a Lightning Trainer, say) makes the process group itself.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def launch(*args: Any, **kwargs: Any) -> None:
            run_ranks(test, world_size, *args, process_group=process_group, **kwargs)

        return launch

    return decorate


def run_ranks(
    body: Callable[..., Any],
    world_size: int,
    *args: Any,
    process_group: bool = True,
    timeout_seconds: float = TIMEOUT_SECONDS,
    **kwargs: Any,
) -> list[Any]:
    """Call `body(*args, **kwargs)` on every rank and give back what each returned, in the order of the ranks."""
    results = _context.Queue()
    port = free_port()
    where = (body.__module__, body.__qualname__)
    processes = [
        _context.Process(target=_run_rank, args=(results, where, rank, world_size, port, process_group, args, kwargs))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    returned: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(returned) + len(failures) < world_size and time.monotonic() < deadline:
        try:
            rank, failure, value = results.get(timeout=0.2)
        except queue.Empty:
            dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in failures]
            for rank in dead:
                failures.setdefault(rank, f"died with exit code {processes[rank].exitcode}")
            if failures:
                deadline = min(deadline, time.monotonic() + 20)
            continue
        if failure is None:
            returned[rank] = pickle.loads(value)
        else:
            failures[rank] = failure
    for rank, process in enumerate(processes):
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()
            if rank not in returned:
                failures.setdefault(rank, "hung, and was killed")
    if failures:
        raise AssertionError(
            "\n".join(f"rank {rank} of {world_size}: {failure}" for rank, failure in sorted(failures.items()))
        )
    return [returned[rank] for rank in range(world_size)]


def _run_rank(
    results: Any,
    where: tuple[str, str],
    rank: int,
    world_size: int,
    port: int,
    process_group: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    import torch
    import torch.distributed as dist

    from lightning_zero.plugin.ranks import join_without_the_lock

    os.environ |= rank_environment(rank, world_size, port)
    torch.set_num_threads(1)
    try:
        body: Any = importlib.import_module(where[0])
        for name in where[1].split("."):
            body = getattr(body, name)
        body = getattr(body, "__wrapped__", body)
        if process_group:
            dist.init_process_group("gloo", rank=rank, world_size=world_size)
        value = body(*args, **kwargs)
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        results.close()
        results.join_thread()
        os._exit(1)  # a peer may wait in a collective for us: closing the sockets wakes it
    else:
        results.put((rank, None, pickle.dumps(value)))  # whole: shared memory would go with this process
    finally:
        if dist.is_initialized():
            join_without_the_lock(dist.group.WORLD)
            dist.destroy_process_group()
