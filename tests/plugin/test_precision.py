"""Precision and clipping in every way that users write them, beside stock DDP."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision
from lightning.pytorch.utilities import grad_norm
from torch import nn

from lightning_zero import ZeroStrategy
from lightning_zero.errors import UnsupportedModelError
from tests.launch import distributed, run_ranks
from tests.plugin.parity import ROUNDED, Plain, assert_equals_ddp, assert_same_modules, fit

# Two ranks sum the squares of parts in another order than one rank those of wholes.
CLIPPED = {"rtol": 1e-5, "atol": 1e-7}


def sgd(**options):
    return Plain(torch.optim.SGD, momentum=0.9, **options)


@distributed(world_size=2, process_group=False)
def test_mixed_and_double_precision_equal_ddp():
    for precision in ("bf16-mixed", "64-true"):
        assert_equals_ddp(Plain, precision=precision)


class Scaled(MixedPrecision):
    """fp16 with a scaler, on the CPU, where Lightning by itself makes bf16 of it."""

    def __init__(self, **options):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, **options))


class Overflowing(Plain):
    """On one rank alone, a gradient that is infinite in the third batch."""

    def __init__(self, kind=torch.optim.SGD, **options):
        super().__init__(kind, **options)
        self.scales, self.steps = [], 0

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if batch_idx == 2 and self.global_rank == self.trainer.world_size - 1:
            loss = loss * torch.tensor(float("inf"))
        return loss

    def on_train_batch_end(self, *args):
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())


def overflow(kind, clipped):
    options = {"gradient_clip_val": 0.05} if clipped else {}
    make = lambda: Overflowing(kind)  # noqa: E731
    theirs, _ = fit(make, "ddp", plugins=[Scaled(growth_interval=3)], **options)
    assert len(set(theirs.scales)) > 2  # it shrank at the overflow, and grew
    for stage in (1, 2):
        ours, _ = fit(make, ZeroStrategy(stage=stage), plugins=[Scaled(growth_interval=3)], **options)
        assert ours.scales == theirs.scales
        assert all(math.isfinite(float(p.detach().sum())) for p in ours.parameters())
        assert_same_modules(ours, theirs, CLIPPED)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_infinity_on_one_rank_skips_the_step_on_all_and_the_scale_is_ddps(world_size, clipped, kind):
    run_ranks(overflow, world_size, kind, clipped, process_group=False)


@distributed(world_size=2, process_group=False)
def test_a_fused_optimizer_that_unscales_by_itself_equals_ddp():
    fused = lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True)  # noqa: E731
    make = lambda: Overflowing(fused)  # noqa: E731
    theirs, _ = fit(make, "ddp", plugins=[Scaled()])
    ours, _ = fit(make, ZeroStrategy(), plugins=[Scaled()])
    assert ours.scales == theirs.scales
    assert_same_modules(ours, theirs, ROUNDED)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(make, ZeroStrategy(), plugins=[Scaled()], gradient_clip_val=0.1)


class ManuallyScaled(Overflowing):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@distributed(world_size=2, process_group=False)
def test_a_scaler_under_manual_optimization_equals_ddp():
    theirs, _ = fit(ManuallyScaled, "ddp", plugins=[Scaled()])
    ours, _ = fit(ManuallyScaled, ZeroStrategy(), plugins=[Scaled()])
    assert ours.scales == theirs.scales
    assert_same_modules(ours, theirs, CLIPPED)


class Reference(Callback):
    """Steps fp32 masters by hand, with the gradients that the 16-bit module has on all ranks."""

    def setup(self, trainer, pl_module, stage):
        self.masters = None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [trainer.strategy.full_grad(p) for p in pl_module.parameters()]
        if self.masters is None:
            self.masters = [p.detach().float().clone() for p in pl_module.parameters()]
            self.optimizer = torch.optim.AdamW(self.masters, lr=1e-2)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.float()
        self.optimizer.step()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_16_bit_parameters_are_the_rounding_of_fp32_masters(world_size, precision):
    run_ranks(masters, world_size, precision, process_group=False)


def masters(precision):
    reference = Reference()
    model, trainer = fit(Plain, ZeroStrategy(), precision=precision, callbacks=[lambda: reference])
    for parameter, master in zip(model.parameters(), reference.masters, strict=True):
        assert parameter.dtype == {"bf16-true": torch.bfloat16, "16-true": torch.float16}[precision]
        torch.testing.assert_close(trainer.strategy.full_state(parameter)["param"], master, **ROUNDED)
        assert torch.equal(parameter, trainer.strategy.full_state(parameter)["param"].to(parameter.dtype))


class OwnPlugin(MixedPrecision):
    """A plugin of the user's with hooks of its own."""

    def __init__(self):
        super().__init__("bf16-mixed", "cpu")
        self.steps = 0

    def optimizer_step(self, optimizer, model, closure, **kwargs):
        self.steps += 1
        return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)


@distributed(world_size=2, process_group=False)
def test_plugins_that_the_user_passes_are_used():
    for make in (OwnPlugin, DoublePrecision, lambda: HalfPrecision("bf16-true")):
        ours, trainer = fit(sgd, ZeroStrategy(), plugins=[make()], gradient_clip_val=0.1)
        plugin = trainer.precision_plugin
        assert type(plugin) is type(make())
        if isinstance(plugin, OwnPlugin):
            assert plugin.steps == 16
        if not isinstance(plugin, HalfPrecision):
            theirs, _ = fit(sgd, "ddp", plugins=[make()], gradient_clip_val=0.1)
            assert_same_modules(ours, theirs, CLIPPED)


# --- clipping ---


class ByTorch(Plain):
    """Torch's own clipping, called on the parameters as in any training loop."""

    def __init__(self, how):
        super().__init__(torch.optim.SGD, momentum=0.9)
        self.how, self.norms = how, []

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(self.how(list(self.parameters())))


WAYS = {
    "norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05),
    "foreach": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05, foreach=False),
    "infinity norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.01, norm_type=math.inf),
    "one norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.5, norm_type=1.0),
    "value": lambda parameters: nn.utils.clip_grad_value_(parameters, 1e-3),
    "total norm": lambda parameters: nn.utils.get_total_norm([p.grad for p in parameters]),
    "by hand": lambda parameters: [p.grad.mul_(0.5).clamp_(-1e-3, 1e-3).nan_to_num_() for p in parameters] and None,
    "divided": lambda parameters: [p.grad.div_(2) for p in parameters] and None,
    "one by one": lambda parameters: torch.stack([p.grad.norm() for p in parameters]),
    "data": lambda parameters: torch.stack([p.grad.data.norm(2) for p in parameters]),
    "foreach norms": lambda parameters: torch.stack(torch._foreach_norm([p.grad for p in parameters])),
    "foreach scale": lambda parameters: torch._foreach_mul_([p.grad for p in parameters], 0.5) and None,
}


@pytest.mark.parametrize("world_size", [3])
def test_what_torch_computes_with_gradients_it_computes_with_partitioned_ones(world_size):
    run_ranks(by_torch, world_size, process_group=False)


def by_torch():
    for name, how in WAYS.items():
        theirs, _ = fit(lambda how=how: ByTorch(how), "ddp", max_epochs=1)
        for stage in (1, 2):
            ours, _ = fit(lambda how=how: ByTorch(how), ZeroStrategy(stage=stage), max_epochs=1)
            for got, expected in zip(ours.norms, theirs.norms, strict=True):
                if expected is not None:
                    torch.testing.assert_close(got, expected, msg=name)
                    assert type(got) is torch.Tensor
            assert_same_modules(ours, theirs, ROUNDED)


@distributed(world_size=2, process_group=False)
def test_what_would_need_a_whole_gradient_is_an_error_with_a_way_out():
    for how in (
        lambda ps: [p.grad.abs() for p in ps],
        lambda ps: [torch.isnan(p.grad) for p in ps],
        lambda ps: [p.grad.mul_(torch.ones_like(p)) for p in ps],
        lambda ps: ps[0].grad.copy_(torch.ones_like(ps[0])),
    ):
        with pytest.raises(UnsupportedModelError, match=r"'net.0.weight' is partitioned.*full_grad\(parameter\)"):
            fit(lambda how=how: ByTorch(how), ZeroStrategy(), max_steps=1)


class Logged(Plain):
    """Gradient norms by Lightning's utility, and by the strategy."""

    def __init__(self):
        super().__init__(torch.optim.SGD)
        self.seen = []

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(grad_norm(self, norm_type=2))
        self.log_dict(self.seen[-1])
        if isinstance(self.trainer.strategy, ZeroStrategy):
            self.seen[-1]["strategy"] = self.trainer.strategy.grad_norm()
        else:
            self.seen[-1]["strategy"] = nn.utils.get_total_norm([p.grad for p in self.parameters()])


@distributed(world_size=2, process_group=False)
def test_lightnings_gradient_norms_and_the_strategys_are_ddps():
    theirs, _ = fit(Logged, "ddp", max_epochs=1)
    ours, trainer = fit(Logged, ZeroStrategy(), max_epochs=1)
    assert "grad_2.0_norm_total" in trainer.logged_metrics
    for got, expected in zip(ours.seen, theirs.seen, strict=True):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(torch.as_tensor(got[key]), torch.as_tensor(value), msg=key)


class Overridden(Plain):
    """`configure_gradient_clipping` as Lightning's documentation shows it, by turns."""

    def __init__(self):
        super().__init__(torch.optim.SGD, momentum=0.9)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        self.clip_gradients(
            optimizer,
            gradient_clip_val=0.02 * (1 + self.global_step % 2),
            gradient_clip_algorithm=("norm", "value")[self.global_step % 2],
        )


class ByStrategy(Plain):
    def __init__(self):
        super().__init__(torch.optim.SGD, momentum=0.9)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        if isinstance(self.trainer.strategy, ZeroStrategy):
            self.trainer.strategy.clip_grad_norm_(0.05)
        else:
            nn.utils.clip_grad_norm_(self.parameters(), 0.05)


@distributed(world_size=2, process_group=False)
def test_clipping_by_overridden_hooks_and_by_the_strategy_equals_ddp():
    assert_equals_ddp(Overridden, tolerance=CLIPPED)
    assert_equals_ddp(ByStrategy, tolerance=CLIPPED)


@distributed(world_size=2, process_group=False)
def test_the_whole_gradient_of_a_parameter_is_ddps():
    class Whole(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            strategy = trainer.strategy
            of = strategy.full_grad if isinstance(strategy, ZeroStrategy) else lambda p: p.grad
            self.seen = [of(p).clone() for p in pl_module.parameters()]

    ours, theirs = Whole(), Whole()
    fit(Plain, ZeroStrategy(), callbacks=[lambda: ours], max_steps=3)
    fit(Plain, "ddp", callbacks=[lambda: theirs], max_steps=3)
    for got, expected in zip(ours.seen, theirs.seen, strict=True):
        assert torch.equal(got, expected)
