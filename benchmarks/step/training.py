"""One rank of one contestant, in a process of its own: it trains, and prints what that took.

Everything is imported before the memory that counts as the imports' is read, and by every contestant: Lightning,
lightning_zero, FSDP2 and DCP. DeepSpeed's own import counts as an import too, where it is the contestant.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from typing_extensions import override

import lightning_zero  # noqa: F401  (registers the strategies)
from benchmarks.gpt import GPT, Size
from benchmarks.memory import peak_mib
from benchmarks.peers import DeepSpeed, ForwardAndBackward, Fsdp2, Steps
from benchmarks.ranks import Figures
from benchmarks.training import loader, quiet_trainer, silence, token_batches

WARM_UP_STEPS = 2
"""They touch memory for the first time, and are not counted."""

ROWS, TOKENS, VOCABULARY = 2, 128, 8192


class GPTWithZeroRedundancy(GPT):
    """torch's own stage 1, which wraps the optimizer; under DDP."""

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.AdamW, lr=self.learning_rate)


class Clock(Callback):
    """Whole optimizer steps, from end to end: what the loop does between two of them counts too."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        if trainer.global_step > len(self.ends):
            self.ends.append(time.perf_counter())


@dataclass(frozen=True)
class Training:
    """What is trained, and how long."""

    size: Size
    steps: int
    accumulate: int

    def batches(self) -> list[Tensor]:
        return token_batches(self.steps * self.accumulate, ROWS, TOKENS, VOCABULARY)


Contestant = Callable[[Training], list[float]]
"""Trains, and gives back when each step ended."""


def under_trainer(strategy: str, model: type[GPT] = GPT) -> Contestant:
    def train(training: Training) -> list[float]:
        clock = Clock()
        trainer = quiet_trainer(strategy, clock, max_steps=training.steps, accumulate_grad_batches=training.accumulate)
        trainer.fit(model(training.size), loader(training.batches()))
        return clock.ends

    return train


def in_plain_loop(make: Callable[[GPT, Training], Steps]) -> Contestant:
    def train(training: Training) -> list[float]:
        dist.init_process_group("gloo")
        peer, ends = make(GPT(training.size), training), []
        batches = iter(training.batches())
        for _ in range(training.steps):
            peer.step([next(batches) for _ in range(training.accumulate)])
            ends.append(time.perf_counter())
        return ends

    return train


def deepspeed_stage(stage: int) -> Contestant:
    return in_plain_loop(
        lambda module, training: DeepSpeed(module, stage=stage, accumulate=training.accumulate, rows=ROWS)
    )


CONTESTANTS: dict[str, Contestant] = {
    "ddp": under_trainer("ddp"),
    "zero_redundancy": under_trainer("ddp", GPTWithZeroRedundancy),
    "fsdp2_keeping": in_plain_loop(lambda module, _: Fsdp2(module, reshard=False)),
    "fsdp2_resharding": in_plain_loop(lambda module, _: Fsdp2(module, reshard=True)),
    "deepspeed_1": deepspeed_stage(1),
    "deepspeed_2": deepspeed_stage(2),
    "deepspeed_3": deepspeed_stage(3),
    "zero_stage_1": under_trainer("zero_stage_1"),
    "zero_stage_2": under_trainer("zero_stage_2"),
    "alone": in_plain_loop(lambda module, _: ForwardAndBackward(module)),
}


def train(contestant: str, training: Training) -> Figures:
    if contestant.startswith("deepspeed"):
        importlib.import_module("deepspeed")
    base = peak_mib()
    ends = CONTESTANTS[contestant](training)
    seconds = [end - before for before, end in itertools.pairwise(ends)]
    return {"seconds": seconds[WARM_UP_STEPS - 1 :], "base_mib": base, "peak_mib": peak_mib()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--accumulate", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    arguments = parser.parse_args()
    silence()
    torch.manual_seed(0)
    size = Size(arguments.layers, heads=8, width=arguments.width, vocabulary=VOCABULARY, context=TOKENS)
    figures = train(arguments.contestant, Training(size, arguments.steps, arguments.accumulate))
    figures["parameters"] = sum(p.numel() for p in GPT(size).parameters())
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
