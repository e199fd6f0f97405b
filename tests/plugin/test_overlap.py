"""The gather beside the next forward: nobody reads too early, and where somebody might, there is no overlap."""

import copy
import logging
import os
import pickle
import tempfile
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback, OnExceptionCheckpoint, StochasticWeightAveraging
from torch import nn

from lightning_zero import ZeroCheckpoint, ZeroStrategy, get_fp32_state_dict_from_zero_checkpoint
from lightning_zero.engine.collectives import ExchangeCollectives
from tests.launch import distributed
from tests.models import Rows, quiet_trainer
from tests.plugin.parity import ByHand, Plain, assert_equals_ddp, assert_same_modules, fit

under_way = set()


class Late:
    """Puts what was gathered in its place when it is waited for, and not before."""

    def __init__(self, flat, gathered, pending):
        self.flat, self.gathered, self.pending = flat, gathered, pending
        under_way.add(self)

    def wait(self):
        self.pending.wait()
        self.flat.copy_(self.gathered)
        under_way.discard(self)


def arrive_late():
    original = ExchangeCollectives.all_gather

    def all_gather(self, flat, shards):
        gathered = flat.clone()
        return Late(flat, gathered, original(self, gathered, shards))

    ExchangeCollectives.all_gather = all_gather


class Attention(Plain):
    """Has modules whose forward is never called, or not in every step, and a weight that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16, bias=False)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)  # multiplies by out_proj.weight
        self.seldom = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.ones(16))
        del self.net
        self.steps = 0
        self.beside = []

    def loss(self, batch):
        self.beside.append(len(under_way))
        x = self.embed(batch).unsqueeze(1)
        x = (x + self.attention(x, x, x)[0]).squeeze(1) * self.scale
        self.steps += 1
        if self.steps % 3 == 0:
            x = self.seldom(x)
        loss = (x @ self.embed.weight - batch).pow(2).mean()
        self.losses.append(float(loss.detach()))
        return loss


def options(**more):
    return {"bucket_size_mb": 1e-4, "overlap_gather": True, **more}


@distributed(world_size=2, process_group=False)
def test_with_it_training_equals_ddp():
    arrive_late()
    for make in (Plain, Attention):
        for accumulate in (1, 3):
            ours, _ = assert_equals_ddp(
                make,
                ddp="ddp_find_unused_parameters_true",
                strategy_options=options(),
                accumulate_grad_batches=accumulate,
                **({} if accumulate == 1 else {"tolerance": {"rtol": 2e-5, "atol": 2e-6}}),
            )
    assert any(ours.beside)


@distributed(world_size=2, process_group=False)
def test_validation_checkpoints_and_callbacks_at_an_epochs_end_see_what_the_step_has_made():
    arrive_late()

    class Looks(Callback):
        def __init__(self):
            self.seen = []

        def _look(self, trainer, module):
            self.seen.append(torch.cat([p.detach().reshape(-1).clone() for p in module.parameters()]))

        def on_validation_start(self, trainer, module):
            self._look(trainer, module)

        def on_train_epoch_end(self, trainer, module):
            self._look(trainer, module)

        def on_train_end(self, trainer, module):
            self._look(trainer, module)

        def on_save_checkpoint(self, trainer, module, checkpoint):
            self.seen.append(torch.cat([v.reshape(-1).clone() for v in checkpoint["state_dict"].values()]))

    class Validated(Plain):
        def validation_step(self, batch, batch_idx):
            pass

        def val_dataloader(self):
            return torch.utils.data.DataLoader(Rows(), batch_size=4)

    seen = []
    for strategy in (ZeroStrategy(bucket_size_mb=1e-4), ZeroStrategy(**options())):
        looks = Looks()
        with tempfile.TemporaryDirectory() as directory:
            trainer_options = {"val_check_interval": 2, "limit_val_batches": 1, "enable_checkpointing": True}
            saves = partial(ZeroCheckpoint, directory, every_n_train_steps=3)
            fit(Validated, strategy, callbacks=[saves, lambda looks=looks: looks], **trainer_options)
        seen.append(looks.seen)
    assert len(seen[0]) == len(seen[1]) > 5
    assert all(map(torch.equal, *seen))


@distributed(world_size=2, process_group=False)
def test_where_somebody_may_look_after_each_step_everything_is_there():
    arrive_late()

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    for name in ("lightning_utilities.core.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addHandler(handler)

    class Looks(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            assert not under_way

    class LooksItself(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            assert not under_way

    class StepsItself(Plain):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            assert not under_way

    class LooksByHand(ByHand):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            assert not under_way

    class Compiled(Plain):
        def __init__(self):
            super().__init__()
            self.net[0].compile(backend="eager")

    def does(trainer, module, *args):
        assert not under_way

    for make, callbacks, obstacle in (
        (Plain, [Looks], "Looks.on_train_batch_end"),
        (Plain, [lambda: LambdaCallback(on_train_batch_end=does)], "LambdaCallback.on_train_batch_end"),
        (LooksItself, [], "LooksItself.on_train_batch_start"),
        (StepsItself, [], "StepsItself.optimizer_step"),
        (LooksByHand, [], "manual optimization"),
        (Compiled, [], "compiled"),
        (Plain, [lambda: StochasticWeightAveraging(swa_lrs=1e-2)], None),
    ):
        lines.clear()
        fit(make, ZeroStrategy(**options()), callbacks=callbacks)
        said = [line for line in lines if "overlap_gather" in line]
        if os.environ["RANK"] == "0" and obstacle is not None:
            assert [obstacle in line for line in said] == [True]
        else:
            assert not said


@distributed(world_size=2, process_group=False)
def test_hooks_of_a_step_see_what_it_has_made_and_a_module_can_be_pickled_and_copied():
    arrive_late()
    copies = []

    class Hooked(Plain):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(self.look)
            return optimizer

        def look(self, *args):
            assert not under_way

        def loss(self, batch):
            loss = super().loss(batch)
            copies.extend([pickle.loads(pickle.dumps(self.net)), copy.deepcopy(self.net)])
            for copied in copies[-2:]:
                assert torch.equal(copied(batch), self.net(batch))
            return loss

    fit(Hooked, ZeroStrategy(**options()))
    assert copies


@distributed(world_size=2, process_group=False)
def test_a_second_fit_without_it_has_none():
    arrive_late()
    model = Plain()
    for overlap in (True, False):
        trainer = quiet_trainer(ZeroStrategy(**options(overlap_gather=overlap)), world_size=2, max_epochs=1)
        trainer.fit(model)
        assert any("Overlap" in type(callback).__name__ for callback in trainer.callbacks) == overlap
    theirs, _ = fit(Plain, ZeroStrategy())
    assert_same_modules(theirs, fit(Plain, ZeroStrategy(**options()))[0])


class Breaks(Plain):
    """Fails on every rank when a step's gather is under way."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 3:
            raise RuntimeError("something broke")
        return super().training_step(batch, batch_idx)


@distributed(world_size=2, process_group=False)
def test_what_a_step_has_made_is_saved_where_an_exception_comes_before_the_gather_is_over(tmp_path):
    with pytest.raises(RuntimeError, match="something broke"):
        fit(Breaks, ZeroStrategy(**options()), callbacks=[lambda: OnExceptionCheckpoint(tmp_path)])
    saved = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    expected, _ = fit(Plain, ZeroStrategy(), max_steps=3)
    assert all(torch.equal(saved[name], value) for name, value in expected.state_dict().items())


class Loads(Plain):
    """Loads where a step's gather is under way."""

    def __init__(self, directory):
        super().__init__()
        self.directory = directory

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 4:
            self.trainer.strategy.load_zero_checkpoint(self.directory)
        loss = super().training_step(batch, batch_idx)
        self.used = [parameter.detach().clone() for parameter in self.parameters()]
        return loss


@distributed(world_size=2, process_group=False)
def test_what_is_loaded_before_the_gather_is_over_stays(tmp_path):
    saved, trainer = fit(Plain, ZeroStrategy(), max_steps=2)
    trainer.strategy.save_zero_checkpoint(tmp_path)
    arrive_late()
    loaded, _ = fit(lambda: Loads(tmp_path), ZeroStrategy(**options()), max_steps=5)
    assert all(torch.equal(a, b) for a, b in zip(loaded.used, saved.parameters(), strict=True))
