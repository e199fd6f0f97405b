"""Real ranks, killed before each of the changes that a whole save makes to the file system.

`test_commit.py` stands in for the kill with an exception, which still runs what a `finally` holds; and it looks at
names alone. Here rank 0 of two is a process that gets SIGKILL, and the changes are those of both tables of
[Note: the commit, step by step] and all before and after them: directories, files that are made, each fsync, each name.
"""

import builtins
import contextlib
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_zero.checkpoint import commit, kernel
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.resolution import resolve
from lightning_zero.checkpoint.retention import Retention
from lightning_zero.checkpoint.save import save_checkpoint
from lightning_zero.errors import CheckpointWriteError
from tests.checkpoint.sample import Sample
from tests.launch import distributed

CASES = {
    # the tags that there are, with their steps, `latest` naming the last; and how many changes the save makes, at least
    "a new tag": ({"one": 1, "two": 2}, 13),
    "the latest tag replaced": ({"one": 1, "tag": 2}, 17),
    "another tag replaced": ({"tag": 1, "two": 2}, 17),
    "the latest tag replaced without exchange": ({"one": 1, "tag": 2}, 28),
    "an old tag pruned": ({"one": 1, "two": 2, "three": 3}, 17),
}
STEP = 9
SURVIVOR_SECONDS = 20


def kill_before(number: int) -> None:
    """From now on, this process dies in place of its `number`-th change of the file system."""
    count = 0

    def dying(real: Callable[..., Any], changes: Callable[..., bool] = lambda *args, **kwargs: True) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if changes(*args, **kwargs):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    os.fsync = dying(lambda fd: None)  # SIGKILL costs nothing that is written: the disk needn't be waited for
    for name in ("rename", "replace", "link", "unlink", "mkdir", "rmdir", "symlink", "truncate"):
        setattr(os, name, dying(getattr(os, name)))
    kernel.exchange = dying(kernel.exchange)
    builtins.open = dying(open, lambda file, mode="r", *args, **kwargs: bool(set(mode) & set("wxa+")))


def rank_of_two(rank: int, meeting: Path, save_dir: Path, case: str, number: int) -> None:
    """Save as a training would. Doesn't return."""
    status = 1
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        if "without exchange" in case:
            kernel.exchange = lambda one, other: False
        dist.barrier()
        if rank == 0:
            kill_before(number)
        sample = Sample(world_size=2, step=STEP)
        # Raises on rank 1 when rank 0 is killed; unless everything was said before
        with contextlib.suppress(CheckpointWriteError):
            save_checkpoint(
                save_dir / "tag", sample.rank(rank), sample.shared if rank == 0 else None, group=dist.group.WORLD
            )
        if rank == 0 and "pruned" in case:
            Retention(3).apply(save_dir)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def save_in_two_processes(meeting: Path, save_dir: Path, case: str, number: int) -> bool:
    """Whether rank 0 was killed before it came to its end."""
    ranks = []
    for rank in range(2):
        ranks.append(os.fork())
        if ranks[rank] == 0:
            rank_of_two(rank, meeting, save_dir, case, number)
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + SURVIVOR_SECONDS
    while len(statuses) < 2:
        for rank in {0, 1} - set(statuses):
            pid, status = os.waitpid(ranks[rank], os.WNOHANG)
            if pid:
                statuses[rank] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for rank in {0, 1} - set(statuses):
                os.kill(ranks[rank], signal.SIGKILL)
        time.sleep(0.001)
    assert statuses[1] == 0, f"rank 1 ended with {statuses[1]} when rank 0 was killed before change {number}"
    assert statuses[0] in (0, -signal.SIGKILL), statuses
    return statuses[0] != 0


@pytest.mark.parametrize("case", list(CASES))
@distributed(world_size=1, process_group=False)
def test_a_save_that_is_killed_before_any_change_of_the_file_system_leaves_sound_checkpoints(
    tmp_path: Path, case: str
) -> None:
    before, fewest = CASES[case]
    number, died = 0, True
    while died:
        number += 1
        save_dir = tmp_path / str(number)
        for tag, step in before.items():
            Sample(step=step).save(save_dir / tag)
        died = save_in_two_processes(tmp_path / f"meeting-{number}", save_dir, case, number)

        with warnings.catch_warnings():
            warnings.simplefilter("error")  # `latest` itself names it, and nothing stands in
            latest = Checkpoint(resolve(save_dir), verify="full")
        assert latest.manifest.step in (STEP, max(before.values()))
        expected = Sample(step=latest.manifest.step).state_dict
        for name, tensor in latest.state_dict().items():
            assert bool((tensor.contiguous() == expected[name]).all()), name
        for tag in commit.list_tags(save_dir):
            assert tag.complete, tag.problem
            Checkpoint(tag.path, verify="full")

        Sample(step=STEP + 1).save(save_dir / "next")
        assert not [name for name in os.listdir(save_dir) if name.startswith(".")], f"after change {number}"
        assert commit.read_latest(save_dir) == "next"
    assert latest.manifest.step == STEP
    assert number > fewest, f"{number - 1} changes were seen"
    expected_tags = {*before, "tag", "next"} - ({"one"} if "pruned" in case else set())
    assert {tag.name for tag in commit.list_tags(save_dir)} == expected_tags
