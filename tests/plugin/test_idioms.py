"""What people write in training loops and optimizers, beside stock DDP: each once went wrong here, or nearly."""

import pytest
import torch
from torch import nn

from lightning_zero import ZeroStrategy
from lightning_zero.errors import UnsupportedModelError
from tests.launch import distributed, run_ranks
from tests.plugin.parity import ROUNDED, ByHand, OneStep, Plain, assert_equals_ddp, assert_same_modules, fit


class SharedGradient(Plain):
    """A gradient that autograd makes as a view of another: that of a parameter which is added to an activation."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.position = nn.Parameter(torch.zeros(32))

    def training_step(self, batch, batch_idx):
        return self.loss(self.before(batch) + self.position.view(4, 8))

    def configure_optimizers(self):
        others = [p for p in self.parameters() if p is not self.position]
        return [torch.optim.SGD([self.position], lr=0.1), torch.optim.SGD(others, lr=0.1)]


class BothSteps(SharedGradient):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()


@distributed(world_size=2, process_group=False)
def test_a_gradient_whose_memory_is_anothers_too_is_copied():
    assert_equals_ddp(BothSteps)


class Assigns(torch.optim.Optimizer):
    """Points parameters at new memory in each step, as hand-written optimizers do."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad
        return loss


class Sometimes(torch.optim.SGD):
    """Evaluates its closure in the first step alone."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure if self.steps == 1 else None)


class Ignores(torch.optim.SGD):
    """Never evaluates its closure."""

    def step(self, closure=None):
        return super().step()


class LooksAhead(torch.optim.SGD):
    """Moves the parameters before it evaluates its closure."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.9)
        with torch.enable_grad():
            return super().step(closure)


@distributed(world_size=2, process_group=False)
def test_optimizers_that_assign_data_or_ignore_closures_equal_ddp():
    assert_equals_ddp(lambda: Plain(Assigns))
    assert_equals_ddp(lambda: ByHand(Assigns))
    assert_equals_ddp(lambda: ByHand(Ignores))


@distributed(world_size=2, process_group=False)
def test_optimizers_that_would_step_on_parts_without_saying_so_are_refused():
    for kind, message in (
        (Sometimes, "evaluated its closure in earlier steps, and not in this one"),
        (LooksAhead, "moves parameters before its closure in a step"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            fit(lambda kind=kind: Plain(kind), ZeroStrategy(), max_epochs=1)


class Clipping(torch.optim.SGD):
    def __init__(self, params, lr, max_grad_norm=1.0):
        super().__init__(params, lr=lr)
        self.defaults["max_grad_norm"] = max_grad_norm


@distributed(world_size=2, process_group=False)
def test_an_optimizer_that_clips_by_a_global_norm_in_its_step_is_refused_by_its_argument():
    with pytest.raises(UnsupportedModelError, match=r"max_grad_norm=None, and let Trainer\(gradient_clip_val"):
        fit(lambda: Plain(Clipping), ZeroStrategy(), max_steps=1)
    fit(lambda: Plain(Clipping, max_grad_norm=None), ZeroStrategy(), max_steps=1)


class Hooked(Plain):
    """Step hooks: clipping before, an average of the weights after; they know the module's parameters."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        average = self.average = [p.detach().clone() for p in self.parameters()]

        def before(optimizer, args, kwargs):
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.05)

        def after(optimizer, args, kwargs):
            for mean, p in zip(average, self.parameters(), strict=True):
                mean.lerp_(p.detach(), 0.5)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        return optimizer


@distributed(world_size=2, process_group=False)
def test_step_hooks_see_the_users_parameters_before_and_after_the_step():
    theirs, _ = fit(lambda: ByHandHooked(torch.optim.SGD, momentum=0.9), "ddp")
    ours, _ = fit(lambda: ByHandHooked(torch.optim.SGD, momentum=0.9), ZeroStrategy())
    assert_same_modules(ours, theirs, ROUNDED)
    for mine, its in zip(ours.average, theirs.average, strict=True):
        torch.testing.assert_close(mine, its, **ROUNDED)

    assert_equals_ddp(ClippedInBackward, stages=(2,), max_steps=4)


class ByHandHooked(Hooked, ByHand):
    pass


class ClippedInBackward(Plain):
    """Each rank's own gradient is clipped when it comes, by a hook that is there from the start of training."""

    def on_train_start(self):
        def clip(parameter):
            parameter.grad.clamp_(-0.01, 0.01)

        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(clip)


class TwoOfOne(Plain):
    """Two optimizers on the same parameters, clipped together before both step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.zero_grad()
        self.manual_backward(self.loss(batch))
        if isinstance(self.trainer.strategy, ZeroStrategy):
            self.losses.append(float(self.trainer.strategy.clip_grad_norm_(0.1)))
        else:
            self.losses.append(float(nn.utils.clip_grad_norm_(self.parameters(), 0.1)))
        first.step()
        second.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.net[3].parameters(), lr=0.1)


@distributed(world_size=2, process_group=False)
def test_optimizers_that_share_parameters_share_their_gradients():
    assert_equals_ddp(TwoOfOne, tolerance=ROUNDED)


class NormsAgain(ByHand):
    """Norms before and after clipping."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.losses.append(float(self.net[0].weight.grad.norm()))
        self.clip_gradients(optimizer, 0.01, "norm")
        self.losses.append(float(self.net[0].weight.grad.norm()))
        nn.utils.clip_grad_norm_(self.parameters(), 0.005)
        optimizer.step()


@distributed(world_size=2, process_group=False)
def test_norms_are_those_of_the_gradients_as_they_are():
    assert_equals_ddp(lambda: NormsAgain(torch.optim.SGD), tolerance=ROUNDED)


def clipped_in_16_bits():
    class Touched(NormsAgain):
        def training_step(self, batch, batch_idx):
            self.clipped = []
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, 1e-3, "norm")
            for parameter in self.parameters():
                parameter.grad.nan_to_num_()
            self.clipped.append(float(self.trainer.strategy.grad_norm()))
            optimizer.step()

    model, _ = fit(lambda: Touched(torch.optim.SGD), ZeroStrategy(), precision="bf16-true", max_epochs=1)
    assert all(norm < 1.1e-3 for norm in model.clipped)


@pytest.mark.parametrize("world_size", [1, 2])
def test_clipped_16_bit_gradients_stay_clipped_when_they_are_touched(world_size):
    run_ranks(clipped_in_16_bits, world_size, process_group=False)


class ScheduleFree(torch.optim.SGD):
    """Moves the parameters between steps too, as schedule-free optimizers do in `eval` and `train`."""

    @torch.no_grad()
    def _move(self, factor):
        for group in self.param_groups:
            for p in group["params"]:
                if "momentum_buffer" in self.state[p]:
                    p.add_(self.state[p]["momentum_buffer"], alpha=factor)

    def eval(self):
        self._move(0.5)

    def train(self):
        self._move(-0.5)


class Evaluated(Plain):
    def on_train_epoch_end(self):
        self.optimizers().optimizer.eval()
        self.losses.append(float(sum(p.detach().sum() for p in self.parameters())))
        self.optimizers().optimizer.train()


@distributed(world_size=2, process_group=False)
def test_train_and_eval_of_a_schedule_free_optimizer_reach_all_parameters():
    assert_equals_ddp(lambda: Evaluated(ScheduleFree, momentum=0.9), tolerance=ROUNDED)


class Reptile(Plain):
    """Keeps the old weights by pointing the parameters at copies, and goes half the way back to them."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx % 3 == 0:
            self.old = [p.data for p in self.parameters()]
            for p in self.parameters():
                p.data = p.data.clone()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx % 3 == 2:
            for p, old in zip(self.parameters(), self.old, strict=True):
                p.data = old + 0.5 * (p.data - old)


@distributed(world_size=2, process_group=False)
def test_weights_that_were_kept_by_reference_are_left_alone():
    assert_equals_ddp(lambda: Reptile(torch.optim.SGD, momentum=0.9), max_epochs=3)


class Cached(Plain):
    """Gives every fit the same optimizer."""

    def configure_optimizers(self):
        if not hasattr(self, "made"):
            self.made = super().configure_optimizers()
        return self.made


def fit_twice(strategy):
    model, trainer = fit(lambda: Cached(torch.optim.SGD, momentum=0.9), strategy, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    return model


@distributed(world_size=2, process_group=False)
def test_an_optimizer_that_is_used_for_a_second_fit_goes_on():
    assert_same_modules(fit_twice(ZeroStrategy()), fit_twice("ddp"))


class FrozenInMidWindow(Plain):
    """A layer that rank 0 alone uses, and that is frozen before its gradient is reduced."""

    def __init__(self):
        super().__init__(torch.optim.SGD)
        self.extra = nn.Linear(8, 8)

    def training_step(self, batch, batch_idx):
        if batch_idx % 3 == 0 and self.global_rank == 0:
            batch = batch + self.extra(batch)
        return self.loss(batch)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.extra.requires_grad_(batch_idx % 3 == 2)


@distributed(world_size=2, process_group=False)
def test_a_layer_that_is_frozen_with_a_gradient_on_one_rank_does_not_stop_the_others():
    for stage in (1, 2):
        model, _ = fit(FrozenInMidWindow, ZeroStrategy(stage=stage, bucket_size_mb=1e-4), accumulate_grad_batches=3)
        assert len(model.losses) == 16


class UnusedBesideFrozen(Plain):
    """Rank 0 alone uses the layer whose bucket leaves first, and the optimizer holds a frozen layer too."""

    def __init__(self):
        super().__init__(torch.optim.SGD)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.extra = nn.Linear(8, 8)

    def training_step(self, batch, batch_idx):
        out = self.net(self.frozen(batch))
        if batch_idx == 0 or self.global_rank == 0:
            out = self.extra(out)
        loss = (out - batch).pow(2).mean()
        self.losses.append(float(loss.detach()))
        return loss


@distributed(world_size=2, process_group=False)
def test_a_layer_that_one_rank_alone_uses_beside_a_frozen_one_does_not_stop_the_ranks():
    """A backward waits for a bucket that the other rank sends after its own, before anything is agreed on."""
    for stage in (1, 2):
        model, _ = fit(UnusedBesideFrozen, ZeroStrategy(stage=stage, bucket_size_mb=1e-4))
        assert len(model.losses) == 16


class ByRatio(OneStep):
    """Scales by a matrix's ratio, as Muons do, and keeps a state of all that it is given."""

    def __init__(self, groups, lr=1e-2):
        super().__init__(groups, {"lr": lr})

    def update(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
                p.add_(p.grad, alpha=-group["lr"] * (p.shape[0] // p.shape[-1] + 1) / p.numel())


class OneAlone(Plain):
    """A parameter in a group of its own: one of two ranks owns nothing of it."""

    def configure_optimizers(self):
        return ByRatio([{"params": [p]} for p in self.net.parameters()])


@distributed(world_size=2, process_group=False)
def test_a_rank_that_owns_nothing_of_a_group_may_divide_by_sizes_and_keeps_one_state_for_it():
    module, trainer = assert_equals_ddp(OneAlone)
    assert len(trainer.optimizers[0].state) == len(list(module.parameters()))
