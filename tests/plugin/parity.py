"""Fits beside stock DDP: the same module, seed, data and options, under both, on the same ranks."""

import os

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, seed_everything
from torch import nn

from lightning_zero import ZeroStrategy
from tests.models import Rows, quiet_trainer

EXACT = {"rtol": 0.0, "atol": 0.0}
ROUNDED = {"rtol": 2e-5, "atol": 2e-6}  # another order of summation


class OneStep(torch.optim.Optimizer):
    """An optimizer of somebody's own: it evaluates its closure, if it gets one, and then updates, without gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss


class Plain(LightningModule):
    """Two layers, a normalisation, one optimizer; what a test is about is put on top of it."""

    def __init__(self, optimizer=torch.optim.AdamW, **optimizer_options):
        super().__init__()
        self.optimizer, self.optimizer_options = optimizer, {"lr": 1e-2, **optimizer_options}
        self.net = nn.Sequential(nn.Linear(8, 24, bias=False), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 8))
        self.losses = []

    def loss(self, batch):
        batch = batch.to(next(self.parameters()).dtype)
        loss = (self.net(batch) - batch).pow(2).mean()
        self.losses.append(float(loss.detach()))
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.optimizer_options)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Rows(), batch_size=4)


class ByHand(Plain):
    """Manual optimization in its shortest form."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def fit(make, strategy, callbacks=(), ckpt_path=None, **options):
    """Fit what `make()` gives; callbacks are made by calling them."""
    seed_everything(3, verbose=False)
    model = make()
    trainer = quiet_trainer(
        strategy,
        # Lightning takes its variables out of the environment when a fit ends, and leaves the process group.
        world_size=dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"]),
        callbacks=[callback() for callback in callbacks],
        **{"max_epochs": 2, **options},
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    return model, trainer


def assert_equals_ddp(make, *, stages=(1, 2), tolerance=EXACT, ddp="ddp", strategy_options=None, **options):
    """Fit under DDP and under ZeroStrategy, and compare everything in the state dict, and the losses.

    Returns:
        The last module and its Trainer.
    """
    theirs, _ = fit(make, ddp, **options)
    for stage in stages:
        ours, trainer = fit(make, ZeroStrategy(stage=stage, **(strategy_options or {})), **options)
        assert_same_modules(ours, theirs, tolerance)
    return ours, trainer


def assert_same_modules(ours, theirs, tolerance=EXACT):
    got, expected = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(expected)
    for name in got:
        torch.testing.assert_close(
            got[name], expected[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), **tolerance)
