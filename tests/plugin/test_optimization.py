"""Every way of driving optimizers that Lightning has, beside stock DDP."""

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler
from lightning.pytorch.plugins import LayerSync
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_zero import ZeroCheckpoint, ZeroStrategy
from lightning_zero.engine.buffers import StateMemory
from tests.launch import distributed, run_ranks
from tests.plugin.parity import ROUNDED, Plain, assert_equals_ddp, assert_same_modules, fit


class Gan(Plain):
    """Two networks, two optimizers, each toggled for its turn; the critic steps more often, and is clamped."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.critic = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        del self.net

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        self.toggle_optimizer(critic)
        assert not any(p.requires_grad for p in self.generator.parameters())
        fake = self.generator(batch).detach()
        loss = self.critic(fake).mean() - self.critic(batch).mean()
        critic.zero_grad()
        self.manual_backward(loss)
        critic.step()
        self.untoggle_optimizer(critic)
        with torch.no_grad():
            for parameter in self.critic.parameters():
                parameter.clamp_(-0.1, 0.1)
        self.losses.append(float(loss.detach()))
        if batch_idx % 3 == 0:
            with generator.toggle_model():
                assert not any(p.requires_grad for p in self.critic.parameters())
                loss = -self.critic(self.generator(batch)).mean()
                generator.zero_grad()
                self.manual_backward(loss)
                generator.step()
            self.losses.append(float(loss.detach()))

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.generator.parameters(), lr=1e-2),
            torch.optim.RMSprop(self.critic.parameters(), lr=1e-2),
        )


@distributed(world_size=2, process_group=False)
def test_a_gan_with_toggled_optimizers_of_different_frequency_equals_ddp():
    assert_equals_ddp(Gan, ddp="ddp_find_unused_parameters_true")


class GradientPenalty(Gan):
    """A second derivative on the way, and closures instead of plain steps."""

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()

        def of_critic():
            real = batch.clone().requires_grad_()
            score = self.critic(real)
            (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
            loss = (
                self.critic(self.generator(batch).detach()).mean()
                - score.mean()
                + (slope.norm(dim=1) - 1).pow(2).mean()
            )
            critic.zero_grad()
            self.manual_backward(loss)
            self.losses.append(float(loss.detach()))

        def of_generator():
            loss = -self.critic(self.generator(batch)).mean()
            generator.zero_grad()
            self.manual_backward(loss)
            self.losses.append(float(loss.detach()))

        with critic.toggle_model():
            critic.step(closure=of_critic)
        with generator.toggle_model():
            generator.step(closure=of_generator)


@distributed(world_size=2, process_group=False)
def test_closures_and_a_gradient_penalty_equal_ddp():
    assert_equals_ddp(GradientPenalty, ddp="ddp_find_unused_parameters_true")


class SeveralBackwards(Plain):
    """Manual accumulation: three backwards, of which the first two don't have to travel, and then a step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        last = (batch_idx + 1) % 3 == 0
        with optimizer.toggle_model(sync_grad=last):
            self.manual_backward(self.loss(batch) / 3)
        if last:
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            optimizer.zero_grad()


@distributed(world_size=2, process_group=False)
def test_several_backwards_between_steps_equal_ddp():
    assert_equals_ddp(SeveralBackwards, tolerance=ROUNDED)


class TwoLosses(Plain):
    """Two backwards through one graph, and a parameter that both reach."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        hidden = self.net[:3](batch)
        first, second = (self.net[3](hidden) - batch).pow(2).mean(), hidden.abs().mean()
        optimizer.zero_grad()
        self.manual_backward(first, retain_graph=True)
        self.manual_backward(second)
        optimizer.step()
        self.losses.append(float(first.detach()))


@distributed(world_size=2, process_group=False)
def test_two_losses_of_one_graph_equal_ddp():
    assert_equals_ddp(TwoLosses, tolerance=ROUNDED, ddp="ddp_find_unused_parameters_true")


class SteppedByHand(Plain):
    """A parameter that no optimizer holds, stepped on by hand as in plain PyTorch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.scale = nn.Parameter(torch.ones(8))

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(batch * self.scale)
        self.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        with torch.no_grad():
            self.scale -= 0.1 * self.scale.grad

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


@distributed(world_size=2, process_group=False)
def test_the_gradient_of_a_parameter_that_no_optimizer_holds_is_averaged():
    assert_equals_ddp(SteppedByHand)


class WithoutOptimizers(Plain):
    def configure_optimizers(self):
        return None


@distributed(world_size=2, process_group=False)
def test_a_module_without_optimizers_is_fitted():
    assert_equals_ddp(WithoutOptimizers, max_epochs=1)


class SkippingSteps(Plain):
    """An `optimizer_step` of its own: a warm-up of the learning rate, and every second step left out."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (self.trainer.global_step + 1) / 4)
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


@distributed(world_size=2, process_group=False)
def test_an_overridden_optimizer_step_equals_ddp():
    assert_equals_ddp(SkippingSteps)


@distributed(world_size=2, process_group=False)
def test_accumulation_that_changes_as_training_goes_equals_ddp():
    # 8 batches an epoch: windows of 1, then of 3, whose last is partial, then of 5.
    scheduler = lambda: GradientAccumulationScheduler({0: 1, 1: 3, 2: 5})  # noqa: E731
    assert_equals_ddp(Plain, tolerance=ROUNDED, callbacks=[scheduler], max_epochs=3)


@distributed(world_size=2, process_group=False)
def test_accumulation_that_has_changed_is_resumed_in_the_middle_of_an_epoch(tmp_path):
    scheduler = lambda: GradientAccumulationScheduler({0: 1, 1: 2})  # noqa: E731
    save = lambda: ZeroCheckpoint(tmp_path, every_n_train_steps=9, save_top_k=-1)  # noqa: E731
    whole, _ = fit(Plain, ZeroStrategy(), callbacks=[scheduler, save])
    after, trainer = fit(Plain, ZeroStrategy(), callbacks=[scheduler], ckpt_path=tmp_path / "step=9.ckpt")
    assert trainer.global_step == 12
    whole.losses = whole.losses[10:]
    assert_same_modules(after, whole)


class EarlyMicroBatches(Plain):
    """A layer that takes part in a window's first micro-batch alone."""

    def __init__(self):
        super().__init__()
        self.early = nn.Linear(8, 8)

    def training_step(self, batch, batch_idx):
        if batch_idx % 4 == 0:
            batch = batch + self.early(batch)
        return self.loss(batch)


@distributed(world_size=2, process_group=False)
def test_gradients_that_come_only_in_early_micro_batches_are_stepped_on():
    assert_equals_ddp(
        EarlyMicroBatches, tolerance=ROUNDED, ddp="ddp_find_unused_parameters_true", accumulate_grad_batches=4
    )


class Odd(Plain):
    """Parameters of every kind: never used, used twice, tied, frozen, 0-d, empty, of several dtypes and layouts."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.twice.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.wide = nn.Parameter(torch.ones(8, dtype=torch.float64))
        self.turned = nn.Parameter(torch.randn(6, 8).t())
        self.conv = nn.Conv2d(1, 4, 3, padding=1).to(memory_format=torch.channels_last)

    def training_step(self, batch, batch_idx):
        hidden = self.twice(torch.tanh(self.twice(batch))) + self.tied(batch) + self.frozen(batch) * self.scalar
        hidden = (hidden * self.wide).float() @ self.turned @ self.turned.t()
        hidden = hidden + self.conv(hidden.view(-1, 1, 2, 4)).mean(1).view(-1, 8) + self.empty.sum()
        return self.loss(hidden)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)  # the frozen ones among them


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_of_every_kind_equal_ddp(world_size):
    run_ranks(odd_parameters, world_size, process_group=False)


def odd_parameters():
    # fp64 and channels-last parameters beside others: see "Known limits" in docs/design.md
    assert_equals_ddp(Odd, ddp="ddp_find_unused_parameters_true", tolerance=ROUNDED)


class Checkpointed(Plain):
    """Activation checkpointing of the one kind or the other."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def training_step(self, batch, batch_idx):
        hidden = batch.clone().requires_grad_()
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=self.reentrant)
        return self.loss(hidden)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_either_kind_equals_ddp(reentrant):
    run_ranks(activation_checkpointing, 2, reentrant, process_group=False)


def activation_checkpointing(reentrant):
    assert_equals_ddp(lambda: Checkpointed(reentrant))


class Unfreeze(BaseFinetuning):
    """Freezes the first layers, and gives them to the optimizer in the second epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1e-3)


class UnfreezeAgain(Unfreeze):
    """Lightning's callback restores the param groups of a resumed fit, and leaves the layers frozen."""

    def on_fit_start(self, trainer, pl_module):
        if self._restarting:
            self.make_trainable(pl_module.net[0])
        super().on_fit_start(trainer, pl_module)


class UnfreezeLate(Unfreeze):
    """Freezes when DDP has seen that the layers are to be trained: it never averages the others' gradients."""

    def setup(self, trainer, pl_module, stage):
        pass

    def on_train_start(self, trainer, pl_module):
        self.freeze_before_training(pl_module)
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        trainer.optimizers[0].param_groups[0]["params"] = trained


class Trained(Plain):
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@distributed(world_size=2, process_group=False)
def test_layers_that_are_unfrozen_in_mid_fit_equal_ddp():
    options = {"callbacks": [UnfreezeLate], "max_epochs": 3, "ddp": "ddp_find_unused_parameters_true"}
    assert_equals_ddp(Trained, **options)
    first, _ = fit(Trained, ZeroStrategy(), callbacks=[Unfreeze], max_epochs=3)
    late, _ = fit(Trained, ZeroStrategy(), callbacks=[UnfreezeLate], max_epochs=3)
    assert_same_modules(first, late)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_fit_with_unfrozen_layers_is_resumed(tmp_path, precision):
    run_ranks(unfrozen_again, 2, tmp_path, precision, process_group=False)


def unfrozen_again(directory, precision):
    options = {"callbacks": [UnfreezeAgain], "precision": precision}
    whole, _ = fit(Trained, ZeroStrategy(), max_epochs=3, **options)
    _, trainer = fit(Trained, ZeroStrategy(), max_epochs=2, **options)
    trainer.save_checkpoint(directory / "tag")
    asked = []
    touch = StateMemory._touch
    StateMemory._touch = lambda memory, nbytes: (asked.append(nbytes), touch(memory, nbytes))
    resumed, trainer = fit(Trained, ZeroStrategy(), ckpt_path=directory / "tag", max_epochs=3, **options)
    resumed.losses = whole.losses
    assert_same_modules(resumed, whole)
    segments = trainer.strategy._partition.segments(trainer.optimizers[0])
    states = [value for segment in segments for value in segment.state.values() if value.dim()]
    assert sum(asked) <= sum(state.nbytes + 2 * StateMemory._ALIGNMENT for state in states)


class FailingAtItsStart(Callback):
    def on_train_start(self, trainer, pl_module):
        raise ValueError("the user's own")


@distributed(world_size=2, process_group=False)
def test_a_resume_that_fails_lets_go_of_the_memory_for_states(tmp_path):
    _, trainer = fit(Plain, ZeroStrategy())
    trainer.save_checkpoint(tmp_path / "tag")
    strategy = ZeroStrategy()
    with pytest.raises(ValueError, match="the user's own"):
        fit(Plain, strategy, ckpt_path=tmp_path / "tag", max_epochs=3, callbacks=[FailingAtItsStart])
    assert strategy._partition._state_memory._blocks == []


class GroupsByHand(Plain):
    """Param groups that are edited in place, past `add_param_group`."""

    def on_train_epoch_start(self):
        optimizer = self.optimizers().optimizer
        if self.current_epoch == 0:
            self.late = list(self.net[3].parameters())
            optimizer.param_groups[0]["params"] = list(self.net[:3].parameters())
        elif self.current_epoch == 1:
            optimizer.param_groups[0]["params"] += self.late

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[:3].parameters(), lr=1e-2, momentum=0.9)


class Replaced(Plain):
    """Begins each epoch but the first with other optimizers, as two idioms have it."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.trainer.strategy.setup_optimizers(self.trainer)
        elif self.current_epoch == 2:
            self.trainer.optimizers = [torch.optim.SGD(self.net[:3].parameters(), lr=1e-2, momentum=0.9)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_optimizers_that_are_replaced_in_mid_fit_equal_ddp(tmp_path, world_size):
    run_ranks(replaced, world_size, tmp_path, process_group=False)


class ReplacedBetweenBackwards(Plain):
    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=1e-2)]


def replaced(directory):
    assert_equals_ddp(ReplacedBetweenBackwards, accumulate_grad_batches=4, max_epochs=1, tolerance=ROUNDED)
    assert_equals_ddp(Replaced, max_epochs=3, strategy_options={"overlap_gather": True})
    epoch = 16 // dist.get_world_size()
    saving = ZeroCheckpoint(directory, every_n_train_steps=epoch + 1, async_save=True)
    whole, _ = fit(Replaced, ZeroStrategy(), [lambda: saving])
    half, _ = fit(Plain, ZeroStrategy(), ckpt_path=directory)
    half.losses = whole.losses
    assert_same_modules(half, whole)


class Renewed(Plain):
    """A parameter that is replaced by another of the same name."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net[3].bias = nn.Parameter(torch.zeros(8))
            self.optimizers().optimizer.param_groups[0]["params"][-1] = self.net[3].bias


@distributed(world_size=2, process_group=False)
def test_param_groups_that_are_edited_in_place_equal_ddp(tmp_path):
    assert_equals_ddp(GroupsByHand)
    _, trainer = fit(Renewed, ZeroStrategy())
    trainer.save_checkpoint(tmp_path / "renewed")
    whole, _ = fit(Renewed, ZeroStrategy(), max_epochs=3)
    half, _ = fit(Plain, ZeroStrategy(), max_epochs=3, ckpt_path=tmp_path / "renewed")
    half.losses = whole.losses
    assert_same_modules(half, whole)


class Buffers(Plain):
    """Buffers of all dtypes; BatchNorm, whose statistics differ from rank to rank before they are broadcast."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("short", torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(2**40))
        self.register_buffer("turned", torch.randn(3, 2).t())
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    def training_step(self, batch, batch_idx):
        self.count += 1 + self.trainer.global_rank
        self.turned += batch.mean()
        return self.loss(self.norm(batch))


@distributed(world_size=2, process_group=False)
def test_buffers_are_treated_as_ddp_treats_them():
    ours, _ = assert_equals_ddp(Buffers)
    theirs, _ = fit(Buffers, "ddp")
    assert torch.equal(ours.hidden, theirs.hidden)


@distributed(world_size=2, process_group=False)
def test_without_broadcast_buffers_each_rank_keeps_its_own():
    from lightning.pytorch.strategies import DDPStrategy

    theirs, _ = fit(Buffers, DDPStrategy(broadcast_buffers=False))
    ours, _ = fit(Buffers, ZeroStrategy(broadcast_buffers=False))
    assert_same_modules(ours, theirs)
    assert int(ours.count) - 2**40 == 16 * (1 + ours.global_rank)


class GatheredNorm(nn.BatchNorm1d):
    """BatchNorm over all ranks' batches, as SyncBatchNorm does it on GPUs alone."""

    def forward(self, x):
        from torch.distributed.nn.functional import all_gather

        whole = torch.cat(all_gather(x))
        return super().forward(whole)[dist.get_rank() * len(x) :][: len(x)]


class GatheredSync(LayerSync):
    """Swaps the class of every BatchNorm before training, and back after it."""

    def apply(self, model):
        for child in model.modules():
            if type(child) is nn.BatchNorm1d:
                child.__class__ = GatheredNorm
        return model

    def revert(self, model):
        for child in model.modules():
            if type(child) is GatheredNorm:
                child.__class__ = nn.BatchNorm1d
        return model


@distributed(world_size=2, process_group=False)
def test_synchronised_batch_norm_is_applied_reverted_and_equals_ddp():
    ours, _ = assert_equals_ddp(Buffers, plugins=[GatheredSync()])
    assert type(ours.norm) is nn.BatchNorm1d
    alone, _ = fit(Buffers, ZeroStrategy())
    assert not torch.equal(alone.norm.running_mean, ours.norm.running_mean)


class Sparse(Plain):
    """An embedding with sparse gradients."""

    def __init__(self):
        super().__init__(torch.optim.SGD)
        self.embedding = nn.Embedding(20, 8, sparse=True)

    def training_step(self, batch, batch_idx):
        return self.loss(self.embedding((batch[:, 0] * 5).long().abs() % 20))


@distributed(world_size=2, process_group=False)
def test_sparse_gradients_equal_ddp():
    assert_equals_ddp(Sparse)


class Watched(Callback):
    """Whole gradients after backward, as far as anybody holds one."""

    def __init__(self):
        self.most = 0

    def on_after_backward(self, trainer, pl_module):
        from lightning_zero.engine.stand_in import PartitionedGradient

        whole = [p.grad for p in pl_module.parameters() if type(p.grad) is not PartitionedGradient]
        self.most = max(self.most, sum(g.numel() for g in whole if g is not None))


@distributed(world_size=2, process_group=False)
def test_at_stage_two_no_rank_holds_a_whole_gradient_after_backward_even_when_accumulating():
    watched = Watched()
    fit(Plain, ZeroStrategy(stage=2), callbacks=[lambda: watched], accumulate_grad_batches=3, max_epochs=1)
    assert watched.most == 0


@distributed(world_size=2, process_group=False)
def test_a_frozen_backbone_in_the_optimizer_is_neither_stepped_on_nor_sent():
    ours, trainer = fit(Odd, ZeroStrategy())
    frozen = ours.frozen.weight
    bucket = trainer.strategy._partition._by_parameter[frozen]
    assert bucket.is_idle
    assert "momentum_buffer" not in trainer.strategy.full_state(frozen)
