"""The ranks of one run: real processes that are started, waited for, held at a moment, and killed.

What they train is the run's own business: `Run` says what this room asks of it.

| what happens | what the one who waits gets |
|---|---|
| a rank ends before anybody killed it | `FailedRunError`, with the end of every rank's output |
| nothing is saved within `FIRST_SAVE_SECONDS` | the same |
| a rank doesn't end when another was killed | it is asked where it is, is killed too, and is counted |
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.kills.judge import Verdict
from benchmarks.kills.training import read_journal
from tests.launch import free_port, rank_environment

FIRST_SAVE_SECONDS = 60
SURVIVOR_SECONDS = 5
"""How long the others may take to end when one rank has been killed."""

MOMENTS = ("any", "in a save", "in a commit", "in a commit", "start-up")
VICTIMS = ("one rank", "all at once", "all, one by one")
MID_SAVE = ("writing", "committing", "removing")

_context = multiprocessing.get_context("forkserver")


class Run(Protocol):
    """One run of a chain: its ranks, its journal ([Note: the journal]), and where it saves."""

    @property
    def directory(self) -> Path:
        """Of the chain."""

    @property
    def run(self) -> int:
        """The number in the chain."""

    @property
    def world_size(self) -> int:
        """How many ranks."""

    @property
    def save_dir(self) -> Path:
        """Where the tags are."""

    def log(self, rank: int) -> Path:
        """Where a rank's output goes."""

    def train(self, rank: int) -> None:
        """What a rank does."""


class FailedRunError(Exception):
    """A run did what it must not do."""


def preload(*modules: str) -> None:
    """Have torch and Lightning imported once, in the server that all ranks are forked from: no thread lives there."""
    _context.set_forkserver_preload(["lightning.pytorch", "lightning_zero", *modules])


def start(run: Run) -> list[Any]:
    """Fork all ranks, and don't wait for them."""
    port = free_port()
    ranks = [_context.Process(target=_run_rank, args=(run, rank, port), daemon=True) for rank in range(run.world_size)]
    for rank in ranks:
        rank.start()
    return ranks


def end(ranks: Sequence[Any]) -> None:
    """Kill what still lives."""
    for rank in ranks:
        rank.kill()
        rank.join()


def _run_rank(run: Run, rank: int, port: int) -> None:
    import torch

    output = os.open(run.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= rank_environment(rank, run.world_size, port)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # or Lightning takes all cores for a single rank, which then wait for each other
    )
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # says where a rank is that doesn't end
    try:
        run.train(rank)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a peer may wait in a collective for us: closing the sockets wakes it


def _signal(rank: Any, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, and its exit code says how
        os.kill(rank.pid, number)


def wait_for_first_save(run: Run, ranks: Sequence[Any], before: Verdict) -> None:
    """Until the run has committed a step beyond those it found; what dead runs left behind has to be gone then."""

    def has_saved() -> bool:
        mine = [line for line in read_journal(run.directory) if line["run"] == run.run]
        return any(line["event"] == "committed" and line["step"] > before.resumes_at for line in mine)

    if not wait(run, ranks, FIRST_SAVE_SECONDS, has_saved, pause=0.02):
        raise FailedRunError(f"run {run.run} has saved nothing in {FIRST_SAVE_SECONDS} s{logs(run)}")
    if left := before.leftovers & set(os.listdir(run.save_dir)):
        raise FailedRunError(f"run {run.run} has saved, and left what dead runs left behind: {sorted(left)}")


def wait_for_moment(run: Run, ranks: Sequence[Any], moment: str, chooser: random.Random) -> None:
    """Until one of `MOMENTS`: `start-up` is one before the first save, the others are meant to come after it."""
    if moment == "start-up":
        wait(run, ranks, chooser.uniform(0, 0.7), lambda: False)
        return
    if moment == "any":
        wait(run, ranks, chooser.uniform(0, 0.6), lambda: False)
        return
    wait(run, ranks, 1, lambda: not _staging(run), pause=0.001)
    wait(run, ranks, 5, lambda: bool(_staging(run)), pause=0.0005)
    if moment == "in a commit":
        wait(run, ranks, 5, lambda: _phase_on_disk(run) != "writing", pause=0.0002)
        wait(run, ranks, chooser.uniform(0, 0.01), lambda: False)
    else:
        wait(run, ranks, chooser.uniform(0, 0.03), lambda: False)


def wait(run: Run, ranks: Sequence[Any], seconds: float, until: Callable[[], bool], pause: float = 0.005) -> bool:
    """Whether it came to be in time; all ranks have to live until then."""
    deadline = time.monotonic() + seconds
    while not until():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        if any(rank.exitcode is not None for rank in ranks):
            codes = [rank.exitcode for rank in ranks]
            raise FailedRunError(f"run {run.run} ended before it was killed, with {codes}{logs(run)}")
        time.sleep(min(pause, left))
    return True


def logs(run: Run) -> str:
    """The end of what each rank has said."""
    found = [run.log(rank) for rank in range(run.world_size)]
    return "".join(f"\n--- {log.name}\n{log.read_text()[-3000:]}" for log in found if log.exists())


def where(log: Path) -> str:
    """The innermost functions of the main thread when a rank was asked where it is."""
    *_, dump = log.read_text().split("(most recent call first)")
    return " < ".join(re.findall(r'File ".*", line \d+ in (\S+)', dump)[:6])


def _staging(run: Run) -> list[str]:
    try:
        return [name for name in os.listdir(run.save_dir) if name.startswith(".staging-")]
    except FileNotFoundError:
        return []


def _phase(run: Run) -> str:
    """What was under way when all ranks were stopped."""
    begun = any(line["run"] == run.run for line in read_journal(run.directory))
    return _phase_on_disk(run) if begun else "start-up"


def _phase_on_disk(run: Run) -> str:
    staging = _staging(run)
    if any((run.save_dir / name / "manifest.json").exists() for name in staging):
        return "committing"
    if staging:
        return "writing"
    names = os.listdir(run.save_dir) if run.save_dir.is_dir() else []
    if any(name.startswith(".trash-latest") for name in names):
        return "committing"
    if any(name.startswith(".trash-") for name in names):
        return "removing"
    return "between saves"


def kill(run: Run, ranks: Sequence[Any], victims: str, chooser: random.Random) -> tuple[str, list[int]]:
    """Kill; the phase that it hit, and the ranks that didn't end by themselves."""
    for rank in ranks:  # all are held, so that what is on disk at this moment can be seen
        _signal(rank, signal.SIGSTOP)
    _wait_until_stopped(ranks)
    phase = _phase(run)
    order = chooser.sample(range(len(ranks)), len(ranks))
    dying = order[:1] if victims == "one rank" else order
    for number, rank in enumerate(dying):
        _signal(ranks[rank], signal.SIGKILL)
        if victims == "all, one by one":  # the next learns of it, and is killed in what it does then
            for other in dying[number + 1 :]:
                _signal(ranks[other], signal.SIGCONT)
            time.sleep(chooser.uniform(0, 0.02))
    for rank in order:
        _signal(ranks[rank], signal.SIGCONT)
    deadline = time.monotonic() + SURVIVOR_SECONDS
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    stubborn = [number for number, rank in enumerate(ranks) if rank.exitcode is None]
    for number in stubborn:
        _signal(ranks[number], signal.SIGUSR1)
        ranks[number].join(0.3)
        _signal(ranks[number], signal.SIGKILL)
    return phase, stubborn


def _wait_until_stopped(ranks: Sequence[Any]) -> None:
    deadline = time.monotonic() + 1
    for rank in ranks:
        state = Path(f"/proc/{rank.pid}/stat")
        while time.monotonic() < deadline and state.exists():
            try:
                if state.read_text().rpartition(")")[2].split()[0] in "TtZX":
                    break
            except (OSError, IndexError):
                break
            time.sleep(0.0005)
