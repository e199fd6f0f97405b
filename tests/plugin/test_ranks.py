"""What the ranks tell each other."""

import os
import time
import weakref
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import nn

from lightning_zero import ZeroStrategy
from lightning_zero.errors import CheckpointMismatchError, UnreachableRankError, UnsupportedModelError
from lightning_zero.plugin.alike import give_first_ranks_values
from lightning_zero.plugin.ranks import Ranks, _leave
from tests.launch import distributed, run_ranks
from tests.models import Model, fit


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


@pytest.mark.parametrize("fails", [False, True])
@distributed(world_size=2)
def test_the_others_wait_for_what_the_first_does_longer_than_the_time_out(fails):
    ranks, done = Ranks(timedelta(seconds=1)), []

    def work():
        time.sleep(2.5)
        done.append(dist.get_rank())
        if fails:
            raise CheckpointMismatchError("no")

    with pytest.raises(CheckpointMismatchError, match="no") if fails else nullcontext():
        ranks.done_by_first(work)
    assert done == ([0] if dist.get_rank() == 0 else [])
    assert ranks.everyones(lambda: [ranks.rank]) == [0, 1]
    ranks.release()


@distributed(world_size=2)
def test_the_others_are_told_when_the_first_is_interrupted():
    ranks = Ranks(None)

    def interrupt():
        raise KeyboardInterrupt

    first = dist.get_rank() == 0
    with pytest.raises(KeyboardInterrupt if first else RuntimeError, match="" if first else "rank 0 was interrupted"):
        ranks.done_by_first(interrupt)
    assert ranks.everyones(lambda: [ranks.rank]) == [0, 1]
    ranks.release()


@distributed(world_size=2, process_group=False)
def test_when_the_process_ends_nothing_of_a_strategy_that_is_left_holds_its_groups():
    _, trainer = fit(strategy=ZeroStrategy(), world_size=2, max_steps=1)
    ranks = trainer.strategy._ranks
    control = weakref.ref(ranks.control)
    _leave(weakref.ref(ranks))
    assert control() is None


@distributed(world_size=2)
def test_a_group_that_the_others_dont_come_to_make_is_an_error_that_says_so():
    if dist.get_rank() == 0:
        with pytest.raises(UnreachableRankError, match="rank 0 waited in vain"):
            Ranks(timedelta(seconds=1)).everyones(list)


@distributed(world_size=2)
def test_groups_go_while_their_threads_let_go_of_tensors():
    ranks = Ranks(None)
    for _ in range(50):  # up to torch 2.7 one of them hangs, left to itself
        for group in (ranks.control, ranks.behind):
            tensors = [torch.ones(1000) for _ in range(20)]
            works = [dist.reduce(tensor, 0, group=group, async_op=True) for tensor in tensors]
            for work in works:
                work.wait()
            del tensors, works, work, group
        ranks.renew()
    ranks.release()


class Own(Model):
    """Not the same on every rank."""

    def __init__(self, what):
        self.what = what if os.environ["RANK"] == "1" else ""
        super().__init__(width=32 if self.what == "shape" else 24)
        if self.what == "layer":
            self.more = nn.Linear(3, 3)
        if self.what == "frozen":
            self.into.requires_grad_(False)

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.what == "order":
            parameters.reverse()
        return (torch.optim.SGD if self.what == "optimizer" else torch.optim.Adam)(parameters, 0.1)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", r"modules differ: rank 0 has 'into.weight' of shape \(24, 8\).* rank 1 has .*\(32, 8\)"),
        ("layer", r"modules differ: rank 0 has nothing more, and rank 1 has 'more.weight'"),
        ("frozen", "modules differ: rank 0 has 'into.weight' .*trained, and rank 1 has 'into.weight' .*frozen"),
        ("optimizer", "optimizers or settings differ: rank 0 has 'into.weight' in Adam, .* in SGD"),
        ("order", "optimizers or settings differ"),
        ("stage", "rank 0 has stage=1, and rank 1 has stage=2"),
        ("bucket", "rank 0 has bucket_size_mb=25.0, and rank 1 has bucket_size_mb=1.0"),
    ],
)
def test_what_differs_between_the_ranks_is_named_on_all_before_training(what, message):
    run_ranks(differs, 2, what, message, process_group=False)


def differs(what, message):
    second = os.environ["RANK"] == "1"
    stage, size = 2 if second or what != "stage" else 1, 1 if second and what == "bucket" else 25
    with pytest.raises(UnsupportedModelError, match=message):
        fit(Own(what), ZeroStrategy(stage=stage, bucket_size_mb=size), world_size=2, max_steps=2)


@distributed(world_size=2)
def test_training_begins_with_the_first_ranks_values_and_what_is_alike_isnt_sent():
    rank, sent = dist.get_rank(), []
    torch.manual_seed(5)
    module = nn.ModuleList([nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Linear(2, 2)])
    module[2].weight = nn.Parameter(torch.randn(4, 2).t())
    module._ddp_params_and_buffers_to_ignore = ["3.weight", "1.running_var"]
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    if rank == 1:
        with torch.no_grad():
            for name in ("0.bias", "1.running_mean", "1.running_var", "3.weight"):
                module.state_dict()[name].add_(1)

    class Noting(Ranks):
        def give(self, tensors, giver):
            sent.extend(tensors)
            super().give(tensors, giver)

    noting = Noting(None)
    give_first_ranks_values(module, noting)
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name]) == (rank == 0 or name not in module._ddp_params_and_buffers_to_ignore)
    different = [module[0].bias, module[2].weight, module[1].running_mean]  # one of them isn't contiguous
    assert [tensor.data_ptr() for tensor in sent] == [tensor.data_ptr() for tensor in different]
    noting.release()


@distributed(world_size=2, process_group=False)
def test_a_checkpoint_that_does_not_fit_one_ranks_module_is_an_error_on_all(tmp_path):
    _, trainer = fit(Model(), ZeroStrategy(), world_size=2, max_steps=1)
    trainer.save_checkpoint(tmp_path / "tag")
    with pytest.raises(CheckpointMismatchError, match=r"rank 1: .* doesn't fit the module"):
        fit(Own("layer"), ZeroStrategy(), world_size=2, max_steps=2, ckpt_path=tmp_path / "tag")


@distributed(world_size=2, process_group=False)
def test_the_groups_of_fits_that_nobody_looks_at_any_more_are_let_go_of():
    count = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
    fit(strategy=ZeroStrategy(), world_size=2, max_steps=1)
    first = count()
    for _ in range(12):
        fit(strategy=ZeroStrategy(), world_size=2, max_steps=1)
    assert count() < first + 60  # 10 a fit, where none is let go of


class Parting(Callback):
    """The first rank dies without a word, and the other fails, and would save."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2:
            if trainer.is_global_zero:
                os._exit(3)
            time.sleep(1)
            raise ValueError("its own")

    def on_exception(self, trainer, *_):
        trainer.save_checkpoint("never")


def fail_beside_a_dead_rank(path):
    try:
        fit(Model(), ZeroStrategy(), world_size=2, max_steps=5, callbacks=[Parting()])
    except Exception as error:
        path.write_text(str(error))
        os._exit(1)  # what else is to be ended needs the dead one


def test_a_rank_keeps_its_own_error_where_the_one_that_has_the_store_is_dead(tmp_path):
    with pytest.raises(AssertionError, match="rank 0 of 2: died with exit code 3"):
        run_ranks(fail_beside_a_dead_rank, 2, tmp_path / "error", process_group=False)
    assert (tmp_path / "error").read_text() == "its own"
