"""Trainings to forge, and what a checkpoint of ours holds of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.resolution import resolve
from tests.checkpoint.deepspeed.forger import Run
from tests.models import Model


def trained(**options: Any) -> Run:
    """The tests' own module with a random state in every place; dropout, buffers, a tie, a frozen layer, two groups."""
    module = Model()
    configured: Any = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    random = torch.Generator().manual_seed(1)
    step = options.get("step", 5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
            if parameter.requires_grad:
                states = {key: torch.rand(parameter.shape, generator=random) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), **states}
    module.norm.running_mean.uniform_(generator=random)
    for _ in range(step):
        optimizer._opt_called = True
        scheduler.step()
    return Run(module, optimizer, scheduler=scheduler.state_dict(), **options)


def assert_holds(save_dir: Path, run: Run, *, prefix: str = "", states: bool = True) -> Checkpoint:
    """Bit for bit: parameters, buffers, frozen parameters, ties, the optimizer's states and settings."""
    checkpoint = Checkpoint(resolve(save_dir), verify="full")
    stored = checkpoint.state_dict()
    expected = {prefix + name: value for name, value in run.module.state_dict().items()}
    assert set(stored) == set(expected)
    for name, value in expected.items():
        assert_same(stored[name].contiguous(), value, name)
    assert stored[f"{prefix}tied.weight"] is stored[f"{prefix}out.weight"]
    if not states:
        assert checkpoint.manifest.optimizers == ()
        return checkpoint
    saved = checkpoint.lightning_checkpoint()["optimizer_states"][0]
    names = [name for group in checkpoint.manifest.optimizers[0].parameters for name in group]
    parameters = dict(run.module.named_parameters())
    assert names == [
        prefix + run.names[p].removeprefix(run.prefix)
        for group in run.optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    ]
    for index, name in enumerate(names):
        for key, value in run.optimizer.state[parameters[name.removeprefix(prefix)]].items():
            assert_same(saved["state"][index][key].contiguous(), value, f"{key} of {name}")
    for ours, theirs in zip(saved["param_groups"], run.optimizer.param_groups, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[key] == theirs[key] for key in ours if key != "params")
    return checkpoint


def assert_same(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype, what
    assert torch.equal(ours, theirs), what
