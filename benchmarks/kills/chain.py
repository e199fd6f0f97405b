"""Chains of runs: each resumes from what the one before left when it was killed, and is killed in its turn."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kills.judge import Verdict, judge
from benchmarks.kills.training import RETENTIONS, Mode, Retention, Settings, read_journal, train
from tests.launch import free_port, rank_environment

FIRST_SAVE_SECONDS = 60
SURVIVOR_SECONDS = 5
"""How long the others may take to end when one rank has been killed."""

MOMENTS = ("any", "in a save", "in a commit", "in a commit", "start-up")
VICTIMS = ("one rank", "all at once", "all, one by one")

_context = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Have torch and Lightning imported once, in the server that all ranks are forked from: no thread lives there."""
    _context.set_forkserver_preload(["lightning.pytorch", "lightning_zero", "benchmarks.kills.training"])


@dataclass
class Kill:
    """One kill, and what was found after it.

    Attributes:
        mode: how the run saved.
        chain: the number of the chain.
        run: of the chain.
        retention: what the run kept.
        world_size: its ranks.
        victims: who was killed.
        moment: how the moment was chosen.
        phase: where the kill hit, as the disk shows it.
        resumed_at: the step at which the run began; None where it was killed before.
        committed: the newest step that was known to be committed.
        latest: the tag that `latest` names afterwards.
        tags: how many tags are left.
        had_to_be_killed: the ranks that didn't end by themselves when another was killed.
        stuck: where they were.
        seconds: from the start of the run to the verdict.
        problems: what must not be.
    """

    mode: Mode
    chain: int
    run: int
    retention: str
    world_size: int
    victims: str
    moment: str
    phase: str = "start-up"
    resumed_at: int | None = None
    committed: int = 0
    latest: str = ""
    tags: int = 0
    had_to_be_killed: int = 0
    stuck: str = ""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass
class _Chain:
    """What one run leaves to the next.

    Attributes:
        committed: the newest step that was known to be committed, in all runs so far.
        verdict: on the save directory as the last run left it.
    """

    number: int
    directory: Path
    mode: Mode
    retention: Retention
    committed: int = 0
    verdict: Verdict = field(default_factory=lambda: Verdict("", 0, 0, frozenset(), ()))


class _Failed(Exception):
    """A run did what it must not do."""


def kills(
    directory: Path, mode: Mode, count: int, chooser: random.Random, *, length: int = 20, first_chain: int = 0
) -> Iterator[Kill]:
    """Kill `count` times; each kill with what was found after it.

    A chain ends after `length` kills, with a run that isn't killed; or with the first problem, and its directory stays.
    """
    left = count
    for number in itertools.count(first_chain):
        if left <= 0:
            return
        retention = RETENTIONS[number % len(RETENTIONS)]
        chain = _Chain(number, directory / f"{mode}-{number:03d}", mode, retention)
        chain.directory.mkdir(parents=True)
        for run in range(runs := min(length, left)):
            kill = _kill_once(chain, run, chooser)
            if run == runs - 1 and not kill.problems:
                kill.problems += _end_in_order(chain, run + 1, chooser)
            left -= 1
            if not kill.problems and run == runs - 1:
                shutil.rmtree(chain.directory)
            yield kill
            if kill.problems:
                break


def _kill_once(chain: _Chain, run: int, chooser: random.Random) -> Kill:
    began = time.monotonic()
    world_size = 1 + (run + chooser.randrange(2)) % 3
    victims = "all at once" if world_size == 1 else chooser.choice(VICTIMS)
    moment = chooser.choice(MOMENTS)
    settings = Settings(
        chain.directory,
        run,
        world_size,
        chain.mode,
        chain.retention,
        every_n_steps=chooser.choice((1, 2)),
        stage=chooser.choice((1, 2)),
    )
    kill = Kill(chain.mode, chain.number, run, chain.retention.name, world_size, victims, moment)
    ranks = _start(settings)
    try:
        _wait_for_the_moment(chain, settings, ranks, moment, chooser)
        kill.phase, stubborn = _kill(settings, ranks, victims, chooser)
        kill.had_to_be_killed = len(stubborn)
        kill.stuck = "; ".join(_where(settings.log(rank)) for rank in stubborn)
    except _Failed as failure:
        kill.problems.append(str(failure))
    finally:
        _end(ranks)
    _look(chain, settings, kill)
    kill.seconds = round(time.monotonic() - began, 3)
    return kill


def _end_in_order(chain: _Chain, run: int, chooser: random.Random) -> list[str]:
    """Resume once more, and let the run come to its end: then nothing is left but what belongs there."""
    last_step = chain.verdict.resumes_at + 5
    settings = Settings(
        chain.directory,
        run,
        chooser.choice((1, 2, 3)),
        chain.mode,
        chain.retention,
        every_n_steps=1,
        stage=2,
        last_step=last_step,
    )
    kill = Kill(chain.mode, chain.number, run, chain.retention.name, settings.world_size, "nobody", "never")
    ranks = _start(settings)
    for rank in ranks:
        rank.join(FIRST_SAVE_SECONDS)
    codes = [rank.exitcode for rank in ranks]
    _end(ranks)
    _look(chain, settings, kill)
    if any(codes):
        kill.problems.append(f"the last run was not killed, and ended with {codes}{_logs(settings)}")
    if chain.verdict.resumes_at != last_step or kill.resumed_at is None:
        kill.problems.append(f"the last run ended at step {last_step}, and latest names {chain.verdict.resumes_at}")
    if chain.verdict.leftovers:
        kill.problems.append(f"the last run was not killed, and left {sorted(chain.verdict.leftovers)}")
    if chain.verdict.tags > chain.retention.most_tags(last_step):
        kill.problems.append(f"the last run was not killed, and left {chain.verdict.tags} tags")
    return kill.problems


# ---------------------------------------------------------------------------------------------------- the ranks


def _start(settings: Settings) -> list[Any]:
    port = free_port()
    ranks = [
        _context.Process(target=_run_rank, args=(settings, rank, port), daemon=True)
        for rank in range(settings.world_size)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _end(ranks: Sequence[Any]) -> None:
    for rank in ranks:
        rank.kill()
        rank.join()


def _run_rank(settings: Settings, rank: int, port: int) -> None:
    import torch

    output = os.open(settings.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= rank_environment(rank, settings.world_size, port)
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # says where a rank is that doesn't end
    try:
        train(settings, rank)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a peer may wait in a collective for us: closing the sockets wakes it


def _signal(rank: Any, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, and its exit code says how
        os.kill(rank.pid, number)


# --------------------------------------------------------------------------------------------------- the moment


def _wait_for_the_moment(
    chain: _Chain, settings: Settings, ranks: Sequence[Any], moment: str, chooser: random.Random
) -> None:
    if moment == "start-up":
        _wait(settings, ranks, chooser.uniform(0, 0.7), lambda: False)
        return
    before = chain.verdict.resumes_at

    def has_saved() -> bool:
        mine = [line for line in read_journal(settings.directory) if line["run"] == settings.run]
        return any(line["event"] == "committed" and line["step"] > before for line in mine)

    if not _wait(settings, ranks, FIRST_SAVE_SECONDS, has_saved):
        raise _Failed(f"run {settings.run} has saved nothing in {FIRST_SAVE_SECONDS} s{_logs(settings)}")
    if left := chain.verdict.leftovers & set(os.listdir(settings.save_dir)):
        raise _Failed(f"run {settings.run} has saved, and left what dead runs left behind: {sorted(left)}")
    if moment == "any":
        _wait(settings, ranks, chooser.uniform(0, 0.6), lambda: False)
        return
    _wait(settings, ranks, 1, lambda: not _staging(settings), pause=0.001)
    _wait(settings, ranks, 5, lambda: bool(_staging(settings)), pause=0.0005)
    if moment == "in a commit":
        _wait(settings, ranks, 5, lambda: _phase(settings) != "writing", pause=0.0002)
        _wait(settings, ranks, chooser.uniform(0, 0.01), lambda: False)
    else:
        _wait(settings, ranks, chooser.uniform(0, 0.03), lambda: False)


def _wait(
    settings: Settings, ranks: Sequence[Any], seconds: float, until: Callable[[], bool], pause: float = 0.005
) -> bool:
    deadline = time.monotonic() + seconds
    while not until():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        if any(rank.exitcode is not None for rank in ranks):
            codes = [rank.exitcode for rank in ranks]
            raise _Failed(f"run {settings.run} ended before it was killed, with {codes}{_logs(settings)}")
        time.sleep(min(pause, left))
    return True


def _logs(settings: Settings) -> str:
    logs = [settings.log(rank) for rank in range(settings.world_size)]
    return "".join(f"\n--- {log.name}\n{log.read_text()[-3000:]}" for log in logs if log.exists())


def _where(log: Path) -> str:
    """The innermost functions of the main thread when a rank was asked where it is."""
    *_, dump = log.read_text().split("(most recent call first)")
    return " < ".join(re.findall(r'File ".*", line \d+ in (\S+)', dump)[:6])


def _staging(settings: Settings) -> list[str]:
    try:
        return [name for name in os.listdir(settings.save_dir) if name.startswith(".staging-")]
    except FileNotFoundError:
        return []


def _phase(settings: Settings) -> str:
    """What was under way when all ranks were stopped, as the disk shows it."""
    if not any(line["run"] == settings.run for line in read_journal(settings.directory)):
        return "start-up"
    staging = _staging(settings)
    if any((settings.save_dir / name / "manifest.json").exists() for name in staging):
        return "committing"
    if staging:
        return "writing"
    names = os.listdir(settings.save_dir) if settings.save_dir.is_dir() else []
    if any(name.startswith(".trash-latest") for name in names):
        return "committing"
    if any(name.startswith(".trash-") for name in names):
        return "removing"
    return "between saves"


MID_SAVE = ("writing", "committing", "removing")


# ------------------------------------------------------------------------------------------------------ the kill


def _kill(settings: Settings, ranks: Sequence[Any], victims: str, chooser: random.Random) -> tuple[str, list[int]]:
    """Kill; the phase that it hit, and the ranks that didn't end by themselves."""
    for rank in ranks:  # all are held, so that what is on disk at this moment can be seen
        _signal(rank, signal.SIGSTOP)
    _wait_until_stopped(ranks)
    phase = _phase(settings)
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


# ---------------------------------------------------------------------------------------------------- afterwards


def _look(chain: _Chain, settings: Settings, kill: Kill) -> None:
    """Judge what the run has left, and what it had made of what it found."""
    before = chain.verdict
    mine = [line for line in read_journal(settings.directory) if line["run"] == settings.run]
    kill.problems += [f"rank {line['rank']}: {line['text']}" for line in mine if line["event"] == "mismatch"]
    resumed = [line["step"] for line in mine if line["event"] == "resumed"]
    committed = [line["step"] for line in mine if line["event"] == "committed"]
    if resumed:
        kill.resumed_at = resumed[0]
        if resumed[0] != before.resumes_at:
            kill.problems.append(f"the run began at step {resumed[0]}, and should have at {before.resumes_at}")
    saves = sum(step > before.resumes_at for step in committed)
    chain.committed = max([chain.committed, *committed])
    verdict = judge(settings.save_dir, chain.committed)
    kill.committed, kill.latest, kill.tags = chain.committed, verdict.latest, verdict.tags
    kill.problems += verdict.problems
    # A save that was killed before it pruned leaves one more; the next that isn't killed prunes that one too
    most = chain.retention.most_tags(max(verdict.resumes_at, chain.committed)) + 1
    if verdict.tags > (most if saves > 1 else max(most, before.tags + 1)):
        kill.problems.append(f"there are {verdict.tags} tags, and {before.tags} before; {most} would be enough")
    chain.verdict = verdict
