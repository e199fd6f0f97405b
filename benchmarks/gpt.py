"""The model that is trained, saved and converted: a plain GPT-2, fp32, AdamW.

Its forward pass gives the loss, so that the same module trains under Lightning's Trainer and, wrapped by FSDP2 or by
DeepSpeed, in a plain loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override


@dataclass(frozen=True)
class Size:
    """How large a GPT is."""

    layers: int
    heads: int
    width: int
    vocabulary: int
    context: int = 1024


SIZES = {
    "tiny": Size(layers=1, heads=2, width=32, vocabulary=512, context=64),  # to see that the scripts run
    "small": Size(layers=6, heads=6, width=384, vocabulary=32768),  # 24 M parameters
    "124e6": Size(layers=12, heads=12, width=768, vocabulary=50257),  # GPT-2
    "203e6": Size(layers=12, heads=16, width=1024, vocabulary=50257),  # as deep, and as wide as GPT-2 medium
}


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm_1 = nn.LayerNorm(size.width)
        self.query_key_value = nn.Linear(size.width, 3 * size.width)
        self.projection = nn.Linear(size.width, size.width)
        self.norm_2 = nn.LayerNorm(size.width)
        self.widen = nn.Linear(size.width, 4 * size.width)
        self.narrow = nn.Linear(4 * size.width, size.width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(self.norm_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        wide: Tensor = self.narrow(functional.gelu(self.widen(self.norm_2(x))))
        return x + wide


class GPT(LightningModule):
    """A causal language model on given token ids; the head is the embedding, transposed."""

    learning_rate = 1e-5

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.uniform_(parameter, -0.03, 0.03)  # a normal distribution takes seconds

    @override
    def forward(self, batch: Tensor) -> Tensor:
        x = self.tokens(batch) + self.positions.weight[: batch.shape[1]]
        logits = self.norm(self.blocks(x)) @ self.tokens.weight.T
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch)
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
