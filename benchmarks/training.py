"""A Trainer that does nothing but train, on given token ids: what every contestant under Lightning runs in."""

from __future__ import annotations

import logging
import warnings
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.ranks import WORLD_SIZE


def quiet_trainer(strategy: Any, callback: Callback, **options: Any) -> Trainer:
    """Without logger, checkpoints, progress bar and summary."""
    return Trainer(
        accelerator="cpu",
        devices=WORLD_SIZE,
        strategy=strategy,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # every rank has batches of its own: half of them would end the epoch in mid-run
        **options,
    )


def token_batches(count: int, rows: int, tokens: int, vocabulary: int) -> list[Tensor]:
    """Micro-batches of random ids, of shape (rows, tokens)."""
    return [torch.randint(0, vocabulary, (rows, tokens)) for _ in range(count)]


def loader(batches: list[Tensor]) -> DataLoader[Tensor]:
    """Gives them as they are."""
    return DataLoader(cast("Dataset[Tensor]", batches), batch_size=None)


def silence() -> None:
    """A rank's output is its figures."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
