"""What the ranks tell each other."""

import os

import pytest
import torch.distributed as dist

from lightning_zero import ZeroStrategy
from lightning_zero.errors import CheckpointMismatchError
from lightning_zero.plugin.ranks import Ranks
from tests.launch import distributed
from tests.models import fit


@distributed(world_size=2)
def test_the_ranks_hear_the_same_of_each_other_whether_it_is_short_or_long():
    ranks = Ranks(None)
    for lengths in ((1, 2), (1, 10**5), (10**5, 1), (4096, 4080)):
        assert ranks.everyones(lambda: [ranks.rank, "x" * lengths[ranks.rank]]) == [  # noqa: B023
            0,
            "x" * lengths[0],
            1,
            "x" * lengths[1],
        ]
    assert ranks.decided_by_first(lambda: f"{ranks.rank} " * 3000) == "0 " * 3000
    ranks.release()


@distributed(world_size=2)
def test_what_fails_on_one_rank_fails_on_all_with_its_words():
    ranks = Ranks(None)

    def fail():
        if dist.get_rank() == 1:
            raise CheckpointMismatchError("no " * 5000)

    with pytest.raises(CheckpointMismatchError, match="rank 1: no no"):
        ranks.all_or_none(fail)
    ranks.release()


@distributed(world_size=2)
def test_what_cant_be_told_on_one_rank_fails_on_all():
    ranks = Ranks(None)
    with pytest.raises(Exception, match="lambda"):
        ranks.everyones(lambda: [lambda: 1] if dist.get_rank() == 1 else [1])
    ranks.release()


@distributed(world_size=2, process_group=False)
def test_the_groups_of_fits_that_nobody_looks_at_any_more_are_let_go_of():
    count = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
    fit(strategy=ZeroStrategy(), world_size=2, max_steps=1)
    first = count()
    for _ in range(12):
        fit(strategy=ZeroStrategy(), world_size=2, max_steps=1)
    assert count() < first + 60  # 10 a fit, where none is let go of
