"""Small LightningModules and data that the tests share."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from lightning_zero import ZeroStrategy

FSDP2_TRAINS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
"""torch 2.6's asks a stream of the CPU for an event, which that can't give."""


class Rows(Dataset):
    """Random rows, the same in every process."""

    def __init__(self, length: int = 64) -> None:
        self.rows = torch.randn(length, 8, generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


class Data(LightningDataModule):
    """Resumable rows; their order by torchdata's own sampler, or by the one that Lightning injects."""

    def __init__(self, sampler: str = "own") -> None:
        super().__init__()
        self.sampler = sampler

    def train_dataloader(self):
        if self.sampler != "own":
            return StatefulDataLoader(Rows(), batch_size=4, shuffle=self.sampler == "injected, shuffled")
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        sampler = StatefulDistributedSampler(Rows(), num_replicas=world_size, rank=rank, seed=5)
        return StatefulDataLoader(Rows(), batch_size=4, sampler=sampler)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(Rows(16), batch_size=4)


class Model(LightningModule):
    """Dropout, BatchNorm's buffers, a tied weight, a frozen layer, two param groups and a scheduler."""

    def __init__(self, width: int = 24, dropout: float = 0.3, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(11)
        self.into = nn.Linear(8, width, bias=False)  # its bias would have no gradient, before a norm
        self.norm = nn.BatchNorm1d(width)
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.out = nn.Linear(width, 8, bias=False)
        self.out.weight = nn.Parameter(self.out.weight.detach().clone())
        self.tied = nn.Linear(width, 8, bias=False)
        self.tied.weight = self.out.weight
        self.register_buffer("big", torch.tensor([20000007, 2**60 + 1]))
        self.losses: list[float] = []

    def forward(self, x):
        x = torch.relu(self.norm(self.into(x)))
        x = nn.functional.dropout(self.frozen(x), self.hparams["dropout"], self.training)
        return self.out(x) + self.tied(x)

    def training_step(self, batch, batch_idx):
        batch = batch.to(self.into.weight.dtype)
        loss = (self(batch) - batch).pow(2).mean()
        self.losses.append(float(loss))
        return loss

    def validation_step(self, batch, batch_idx):
        batch = batch.to(self.into.weight.dtype)
        self.log("val_loss", (self(batch) - batch).pow(2).mean().float(), sync_dist=True)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": trained[:2]}, {"params": trained[2:], "weight_decay": 0.1}]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["learning_rate"])
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def quiet_trainer(strategy=None, *, world_size, callbacks=(), **options) -> Trainer:
    """A Trainer that prints and logs nothing; one of `world_size` ranks that somebody else has started."""
    return Trainer(
        strategy=strategy if strategy is not None else ZeroStrategy(),
        callbacks=list(callbacks),
        **{
            "accelerator": "cpu",
            "devices": world_size,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
            **options,
        },
    )


def fit(model=None, strategy=None, *, world_size, ckpt_path=None, seed=3, data=None, **options):
    """Seed, fit, and give back the model and its Trainer."""
    seed_everything(seed, verbose=False)
    model = model or Model()
    trainer = quiet_trainer(strategy, world_size=world_size, **options)
    trainer.fit(model, datamodule=data or Data(), ckpt_path=ckpt_path)
    return model, trainer
