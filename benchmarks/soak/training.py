"""The training that is soaked: the example itself, and what a callback beside it writes down for the judge.

It is `examples/train_gpt.py` with `configs/gpt_zero2.yaml`, a smaller model (`soak.yaml`) and one callback more. The
global batch is the same on one, two and three ranks, dropout is off, and the example's sampler deals out the same
windows at the same step whatever the number of ranks. So a run that was killed and resumed has to see the data of an
undisturbed one, step by step, and to have its loss but for the order of summation.

| file | of | holds |
|---|---|---|
| `journal.jsonl` | a chain | what is committed and resumed ([Note: the journal]), and the validation's losses |
| `run-…-rank-….steps` | a rank | for each step the loss and a sum over the windows that it had (`STEP`) |
| `run-…-rank-….memory` | a rank | its memory, open files and threads, half-way between two saves |
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from benchmarks.kills.training import CHECKPOINTS, Journal
from benchmarks.soak import EXAMPLES

ROOT = EXAMPLES.parent
GLOBAL_BATCH = 12
"""Windows of all ranks in a step; one, two and three divide it."""

BLOCK_SIZE = 64
KEEP_LAST = 3
STOP_AT = "stop-at"
"""A file of a chain's directory: the step at which a run ends in order."""

STEP = np.dtype([("step", "<i8"), ("loss", "<f8"), ("windows", "<u8")])
"""`windows` is the sum of the CRC-32 of each window: sums of ranks add up, in whatever order."""


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        directory: of the chain that it belongs to.
        run: its number in the chain.
        world_size: how many ranks.
        seed: of the model's first values and of the order of the data.
        save_every: steps between two saves.
        niceness: what is added to the ranks' own.
    """

    directory: Path
    run: int
    world_size: int
    seed: int
    save_every: int
    niceness: int = 0

    @property
    def save_dir(self) -> Path:
        """Where the tags are."""
        return self.directory / CHECKPOINTS

    def log(self, rank: int) -> Path:
        """Where a rank's output goes."""
        return self.directory / f"run-{self.run:03d}-rank-{rank}.log"

    def train(self, rank: int) -> None:
        """What a rank does, until it is killed: the example's own command."""
        import train_gpt

        os.nice(self.niceness)
        os.chdir(self.directory)  # the paths in soak.yaml are relative
        sys.argv = [
            str(EXAMPLES / "train_gpt.py"),
            "fit",
            f"--config={ROOT / 'configs' / 'gpt_zero2.yaml'}",
            f"--config={Path(__file__).with_name('soak.yaml')}",
            f"--seed_everything={self.seed}",
            f"--data.seed={self.seed}",
            f"--data.block_size={BLOCK_SIZE}",
            f"--data.batch_size={GLOBAL_BATCH // self.world_size}",
            f"--trainer.devices={self.world_size}",
            "--trainer.callbacks+=lightning_zero.ZeroCheckpoint",
            f"--trainer.callbacks.dirpath={CHECKPOINTS}",
            f"--trainer.callbacks.every_n_train_steps={self.save_every}",
            f"--trainer.callbacks.keep_last={KEEP_LAST}",
            "--trainer.callbacks.async_save=true",
            "--trainer.callbacks+=benchmarks.soak.training.Witness",
            f"--trainer.callbacks.directory={self.directory}",
            f"--trainer.callbacks.run={self.run}",
            f"--trainer.callbacks.rank={rank}",
            f"--trainer.callbacks.save_every={self.save_every}",
        ]
        train_gpt.main()


def read_steps(run: Settings, rank: int) -> np.ndarray:
    """All whole records so far, of `STEP`."""
    path = _records(run.directory, run.run, rank, "steps")
    raw = path.read_bytes() if path.exists() else b""
    return np.frombuffer(raw[: len(raw) // STEP.itemsize * STEP.itemsize], STEP)


def read_memory(run: Settings, rank: int) -> list[dict[str, float]]:
    """All whole lines so far."""
    path = _records(run.directory, run.run, rank, "memory")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _records(directory: Path, run: int, rank: int, ending: str) -> Path:
    return directory / f"run-{run:03d}-rank-{rank}.{ending}"


def memory_now() -> dict[str, int]:
    """This process's memory in bytes, its open files, and its threads.

    `resident` is all of it; `anonymous` is what isn't a file's, so what a leak of tensors or objects would be in.
    """
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    kibibytes = {"resident": "VmRSS", "anonymous": "RssAnon"}
    found = {name: int(fields[field].split()[0]) * 1024 for name, field in kibibytes.items()}
    return {**found, "files": len(os.listdir("/proc/self/fd")), "threads": int(fields["Threads"])}


class Witness(Callback):
    """Writes down what the judge wants to know; it changes nothing, but ends a run that was told where to end.

    Args:
        directory: of the chain.
        run: its number in the chain.
        rank: who writes.
        save_every: steps between two saves.
    """

    def __init__(self, directory: str, run: int, rank: int, save_every: int) -> None:
        where = Path(directory)
        self._rank, self._save_every, self._stop_at = rank, save_every, where / STOP_AT
        self._journal = Journal(where, where / CHECKPOINTS, run, rank)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._steps = os.open(_records(where, run, rank, "steps"), flags, 0o644)
        self._memory = os.open(_records(where, run, rank, "memory"), flags, 0o644)
        self._judge = multiprocessing.parent_process()

    @override
    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._rank == 0:
            self._journal.write("resumed", step=trainer.global_step, path=str(trainer.ckpt_path or ""))

    @override
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._rank == 0:
            self._journal.note_latest()
        if self._judge is not None and not self._judge.is_alive():
            os._exit(1)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        windows = sum(zlib.crc32(row.tobytes()) for row in batch.numpy().astype(np.uint8))
        # one call: a record is there, or it is not
        os.write(self._steps, np.array([(step, float(outputs["loss"]), windows)], STEP).tobytes())
        if step % self._save_every == self._save_every // 2:
            sample = {"step": step, "at": time.time(), **memory_now()}
            os.write(self._memory, (json.dumps(sample) + "\n").encode())
            if self._stop_at.exists() and step >= int(self._stop_at.read_text()):
                trainer.should_stop = True

    @override
    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._rank == 0:
            loss = math.log(float(trainer.callback_metrics["val/perplexity"]))
            self._journal.write("validated", step=trainer.global_step, loss=loss)
