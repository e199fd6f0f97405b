"""The training that is killed: one rank of it, and what it writes down for the judge.

[Note: the ledger]
Beside a small network that learns, the module holds a ledger: parameters whose gradient is 1 on every rank at every
step. With a momentum of 1 the optimizer's state is then the number of steps S, and a parameter is -S (S + 1) / 2 times
the learning rate, a power of two: exact in fp32, on any number of ranks. So every element on disk, and every element
that a resumed rank holds, says which step it is of; a mixture of two saves can't pass for either.

[Note: the journal]
Rank 0 appends a line when it has resumed, and for every save that is known to be committed: in mode `sync` when the
save returns, in mode `async` when `latest` names it. A line that is there was written before the kill; so what it says
must hold after it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

Mode = Literal["sync", "async"]

CHECKPOINTS = "ckpts"
JOURNAL = "journal.jsonl"
LEDGER_SIZES = (400_000, 300_001, 200_000, 99_991, 7)
LEARNING_RATE = 2.0**-10
LAST_EXACT_STEP = 5000
"""The ledger's S (S + 1) / 2 is below 2**24 until here."""


@dataclass(frozen=True)
class Retention:
    """How `ZeroCheckpoint` names and keeps tags in one chain of runs.

    Attributes:
        name: for the report.
        options: of `ZeroCheckpoint`, beside `keep_last=3`.
        best: the tags that it may keep for their score.
        every: it keeps the tags of each multiple of this step, too; 0: it doesn't.
        exchange: False: as on a file system that can't exchange two directories.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    best: int = 0
    every: int = 0
    exchange: bool = True

    def most_tags(self, step: int) -> int:
        """How many tags there may be after a save that has pruned."""
        return 3 + self.best + (step // self.every if self.every else 0)


RETENTIONS = (
    Retention("keep_last=3"),
    Retention("one tag, replaced", {"filename": "always"}),
    Retention("keep_last=3, keep_every_n_steps=10", {"keep_every_n_steps": 10}, every=10),
    Retention("one tag, replaced without exchange", {"filename": "always"}, exchange=False),
    Retention("keep_last=3, best 2", {"monitor": "score", "save_top_k": 2}, best=2),
)


@dataclass(frozen=True)
class Settings:
    """One run of a chain.

    Attributes:
        directory: of the chain: the checkpoints, the journal, the ranks' output.
        run: its number in the chain.
        world_size: how many ranks.
        mode: how it saves.
        retention: what it keeps.
        every_n_steps: how often it saves.
        stage: of ZeRO.
        last_step: at which the run ends, if nobody kills it before.
    """

    directory: Path
    run: int
    world_size: int
    mode: Mode
    retention: Retention
    every_n_steps: int
    stage: int
    last_step: int = LAST_EXACT_STEP

    @property
    def save_dir(self) -> Path:
        """Where the tags are."""
        return self.directory / CHECKPOINTS

    def log(self, rank: int) -> Path:
        """Where a rank's output goes."""
        return self.directory / f"run-{self.run:03d}-rank-{rank}.log"

    def train(self, rank: int) -> None:
        """What a rank does."""
        train(self, rank)


def ledger_values(step: int) -> tuple[float, float]:
    """What every parameter of the ledger, and its momentum, is after so many steps."""
    return -LEARNING_RATE * (step * (step + 1) // 2), float(step)


def read_journal(directory: Path) -> list[dict[str, Any]]:
    """All whole lines so far."""
    try:
        text = (directory / JOURNAL).read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


class Journal:
    """What one rank writes down: see [Note: the journal]."""

    def __init__(self, directory: Path, save_dir: Path, run: int, rank: int) -> None:
        self._save_dir, self._run, self._rank = save_dir, run, rank
        self._fd = os.open(directory / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._committed = -1

    def write(self, event: str, **what: Any) -> None:
        line = {"run": self._run, "rank": self._rank, "event": event, **what}
        os.write(self._fd, (json.dumps(line) + "\n").encode())  # one call: a line is there, or it is not

    def note_latest(self) -> int:
        """Write down what is committed, and give back its step."""
        save_dir = self._save_dir
        try:
            tag = (save_dir / "latest").read_text()
            step = int(json.loads((save_dir / tag / "manifest.json").read_text())["step"])
            settled = (save_dir / "latest").read_text() == tag
        except FileNotFoundError:  # nothing yet; or the tag is replaced under our eyes, by the thread that saves
            return self._committed
        if settled and step != self._committed:
            self._committed = step
            self.write("committed", step=step, tag=tag)
        return step


def train(settings: Settings, rank: int) -> None:
    """One rank: resume, and train until somebody kills it. The environment says who it is."""
    import multiprocessing
    import random
    import time

    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.utils.data import DataLoader, Dataset

    from lightning_zero import ZeroCheckpoint, ZeroStrategy
    from lightning_zero.checkpoint import kernel

    if not settings.retention.exchange:
        kernel.exchange = lambda one, other: False
    journal = Journal(settings.directory, settings.save_dir, settings.run, rank)
    judge = multiprocessing.parent_process()
    moments = random.Random(os.getpid())

    class Module(LightningModule):
        steps: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(16, 64), torch.nn.Dropout(0.1), torch.nn.ReLU(), torch.nn.Linear(64, 16)
            )
            self.ledger = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(size)) for size in LEDGER_SIZES)
            self.frozen = torch.nn.Parameter(torch.arange(1000.0), requires_grad=False)
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.steps += 1
            self.log("score", float(self.trainer.global_step * 7919 % 101))
            time.sleep(moments.uniform(0, 0.01))
            loss: torch.Tensor = (self.net(batch) - batch).pow(2).mean()
            return loss + torch.stack([part.sum() for part in self.ledger.parameters()]).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            groups = [
                {"params": list(self.net.parameters()), "lr": 1e-2, "momentum": 0.9},
                {"params": list(self.ledger), "lr": LEARNING_RATE, "momentum": 1.0},
            ]
            return torch.optim.SGD(groups)

    class Witness(Callback):
        """Looks whether what was loaded is all of the step that was resumed from, and writes it down."""

        def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
            assert isinstance(module, Module)
            assert isinstance(trainer.strategy, ZeroStrategy)
            step = trainer.global_step
            expected, momentum = ledger_values(step)
            wrong = [] if int(module.steps) == step else [f"the buffer says {int(module.steps)}"]
            for name, parameter in module.ledger.named_parameters():
                if not bool((parameter == expected).all()):
                    wrong.append(f"ledger.{name} is {sorted(set(parameter.tolist()))[:5]} and not {expected}")
                state = trainer.strategy.full_state(parameter)
                for key, value in (("param", expected), ("momentum_buffer", momentum)):
                    if (key in state or step) and not bool((state[key] == value).all()):
                        found = sorted(set(state[key].tolist()))[:5]
                        wrong.append(f"{key} of ledger.{name} is {found} and not {value}")
            if wrong:
                journal.write("mismatch", step=step, text="; ".join(wrong))
                raise AssertionError(f"resumed at step {step}, but {wrong}")
            if rank == 0:
                journal.write("resumed", step=step, path=str(trainer.ckpt_path or ""))

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if rank == 0 and settings.mode == "async":
                journal.note_latest()
            if judge is not None and not judge.is_alive():
                os._exit(1)

    class NotingTrainer(Trainer):
        def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
            super().save_checkpoint(*arguments, **options)
            if rank == 0:
                committed = journal.note_latest()
                if settings.mode == "sync" and committed != self.global_step:
                    text = f"the save has returned, and latest names step {committed}"
                    journal.write("mismatch", step=self.global_step, text=text)

    trainer = NotingTrainer(
        accelerator="cpu",
        devices=settings.world_size,
        strategy=ZeroStrategy(stage=settings.stage, bucket_size_mb=1),
        max_steps=settings.last_step,
        max_epochs=-1,
        callbacks=[
            Witness(),
            ZeroCheckpoint(
                settings.save_dir,
                keep_last=3,
                every_n_train_steps=settings.every_n_steps,
                async_save=settings.mode == "async",
                **settings.retention.options,
            ),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    rows = cast("Dataset[torch.Tensor]", torch.randn(256 * 2 * settings.world_size, 16))
    trainer.fit(Module(), DataLoader(rows, batch_size=2), ckpt_path="last")
