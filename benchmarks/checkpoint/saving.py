"""What a save costs, measured between the steps of whichever loop trains: Lightning's, or a plain one.

After each step the loop calls `after_step`, which saves and measures, and says whether to train on. All ranks call it
at the same time, and decide alike.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from benchmarks.machine import TAKES, copy_seconds, warm_buffer, write_seconds
from benchmarks.memory import peak_mib, reset_peak
from benchmarks.ranks import Figures
from benchmarks.rounds import rotated


class Turns(Protocol):
    """What is done between two steps."""

    def after_step(self, began: float, ended: float) -> bool:
        """Told when the step began and ended; whether another one is wanted."""


def timed(action: Callable[[], object]) -> float:
    """Seconds of what all ranks begin at once."""
    dist.barrier()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _remove(path: Path) -> None:
    """By one rank, while all wait."""
    dist.barrier()
    if dist.get_rank() == 0:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    dist.barrier()


def _size(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


class SaveInTurns:
    """A save, and a plain write with fsync of what the rank would have to write, take turns: one of each after a step.

    `first` says which of them begins the first turn: the page cache that one has given back serves the next. The last
    checkpoint stays, at `path`, for the loads.
    """

    def __init__(
        self, figures: Figures, save: Callable[[Path], object], path: Path, nbytes: int, *, turns: int, first: int
    ) -> None:
        self._figures = figures
        self._save = save
        self._path = path
        self._buffer = warm_buffer(nbytes)
        self._left = turns
        self._number = first

    def after_step(self, began: float, ended: float) -> bool:
        turn: Figures = {}
        for action in rotated([self._plain_write, self._timed_save], self._number):
            turn |= action()
        self._figures["turns"].append(turn)
        self._number += 1
        self._left -= 1
        return self._left > 0

    def _plain_write(self) -> Figures:
        return {"write": write_seconds(self._path.with_name(f"plain-{dist.get_rank()}"), self._buffer)}

    def _timed_save(self) -> Figures:
        _remove(self._path)
        took = timed(lambda: self._save(self._path))
        dist.barrier()  # a contestant's ranks needn't be done at the same time
        self._figures["bytes"] = _size(self._path)
        return {"save": took}


class SaveBehind:
    """A save behind training whenever the one before is durable on all ranks and `GAP` steps have gone by without one.

    | figure of a turn | what it is |
    |---|---|
    | `copy`, `write` | the machine's limits: the rank's bytes between warm buffers, and to disk with fsync |
    | `stall` | how long the loop waits |
    | `durable` | from the call until the checkpoint is complete on disk |
    | `steps_beside`, `lost` | the steps that began meanwhile, and by how much they took longer than the quiet ones |
    | `above_mib` | the peak of memory from the call until then, less the peak of the quiet steps before |
    """

    GAP = 4
    PATIENCE_STEPS = 2000

    def __init__(
        self,
        figures: Figures,
        begin: Callable[[Path, Callable[[], None]], object],
        directory: Path,
        nbytes: int,
        *,
        turns: int,
    ) -> None:
        self._figures = figures
        self._begin = begin
        self._directory = directory
        self._buffers = warm_buffer(nbytes), warm_buffer(nbytes)
        self._turns = turns
        self._steps: list[tuple[float, float]] = []
        self._ends: list[float] = []
        self._quiet_steps = 0
        self._in_flight = False
        self._paths: list[Path] = []

    def after_step(self, began: float, ended: float) -> bool:
        turns = self._figures["turns"]
        self._steps.append((began, ended))
        if len(self._steps) == 1:
            reset_peak()  # what it took to get here is no step's
        if self._in_flight:
            if not self._durable_everywhere():
                if len(self._steps) > self.PATIENCE_STEPS:
                    raise TimeoutError(f"a save is not durable after {self.PATIENCE_STEPS} steps")
                return True
            self._in_flight = False
            self._quiet_steps = 0
            turns[-1]["durable"] = self._ends[-1] - turns[-1]["began"]
            turns[-1]["above_mib"] = max(0.0, peak_mib() - turns[-1].pop("quiet_peak_mib"))
            reset_peak()
            if len(self._paths) > 1:
                _remove(self._paths[-2])  # the disk, and the page cache, are as they are after any number of saves
            return True
        self._quiet_steps += 1
        if self._quiet_steps < self.GAP:
            return True
        if len(turns) == self._turns:
            self._judge_steps()
            return False
        self._start()
        return True

    def _start(self) -> None:
        turn: Figures = {"quiet_peak_mib": peak_mib()}
        turn["write"] = write_seconds(self._directory / f"plain-{dist.get_rank()}", self._buffers[0])
        # Right before the stall: see TAKES
        turn["copy"] = statistics.median(copy_seconds(*self._buffers) for _ in range(TAKES))
        reset_peak()
        path = self._directory / f"behind-{len(self._paths)}"
        self._paths.append(path)
        count = len(self._paths)
        dist.barrier()
        turn["began"] = time.perf_counter()
        self._begin(path, lambda: self._ends.append(time.perf_counter()) if len(self._ends) < count else None)
        turn["stall"] = time.perf_counter() - turn["began"]
        self._figures["turns"].append(turn)
        self._in_flight = True

    def _durable_everywhere(self) -> bool:
        done = torch.tensor([len(self._ends) == len(self._paths)], dtype=torch.int32)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return bool(done)

    def _judge_steps(self) -> None:
        turns = self._figures["turns"]
        flights = [(turn["began"], turn["began"] + turn["durable"]) for turn in turns]
        # The first of all steps makes the optimizer's states
        quiet = [e - b for b, e in self._steps[1:] if all(e < begin or b > end for begin, end in flights)]
        usual = statistics.median(quiet)
        for turn, (begin, end) in zip(turns, flights, strict=True):
            beside = [e - b for b, e in self._steps if begin <= b < end]
            turn["steps_beside"] = beside or [usual]  # durable before the next step began
            turn["lost"] = sum(took - usual for took in beside)
        self._figures["steps_quiet"] = quiet
