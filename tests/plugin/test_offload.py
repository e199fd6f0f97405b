"""Masters and states beside the parameters, and the optimizer stepping there: the same training, bit for bit.

torch takes `cpu:0` for another device than `cpu`, which stands for the GPU here; `tests/gpu` has a real one.
"""

import pytest
import torch
from lightning.pytorch import Callback

from lightning_zero import Fp32Export, ZeroCheckpoint, ZeroStrategy
from tests import models
from tests.launch import run_ranks
from tests.models import quiet_trainer
from tests.plugin.parity import ByHand, Plain, assert_same_modules, fit
from tests.plugin.test_optimization import Unfreeze
from tests.plugin.test_precision import Overflowing, Scaled


def offloaded(stage=2, **options):
    strategy = ZeroStrategy(stage=stage, offload_optimizer=True, **options)
    strategy._master_device = torch.device("cpu", 0)
    return strategy


class Apart(Callback):
    """Masters have memory of their own."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        parameters = [p.untyped_storage().data_ptr() for p in pl_module.parameters()]
        for optimizer in trainer.optimizers:
            segments = trainer.strategy.segments(optimizer)
            assert all(segment.master.untyped_storage().data_ptr() not in parameters for segment in segments)
            assert trainer.strategy.memory_bytes()["masters"] > 0


class Clamp(Callback):
    """Writes into the parameters between the steps, as WGAN's clamping does."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        for parameter in pl_module.parameters():
            parameter.data.clamp_(-0.2, 0.2)


def muon(params, lr):
    return torch.optim.Muon([p for p in params if p.dim() == 2], lr=lr)


BY_VALUE = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
CASES = {
    "fp32": (Plain, {}, ()),
    "bf16": (Plain, {"precision": "bf16-true"}, ()),
    "clipped": (Plain, {"gradient_clip_val": 0.05, "precision": "bf16-true"}, ()),
    "clipped by value": (
        lambda: Plain(torch.optim.SGD),
        BY_VALUE,
        (),
    ),
    "accumulated": (Plain, {"accumulate_grad_batches": 3}, ()),
    "written from outside": (Plain, {"precision": "bf16-true"}, (Clamp,)),
    "written from outside, fp32": (Plain, {}, (Clamp,)),
    "unfrozen": (Plain, {}, (Unfreeze,)),
    "by hand": (ByHand, {}, ()),
    "scaled": (lambda: Overflowing(torch.optim.AdamW), {}, ()),
}
if hasattr(torch.optim, "Muon"):  # it came with torch 2.9
    CASES["whole parameters"] = (lambda: Plain(muon), {}, ())


def parity(name, stage):
    make, options, callbacks = CASES[name]
    options = {"max_epochs": 2 if name == "unfrozen" else 1, **options}
    plugins = [{"plugins": [Scaled(growth_interval=3)]} if name == "scaled" else {} for _ in range(2)]
    theirs, _ = fit(make, ZeroStrategy(stage=stage), callbacks, **options, **plugins[0])
    ours, _ = fit(make, offloaded(stage), (*callbacks, Apart), **options, **plugins[1])
    assert_same_modules(ours, theirs)


def all_of_them(world_size):
    for name in CASES:
        for stage in (1, 2) if world_size > 1 and name in ("fp32", "bf16", "accumulated") else (2,):
            parity(name, stage)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_offloaded_optimizer_trains_as_one_that_is_not(world_size):
    run_ranks(all_of_them, world_size, world_size, process_group=False, timeout_seconds=200)


def whole_and_resumed(directory, precision):
    def run(strategy, callbacks=(), **options):
        options = {"max_epochs": 2, "precision": precision, **options}
        return models.fit(strategy=strategy, callbacks=list(callbacks), world_size=2, **options)

    whole, _ = run(offloaded())
    saving = ZeroCheckpoint(directory, every_n_train_steps=3, async_save=True)
    run(offloaded(), [saving, Fp32Export(directory / "model.ckpt")], max_steps=6)
    for strategy in (offloaded(), ZeroStrategy()):  # with the states here or there, as you like
        resumed, _ = run(strategy, ckpt_path=directory)
        resumed.losses = whole.losses
        assert_same_modules(resumed, whole)
    exported = models.Model.load_from_checkpoint(directory / "model.ckpt")
    assert all(p.dtype == torch.float32 for p in exported.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_it_is_saved_exported_and_resumed_bit_for_bit(tmp_path, precision):
    run_ranks(whole_and_resumed, 2, tmp_path, precision, process_group=False, timeout_seconds=200)


def twice(strategy):
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.configure_optimizers = lambda: optimizer
    for _ in range(2):
        quiet_trainer(strategy(), world_size=2, max_epochs=1).fit(model)
    return model


def both_twice():
    torch.manual_seed(0)
    theirs = twice(ZeroStrategy)
    torch.manual_seed(0)
    assert_same_modules(twice(offloaded), theirs)


def test_an_optimizer_that_is_used_for_a_second_fit_goes_on_with_its_states():
    run_ranks(both_twice, 2, process_group=False)


def masters_are_the_parameters():
    _, trainer = fit(Plain, "zero_stage_2_offload")
    assert trainer.strategy.memory_bytes()["masters"] == 0


def test_where_there_is_no_gpu_nothing_is_copied():
    run_ranks(masters_are_the_parameters, 1, process_group=False)
