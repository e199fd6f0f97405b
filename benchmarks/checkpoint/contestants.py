"""One rank of one contestant, in a process of its own: it trains, saves or loads, and prints what that took.

| contestant | trains under | saves by | saves behind training by | loads by |
|---|---|---|---|---|
| `zero` | ZeroStrategy, stage 2 | `trainer.save_checkpoint` | the same, `async_save=True` | `fit(ckpt_path=...)` |
| `ddp` | DDPStrategy | the same: `torch.save` on rank 0 | | the same: `torch.load` on every rank |
| `fsdp2` | FSDP2 in a plain loop | `dcp.save` | `dcp.async_save` | `dcp.load`, `set_state_dict` |
| `deepspeed` | DeepSpeed ZeRO-2 in a plain loop | `save_checkpoint` | | `load_checkpoint` |

The loads read what the contestant's own save has left in the directory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from benchmarks.checkpoint.loading import PlainReads, fill_page_cache, load_into, ranges_of_rank, resume, whole_files
from benchmarks.checkpoint.saving import SaveBehind, SaveInTurns, Turns
from benchmarks.gpt import GPT, SIZES, Size
from benchmarks.peers import DeepSpeed, Fsdp2
from benchmarks.ranks import WORLD_SIZE, Figures
from benchmarks.training import loader, quiet_trainer, silence, token_batches
from lightning_zero import ZeroCheckpointIO, ZeroStrategy

CONTESTANTS = ("zero", "ddp", "fsdp2", "deepspeed")
STEPS_AT_MOST = 100_000  # whoever measures says when it is enough


@dataclass(frozen=True)
class Task:
    """What a rank is asked for."""

    contestant: str
    size: Size
    directory: Path
    turns: int
    tokens: int
    first: int

    @property
    def path(self) -> Path:
        """What the saves leave, and the loads read."""
        return self.directory / ("saved.ckpt" if self.contestant == "ddp" else "saved")

    @property
    def rank_bytes(self) -> int:
        """What a rank has to write: its part of the parameters and of both of AdamW's states."""
        return 3 * 4 * sum(p.numel() for p in GPT(self.size).parameters()) // WORLD_SIZE


# -------------------------------------------------------------------------------------------------- under Lightning


class AfterEachStep(Callback):
    """Calls the turns, and ends the training when they have had enough."""

    def __init__(self) -> None:
        self.turns: Turns

    def on_train_batch_start(self, *args: object) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: object) -> None:
        if not self.turns.after_step(self._began, time.perf_counter()):
            trainer.should_stop = True


def strategy_for(contestant: str, **options: Any) -> Any:
    if contestant == "ddp":
        return DDPStrategy()
    return ZeroStrategy(stage=2, checkpoint_io=ZeroCheckpointIO(**options))


def train_under_lightning(task: Task, strategy: Any, make_turns: Callable[[Trainer], Turns]) -> None:
    callback = AfterEachStep()
    trainer = quiet_trainer(strategy, callback, max_steps=STEPS_AT_MOST)
    callback.turns = make_turns(trainer)
    batches = token_batches(64, 1, task.tokens, task.size.vocabulary)
    trainer.fit(GPT(task.size), loader(batches * (STEPS_AT_MOST // 64)))


def save_and_watch(trainer: Trainer, path: Path, done: Callable[[], None]) -> None:
    """Our asynchronous save is durable when `latest` names it."""
    trainer.save_checkpoint(path)

    def watch() -> None:
        latest = path.parent / "latest"  # replaced last
        while not (latest.exists() and latest.read_text().strip() == path.name):
            time.sleep(0.02)  # more often, and the looking itself is 3 % of a step
        done()

    threading.Thread(target=watch, daemon=True).start()


def run_under_lightning(task: Task, part: str, figures: Figures) -> None:
    if part == "save":

        def in_turns(trainer: Trainer) -> Turns:
            options = {"turns": task.turns, "first": task.first}
            return SaveInTurns(figures, trainer.save_checkpoint, task.path, task.rank_bytes, **options)

        train_under_lightning(task, strategy_for(task.contestant), in_turns)
    elif part == "behind":

        def behind(trainer: Trainer) -> Turns:
            def begin(path: Path, done: Callable[[], None]) -> None:
                save_and_watch(trainer, path, done)

            return SaveBehind(figures, begin, task.directory, task.rank_bytes, turns=task.turns)

        train_under_lightning(task, strategy_for(task.contestant, async_save=True), behind)
    else:
        ours, reads = task.contestant == "zero", None
        fill_page_cache(task.path)
        for _ in range(task.turns):
            turn = resume(strategy_for(task.contestant), task.size, task.path, step=task.turns)
            # After the first load, so that this one's memory is a fresh process's
            reads = reads or PlainReads(ranges_of_rank(task.path) if ours else whole_files(task.path, "*"))
            turn |= reads.turn()
            if ours:
                everything = strategy_for("zero", verify="full")
                turn["full"] = resume(everything, task.size, task.path, step=task.turns)["load"]
            figures["turns"].append(turn)


# ------------------------------------------------------------------------------------------------- in a plain loop


def make_peer(task: Task) -> Fsdp2 | DeepSpeed:
    return Fsdp2(GPT(task.size), reshard=False) if task.contestant == "fsdp2" else DeepSpeed(GPT(task.size), stage=2)


def train_in_a_loop(task: Task, peer: Fsdp2 | DeepSpeed, turns: Turns) -> None:
    batches = token_batches(64, 1, task.tokens, task.size.vocabulary)
    for step in range(STEPS_AT_MOST):
        began = time.perf_counter()
        peer.step([batches[step % len(batches)]])
        if not turns.after_step(began, time.perf_counter()):
            return


def files_of_rank(task: Task) -> str:
    """Whose bytes a rank of a peer has to read; of DeepSpeed's, the model's file comes on top."""
    rank = dist.get_rank()
    return f"__{rank}_*.distcp" if task.contestant == "fsdp2" else f"*zero_pp_rank_{rank}_*"


def run_in_a_loop(task: Task, part: str, figures: Figures) -> None:
    dist.init_process_group("gloo")
    if part == "load":
        reads = None
        fill_page_cache(task.path)
        for _ in range(task.turns):
            peer = make_peer(task)
            turn = load_into(peer.optimizer, partial(peer.load, task.path))
            if reads is None:
                ranges = whole_files(task.path, files_of_rank(task))
                if task.contestant == "deepspeed":
                    ranges += whole_files(task.path, "mp_rank_*_model_states.pt")
                reads = PlainReads(ranges)
            figures["turns"].append(turn | reads.turn())
            del peer
            gc.collect()
        return
    peer = make_peer(task)
    turns: Turns
    if part == "save":
        options = {"turns": task.turns, "first": task.first}
        turns = SaveInTurns(figures, peer.save, task.path, task.rank_bytes, **options)
    else:
        assert isinstance(peer, Fsdp2)  # DeepSpeed has none
        turns = SaveBehind(figures, peer.async_save, task.directory, task.rank_bytes, turns=task.turns)
    train_in_a_loop(task, peer, turns)


def measure(task: Task, part: str) -> Figures:
    """This rank's figures."""
    figures: Figures = {"turns": [], "parameters": sum(p.numel() for p in GPT(task.size).parameters())}
    run = run_under_lightning if task.contestant in ("zero", "ddp") else run_in_a_loop
    run(task, part, figures)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("part", choices=("save", "behind", "load"))
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--turns", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--first", type=int, default=0, help="which of those that take turns begins")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    silence()
    size = SIZES[arguments.size]
    task = Task(arguments.contestant, size, arguments.directory, arguments.turns, arguments.tokens, arguments.first)
    print(json.dumps(measure(task, arguments.part)), flush=True)
    os._exit(0)  # a daemon thread of a save that never became durable must not hold the benchmark up


if __name__ == "__main__":
    main()
