"""A small GPT over bytes, and text for it that every Python installation has: the standard library's source.

Nothing in this file knows how it is trained: it is an ordinary `LightningModule` and an ordinary
`LightningDataModule`, so a checkpoint of it loads wherever Lightning and this file are.

The model is the pre-norm decoder of GPT-2 (Radford et al. 2019, https://openai.com/index/better-language-models)
with the bytes themselves as its 256 tokens. Shapes in comments: B sequences, T positions, C channels.
"""

import itertools
import math
import sysconfig
import time
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics.text import Perplexity
from typing_extensions import override

VOCABULARY_SIZE = 256


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron; each reads a normalised copy of its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.attention_out(self._attend(self.attention_norm(x))))
        return x + self._drop(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)))))

    def _attend(self, x: Tensor) -> Tensor:
        # (B, T, 3C) -> three of (B, heads, T, C / heads)
        query, key, value = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return attended.transpose(1, 2).flatten(2)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class GPT(LightningModule):
    """A byte-level GPT.

    Args:
        block_size: The longest context, in bytes.
        layers: How many blocks.
        heads: Attention heads in each block; must divide `width`.
        width: Channels of the residual stream.
        dropout: 0 suits a run that sees each byte once.
        learning_rate: The peak, reached after the warm-up.
        weight_decay: For matrices only: gains and biases are not decayed.
        warmup_steps: Optimizer steps of linear warm-up.
        decay_steps: The step at which the cosine has come down to a tenth of the peak. Not read from the
            Trainer: a run that stops early and resumes must find the same schedule.
    """

    def __init__(
        self,
        block_size: int = 128,
        layers: int = 4,
        heads: int = 5,
        width: int = 160,
        dropout: float = 0.0,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 30,
        decay_steps: int = 500,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.save_hyperparameters()
        self.block_size = block_size
        self.dropout = dropout
        self.token_embedding = nn.Embedding(VOCABULARY_SIZE, width)
        self.position_embedding = nn.Embedding(block_size, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.final_norm = nn.LayerNorm(width)
        self.validation_perplexity = Perplexity()
        self._initialise(layers)

    def _initialise(self, layers: int) -> None:
        """Normal weights; 2 * layers branches add to one sum, so each starts that much smaller."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            std = 0.02 / math.sqrt(2 * layers) if name.endswith("_out.weight") else 0.02
            nn.init.normal_(parameter, std=std)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """From bytes, int64 (B, T) with T <= block_size, to the next byte's logits, (B, T, 256)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        x = self.final_norm(self.blocks(F.dropout(x, self.dropout, self.training)))
        return F.linear(x, self.token_embedding.weight)  # the head is the embedding: one tensor, two uses

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self(batch[:, :-1])
        # float(): sums over a vocabulary lose too much in bf16
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def on_validation_start(self) -> None:
        # precision="bf16-true" casts a metric's running sums with the model; they need more digits than that
        self.validation_perplexity.set_dtype(torch.float32)

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validation_perplexity(self(batch[:, :-1]).float(), batch[:, 1:])
        self.log("val/perplexity", self.validation_perplexity, prog_bar=True)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.hparams["weight_decay"]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["learning_rate"], betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _learning_rate_factor(self, step: int) -> float:
        warmup: int = self.hparams["warmup_steps"]
        decay: int = self.hparams["decay_steps"]
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, decay - warmup))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    @torch.inference_mode()
    def generate(
        self, prompt: bytes, max_new_bytes: int, temperature: float = 1.0, top_k: int | None = None
    ) -> Iterator[int]:
        """Yields bytes that go on from `prompt`, one at a time, drawn from torch's global random generator.

        Args:
            prompt: At least one byte; the model sees the last `block_size` of them.
            max_new_bytes: How many to yield.
            temperature: Below 1 is safer, above 1 wilder; 0 always takes the likeliest byte.
            top_k: Draw from the k likeliest bytes only.
        """
        tokens = torch.tensor([list(prompt)], device=self.device)  # (1, T)
        for _ in range(max_new_bytes):
            logits = self(tokens[:, -self.block_size :])[0, -1]  # (256,)
            if temperature == 0:
                token = logits.argmax(keepdim=True)
            else:
                likeliest, candidates = logits.topk(top_k or VOCABULARY_SIZE)
                choice = torch.multinomial(torch.softmax(likeliest / temperature, dim=-1), num_samples=1)
                token = candidates[choice]
            tokens = torch.cat((tokens, token[None]), dim=1)
            yield int(token)


class Windows(Dataset[Tensor]):
    """A text cut into windows of `block_size` inputs, with one byte more for the last one's target."""

    def __init__(self, text: bytes, block_size: int) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.block_size = block_size

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.block_size

    @override
    def __getitem__(self, index: int) -> Tensor:
        start = index * self.block_size
        return self.text[start : start + self.block_size + 1].long()


class ElasticSampler(DistributedSampler[int]):
    """A shuffling `DistributedSampler` that a run can resume from in the middle of an epoch.

    Lightning stores the training data's state from rank 0 and hands that one state to every rank, so it may
    hold nothing of a rank's own. Ours is the number of windows that all ranks together have drawn of the epoch's
    permutation, so that the run may also go on with another number of processes, or another batch size.
    """

    _drawn = 0  # by this rank in this epoch
    _resume_epoch = 0
    _resume_at = 0

    @override
    def __iter__(self) -> Iterator[int]:
        # Runs at the first draw, so after Lightning's set_epoch. A checkpoint from an epoch's last batch resumes
        # in the next epoch, at its beginning.
        self._drawn = self._resume_at if self.epoch == self._resume_epoch else 0
        self._resume_at = 0
        for index in itertools.islice(super().__iter__(), self._drawn, None):
            self._drawn += 1
            yield index

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "drawn_by_all_ranks": self._drawn * self.num_replicas}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._resume_epoch = state_dict["epoch"]
        self._resume_at = state_dict["drawn_by_all_ranks"] // self.num_replicas


class StandardLibrary(LightningDataModule):
    """The source of Python's standard library, as windows of bytes in random order.

    Files go to training or validation by a hash of their path, so the split is the same on every rank and in
    every run, and no file is in both.

    Args:
        block_size: Bytes that the model sees in a window; the window has one more, the last target.
        batch_size: Windows a rank in one step.
        validation_fraction: The share of files that are held out.
        seed: Of the order of the windows.
    """

    # Not code that one would learn Python from: other people's packages, tests, tables and help pages.
    SKIPPED_FOLDERS = frozenset(
        ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
    )

    def __init__(
        self, block_size: int = 128, batch_size: int = 8, validation_fraction: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.seed = seed

    @override
    def setup(self, stage: str) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        training: list[bytes] = []
        validation: list[bytes] = []
        for path in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
            if not self.SKIPPED_FOLDERS.isdisjoint(path.split("/")):
                continue
            held_out = zlib.crc32(path.encode()) / 2**32 < self.validation_fraction
            (validation if held_out else training).append((root / path).read_bytes())
        if not (training and validation):
            raise FileNotFoundError(f"no .py files to train on and to hold out under {root}")
        self.training_windows = Windows(b"\n\n".join(training), self.block_size)
        self.validation_windows = Windows(b"\n\n".join(validation), self.block_size)

    @override
    def train_dataloader(self) -> DataLoader[Tensor]:
        trainer = self.trainer
        sampler = ElasticSampler(
            self.training_windows,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=self.seed,
            drop_last=True,
        )
        loader: DataLoader[Tensor] = StatefulDataLoader(
            self.training_windows, batch_size=self.batch_size, sampler=sampler, drop_last=True
        )
        return loader

    @override
    def val_dataloader(self) -> DataLoader[Tensor]:
        # Lightning shares it out among the ranks
        return DataLoader(self.validation_windows, batch_size=self.batch_size)


class TokensPerSecond(Callback):
    """Logs how many tokens all ranks together train on in a second, over the last `window_steps` batches.

    Counts everything between the batches, such as waiting for data or for a checkpoint, but not validation.
    """

    def __init__(self, window_steps: int = 20) -> None:
        self._ends: deque[float] = deque(maxlen=window_steps + 1)  # of batches, in seconds

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        self._ends.append(time.perf_counter())
        if len(self._ends) < 2:
            return
        seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        tokens = batch.shape[0] * (batch.shape[1] - 1) * trainer.world_size
        pl_module.log("tokens/s", tokens / seconds, prog_bar=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ends.clear()
