"""What a load costs: its time, its memory beyond the state that stays, and a plain read of the same files beside it."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from benchmarks.gpt import GPT, Size
from benchmarks.machine import PIECE_BYTES, TAKES, Range, read_seconds, warm_buffer
from benchmarks.memory import peak_mib, reset_peak, resident_mib
from benchmarks.peers import state_bytes
from benchmarks.ranks import Figures
from benchmarks.training import loader, quiet_trainer, token_batches
from lightning_zero.checkpoint.load import Checkpoint


class LoadClock(Callback):
    """What the pieces of Lightning's resume take together, and need beyond the optimizer's states that stay."""

    PIECES = ("load_checkpoint", "load_model_state_dict", "load_optimizer_state_dict")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.figures: Figures = {}
        self._retained_mib = 0.0
        self._above_mib: list[float] = []

    def watch(self, strategy: Any) -> None:
        for name in self.PIECES:
            setattr(strategy, name, functools.partial(self._piece, getattr(strategy, name)))

    def _piece(self, piece: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        dist.barrier()  # as before a peer's load: what one rank's set-up takes longer is no part of the other's load
        reset_peak()
        before = resident_mib()
        began = time.perf_counter()
        result = piece(*args, **kwargs)
        self.seconds += time.perf_counter() - began
        self._above_mib.append(self._retained_mib + peak_mib() - before)
        self._retained_mib += resident_mib() - before
        return result

    def on_train_start(self, trainer: Trainer, *args: object) -> None:
        states_mib = state_bytes(trainer.optimizers[0]) / 2**20
        self.figures = {"load": self.seconds, "above_mib": beyond(max(self._above_mib), states_mib)}

    def on_train_end(self, trainer: Trainer, *args: object) -> None:
        """Once more, into the states that are there, where the strategy can."""
        load_again = getattr(trainer.strategy, "load_zero_checkpoint", None)
        if load_again is not None:
            dist.barrier()
            began = time.perf_counter()
            load_again(trainer.ckpt_path)
            self.figures["again"] = time.perf_counter() - began


def beyond(more_mib: float, states_mib: float) -> float:
    """Of the memory that a load has taken, what isn't the states'. They may lie in memory that was free already."""
    return max(0.0, more_mib - states_mib)


def resume(strategy: Any, size: Size, path: Path, step: int) -> Figures:
    """One fit that goes on for one step."""
    clock = LoadClock()
    clock.watch(strategy)
    trainer = quiet_trainer(strategy, clock, max_steps=step + 1)
    trainer.fit(GPT(size), loader(token_batches(step + 1, 1, 8, size.vocabulary)), ckpt_path=path)
    del trainer, strategy
    gc.collect()  # a Trainer and its module hold each other
    return clock.figures


def load_into(optimizer: torch.optim.Optimizer, load: Callable[[], None]) -> Figures:
    """A peer's load, where model and optimizer are made already."""
    states_before = state_bytes(optimizer)
    reset_peak()
    before = resident_mib()
    dist.barrier()
    began = time.perf_counter()
    load()
    took = time.perf_counter() - began
    new_states_mib = (state_bytes(optimizer) - states_before) / 2**20
    return {"load": took, "above_mib": beyond(peak_mib() - before, new_states_mib)}


def whole_files(path: Path, pattern: str) -> list[Range]:
    """All bytes of the files that a rank has to read."""
    files = sorted(path.rglob(pattern)) if path.is_dir() else [path]
    return [Range(file, 0, file.stat().st_size) for file in files if file.is_file()]


def fill_page_cache(path: Path) -> None:
    """Read all of a checkpoint once: its limit is a read from the page cache, which ours are written past."""
    buffer = bytearray(PIECE_BYTES)
    for each in whole_files(path, "*"):
        with open(each.path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def ranges_of_rank(path: Path) -> list[Range]:
    """Where our checkpoint has what this rank needs: the model, and its own part of the optimizer's states."""
    manifest = Checkpoint(path).manifest
    return [
        Range(path / file.name, stored.offset, stored.nbytes, stored.kind == "optimizer")
        for file in manifest.files
        for stored in file.tensors
        if stored.kind == "model" or (stored.kind == "optimizer" and file.rank == dist.get_rank())
    ]


class PlainReads:
    """Of a rank's ranges: into warm memory, and with what is new in a resumed process in new memory."""

    def __init__(self, ranges: list[Range]) -> None:
        self._ranges = ranges
        self._buffer = warm_buffer(sum(each.nbytes for each in ranges))

    def turn(self) -> Figures:
        warm = torch.split(self._buffer, [each.nbytes for each in self._ranges])
        fresh: list[Tensor] = [
            torch.empty(each.nbytes, dtype=torch.uint8) if each.is_new else part
            for each, part in zip(self._ranges, warm, strict=True)
        ]
        read_fresh = read_seconds(self._ranges, fresh)  # they are new once
        return {
            "read": statistics.median(read_seconds(self._ranges, warm) for _ in range(TAKES)),
            "read_fresh": read_fresh,
        }
