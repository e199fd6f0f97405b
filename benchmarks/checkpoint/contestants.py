"""One rank of one contestant, in a process of its own: it trains under Lightning's Trainer, saves or loads, and prints.

| contestant | under | measures in turns |
|---|---|---|
| `zero` | ZeroStrategy | plain write, our save, DCP's save of the same tensors |
| `zero-async` | ZeroStrategy | a copy between warm buffers, our asynchronous save, steps beside it, steps without |
| `dcp-async` | ZeroStrategy | the same with DCP's `async_save` of the same tensors |
| `ddp` | DDPStrategy | Lightning's own save, by torch.save on rank 0 |
| `zero-load` | ZeroStrategy | a fit that resumes (verifying sizes, or everything), a plain read of the same bytes |
| `ddp-load` | DDPStrategy | a fit that resumes, by torch.load |
| `dcp-load` | ZeroStrategy | DCP's load of the same tensors |
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import inspect
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from benchmarks.checkpoint.floors import Range, copy_seconds, read_seconds, warm_buffer, write_seconds
from benchmarks.checkpoint.gpt import GPT, SIZES, Size
from benchmarks.checkpoint.memory import peak_mib, reset_peak, resident_mib
from lightning_zero import ZeroCheckpointIO, ZeroStrategy
from lightning_zero.checkpoint.load import Checkpoint

WORLD_SIZE = 2
TAG = "step"
Figures = dict[str, Any]


def trainer_for(strategy: Any, steps: int, callback: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=WORLD_SIZE,
        strategy=strategy,
        max_steps=steps,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def batches(steps: int, tokens: int) -> torch.utils.data.DataLoader[Tensor]:
    return torch.utils.data.DataLoader([torch.randint(0, 8192, (1, tokens)) for _ in range(steps)], batch_size=None)


def own_tensors(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """The state as another library is given it: the whole parameters, and this rank's part of the optimizer states.

    The same tensors that our own checkpoint holds, so that both move the same bytes.
    """
    tensors: dict[str, Tensor] = {f"model/{name}": p.detach() for name, p in module.named_parameters()}
    assert isinstance(trainer.strategy, ZeroStrategy)
    for segment in trainer.strategy.segments(trainer.optimizers[0]):
        for key, value in segment.state.items():
            tensors[f"optimizer/{dist.get_rank()}/{segment.name}/{segment.start}/{key}"] = value
    return tensors


def shard_bytes(trainer: Trainer) -> int:
    """What this rank writes: its part of the parameters and of both of AdamW's states."""
    assert isinstance(trainer.strategy, ZeroStrategy)
    return sum(3 * 4 * segment.master.numel() for segment in trainer.strategy.segments(trainer.optimizers[0]))


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of processor time, of what all ranks begin at once."""
    dist.barrier()
    began, began_cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - began, time.process_time() - began_cpu


# ------------------------------------------------------------------------------------------------ synchronous saves


class SaveInTurns(Callback):
    """After each step but the first two: one turn of everybody."""

    def __init__(self, directory: Path, figures: Figures, *, alone: bool) -> None:
        self.directory = directory
        self.figures = figures
        self.alone = alone
        self.turns: list[Figures] = figures.setdefault("turns", [])

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: object) -> None:
        if trainer.global_step < 2:
            return
        self.turn: Figures = {}
        self.turns.append(self.turn)
        path = self.directory / f"{TAG}-{trainer.global_step}"
        if self.alone:
            self._save(trainer, path)
            return
        if len(self.turns) == 1:
            self.buffer = warm_buffer(shard_bytes(trainer))
            self.figures["shard_bytes"] = len(self.buffer)
        state, beside = own_tensors(trainer, module), Path(f"{path}.dcp")
        contestants = [
            lambda: self._write(),
            lambda: self._save(trainer, path),
            lambda: self._dcp(state, beside),
        ]
        # The page cache that one has given back serves the next: nobody is always second
        first = len(self.turns) % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            contestant()

    def _write(self) -> None:
        self.turn["write"] = write_seconds(self.directory / f"plain-{dist.get_rank()}", self.buffer)

    def _save(self, trainer: Trainer, path: Path) -> None:
        self.turn["save"], self.turn["save_cpu"] = timed(lambda: trainer.save_checkpoint(path))
        self.figures["bytes"] = sum(f.stat().st_size for f in path.iterdir()) if path.is_dir() else path.stat().st_size
        self._remove(path)

    def _dcp(self, state: dict[str, Tensor], path: Path) -> None:
        self.turn["dcp"], self.turn["dcp_cpu"] = timed(lambda: dcp.save(state, checkpoint_id=path))
        self._remove(path)

    def _remove(self, path: Path) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        dist.barrier()


# ----------------------------------------------------------------------------------------------- asynchronous saves


class SaveBeside(Callback):
    """A save every `GAP` steps: how long the loop waits, until when it is durable, and what steps cost meanwhile."""

    GAP = 4

    def __init__(self, directory: Path, figures: Figures, saves: int) -> None:
        self.directory = directory
        self.figures = figures
        self.saves = saves
        self.turns: list[Figures] = figures.setdefault("turns", [])
        self.steps: list[tuple[float, float]] = []
        self.in_flight: list[list[float]] = []
        self.paths: list[Path] = []

    @property
    def steps_needed(self) -> int:
        return 3 + self.saves * self.GAP

    def begin(self, trainer: Trainer, module: LightningModule, path: Path, done: Callable[[], None]) -> None:
        """Start an asynchronous save; `done` is to be called when it is durable."""
        raise NotImplementedError

    def on_train_batch_start(self, *args: object) -> None:
        self.step_began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: object) -> None:
        self.steps.append((self.step_began, time.perf_counter()))
        count = trainer.global_step - 3
        if count > 0 and count % self.GAP == self.GAP - 1:
            self._remove_previous()
        if count < 0 or count % self.GAP or len(self.turns) == self.saves:
            return
        if not self.turns:
            self.source, self.target = (warm_buffer(shard_bytes(trainer)) for _ in range(2))
            copy_seconds(self.source, self.target)
        turn: Figures = {"copy": copy_seconds(self.source, self.target)}
        flight: list[float] = []
        dist.barrier()
        began = time.perf_counter()
        self.paths.append(self.directory / f"{TAG}-{trainer.global_step}")
        self.begin(trainer, module, self.paths[-1], lambda: flight.append(time.perf_counter()))
        turn["stall"] = time.perf_counter() - began
        turn["began"] = began
        self.turns.append(turn)
        self.in_flight.append(flight)

    def _remove_previous(self) -> None:
        """Keep the disk, and the page cache, as they are after any number of saves."""
        if dist.get_rank() == 0 and len(self.paths) > 1:
            shutil.rmtree(self.paths[-2])

    def on_train_end(self, *args: object) -> None:
        deadline = time.perf_counter() + 60
        while not all(self.in_flight) and time.perf_counter() < deadline:
            time.sleep(0.05)
        flights = [(turn["began"], flight[0]) for turn, flight in zip(self.turns, self.in_flight, strict=True)]
        quiet = [e - b for b, e in self.steps[1:] if all(e < begin or b > end for begin, end in flights)]
        usual = sorted(quiet)[len(quiet) // 2]
        for turn, (begin, end) in zip(self.turns, flights, strict=True):
            beside = [e - b for b, e in self.steps if b >= begin and b < end]
            turn["durable"] = end - begin
            turn["steps_beside"] = beside
            turn["lost"] = sum(took - usual for took in beside)
        self.figures["steps_quiet"] = quiet


class OursBeside(SaveBeside):
    def begin(self, trainer: Trainer, module: LightningModule, path: Path, done: Callable[[], None]) -> None:
        trainer.save_checkpoint(path)

        def watch() -> None:
            latest = path.parent / "latest"  # replaced last
            while not (latest.exists() and latest.read_text().strip() == path.name):
                time.sleep(0.01)
            done()

        threading.Thread(target=watch, daemon=True).start()


class DcpBeside(SaveBeside):
    def begin(self, trainer: Trainer, module: LightningModule, path: Path, done: Callable[[], None]) -> None:
        if not hasattr(self, "group"):
            self.group = dist.new_group(backend="gloo")
        future: Any = dcp.async_save(own_tensors(trainer, module), checkpoint_id=path, process_group=self.group)
        future = getattr(future, "upload_completion", future)
        future.add_done_callback(lambda _: done())


# ------------------------------------------------------------------------------------------------------------- loads


class LoadClock(Callback):
    """What the pieces of a resume take, and what memory they need beyond the optimizer states that stay."""

    PIECES = ("load_checkpoint", "load_model_state_dict", "load_optimizer_state_dict")

    def __init__(self) -> None:
        self.figures: Figures = {}
        self.retained_mib = 0.0
        self.above_mib: list[float] = []

    def watch(self, strategy: Any) -> None:
        for name in self.PIECES:
            setattr(strategy, name, functools.partial(self._piece, name, getattr(strategy, name)))

    def _piece(self, name: str, piece: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        reset_peak()
        before = resident_mib()
        began = time.perf_counter()
        result = piece(*args, **kwargs)
        self.figures[name] = time.perf_counter() - began
        self.above_mib.append(self.retained_mib + peak_mib() - before)
        self.retained_mib += resident_mib() - before
        return result

    def setup(self, *args: object, **kwargs: object) -> None:
        self.set_up = time.perf_counter()

    def on_train_start(self, trainer: Trainer, *args: object) -> None:
        self.figures["to_train_start"] = time.perf_counter() - self.set_up
        states = trainer.optimizers[0].state
        state_bytes = sum(v.nbytes for state in states.values() for v in state.values() if isinstance(v, Tensor))
        if self.above_mib:
            self.figures["load"] = sum(self.figures[name] for name in self.PIECES)
            self.figures["state_mib"] = state_bytes / 2**20
            self.figures["above_mib"] = max(self.above_mib) - state_bytes / 2**20


def resume(strategy: Any, size: Size, path: Path | None, step: int) -> Figures:
    """One fit of one step, from a checkpoint or from nothing."""
    clock = LoadClock()
    clock.watch(strategy)
    trainer = trainer_for(strategy, step + 1 if path else 1, clock)
    trainer.fit(GPT(size), batches(step + 1, 8), ckpt_path=path)
    del trainer, strategy
    gc.collect()  # a Trainer and its module hold each other
    return clock.figures


def ranges_of_rank(path: Path) -> list[Range]:
    """Where a checkpoint has what this rank needs: the model, and its own part of the optimizer states."""
    manifest = Checkpoint(path).manifest
    return [
        Range(path / file.name, stored.offset, stored.nbytes, stored.kind == "optimizer")
        for file in manifest.files
        for stored in file.tensors
        if stored.kind == "model" or (stored.kind == "optimizer" and file.rank == dist.get_rank())
    ]


def read_floors(ranges: list[Range], buffer: Tensor) -> Figures:
    """Plain reads: into warm memory, and with what is new in a resumed process (the optimizer states) in new memory."""
    warm = buffer[: sum(each.nbytes for each in ranges)].split([each.nbytes for each in ranges])
    fresh = [
        torch.empty(each.nbytes, dtype=torch.uint8) if each.is_new else part
        for each, part in zip(ranges, warm, strict=True)
    ]
    return {"read": read_seconds(ranges, warm), "read_fresh": read_seconds(ranges, fresh)}


class DcpLoad(Callback):
    """Loads in place, again and again, into the live parameters and freshly allocated optimizer states."""

    def __init__(self, path: Path, figures: Figures, loads: int) -> None:
        self.path = path
        self.figures = figures
        self.loads = loads

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: object) -> None:
        for _ in range(self.loads):
            state: dict[str, Tensor] = {}
            shapes = own_tensors(trainer, module)
            reset_peak()
            before = resident_mib()
            dist.barrier()
            began = time.perf_counter()
            for name, tensor in shapes.items():
                state[name] = tensor if name.startswith("model/") else torch.empty_like(tensor)
            dcp.load(state, checkpoint_id=self.path)
            took = time.perf_counter() - began
            state_mib = sum(v.nbytes for k, v in state.items() if not k.startswith("model/")) / 2**20
            self.figures["turns"].append(
                {"load": took, "state_mib": state_mib, "above_mib": peak_mib() - before - state_mib}
            )


# -------------------------------------------------------------------------------------------------------- contestants


class SaveAtEnd(Callback):
    """Leaves behind what the loads are measured on."""

    def __init__(self, path: Path, *, with_dcp: bool) -> None:
        self.path = path
        self.with_dcp = with_dcp

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: object) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
            if self.with_dcp:
                dcp.save(own_tensors(trainer, module), checkpoint_id=f"{self.path}.dcp")


def fit(strategy: Any, size: Size, steps: int, callback: Callback, tokens: int) -> None:
    trainer_for(strategy, steps, callback).fit(GPT(size), batches(steps, tokens))


def run(contestant: str, size: Size, directory: Path, turns: int, tokens: int) -> Figures:
    figures: Figures = {"turns": []}
    asynchronous = {"async_save": True} if has_async_save() else {}
    if contestant in ("zero", "ddp"):
        strategy = ZeroStrategy(stage=2) if contestant == "zero" else "ddp"
        callback: Callback = SaveInTurns(directory, figures, alone=contestant == "ddp")
        fit(strategy, size, turns + 1, callback, tokens)
    elif contestant in ("zero-async", "dcp-async"):
        ours = contestant == "zero-async"
        beside = (OursBeside if ours else DcpBeside)(directory, figures, turns)
        io = ZeroCheckpointIO(**asynchronous) if ours else None
        fit(ZeroStrategy(stage=2, checkpoint_io=io), size, beside.steps_needed, beside, tokens)
    elif contestant in ("zero-prepare", "ddp-prepare"):
        ours = contestant == "zero-prepare"
        path = directory / ("for-load" if ours else "for-load.ckpt")
        fit(ZeroStrategy(stage=2) if ours else "ddp", size, 2, SaveAtEnd(path, with_dcp=ours), 8)
    elif contestant == "dcp-load":
        fit(ZeroStrategy(stage=2), size, 1, DcpLoad(directory / "for-load.dcp", figures, turns), 8)
    else:
        load(contestant, size, directory, turns, figures)
    return figures


def load(contestant: str, size: Size, directory: Path, turns: int, figures: Figures) -> None:
    from lightning.pytorch.strategies import DDPStrategy

    ours = contestant == "zero-load"
    path = directory / ("for-load" if ours else "for-load.ckpt")

    def strategy(**options: Any) -> Any:
        return ZeroStrategy(stage=2, checkpoint_io=ZeroCheckpointIO(**options)) if ours else DDPStrategy()

    buffer = None
    for _ in range(turns):
        turn = resume(strategy(), size, path, step=2)
        figures["turns"].append(turn)
        if ours:
            ranges = ranges_of_rank(path)
            if buffer is None:
                buffer = warm_buffer(sum(each.nbytes for each in ranges))
            turn |= read_floors(ranges, buffer)
            turn["read_bytes"] = len(buffer)
            turn["full"] = resume(strategy(verify="full"), size, path, step=2)["load"]
        turn["without"] = resume(strategy(), size, None, step=2)["to_train_start"]


def has_async_save() -> bool:
    return "async_save" in inspect.signature(ZeroCheckpointIO).parameters


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with quiet():
        figures = run(
            arguments.contestant, SIZES[arguments.size], arguments.directory, arguments.turns, arguments.tokens
        )
    figures["parameters"] = sum(p.numel() for p in GPT(SIZES[arguments.size]).parameters())
    print(json.dumps(figures), flush=True)
    os._exit(0)  # a daemon thread of a save that never became durable must not hold the benchmark up


if __name__ == "__main__":
    main()
