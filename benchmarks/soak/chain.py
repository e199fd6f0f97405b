"""The killed chain: one training after another in one directory, each on another number of ranks, until time is up.

Most lives are short, so that there are many kills; every sixth is long, since only a process that saves hundreds of
times shows what it fails to give back. The last run isn't killed: it ends in order a few saves later, and then nothing
may be left but what belongs there.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.kills import ranks as processes
from benchmarks.kills.judge import Verdict, command, judge_run
from benchmarks.kills.ranks import FailedRunError
from benchmarks.soak.training import KEEP_LAST, STOP_AT, Settings, read_steps

LIVES = {"short": (0.0, 0.01), "medium": (0.02, 0.06), "long": (0.13, 0.17)}
"""How long a run may live after its first save, as shares of the chain's time."""

ORDER = ("short", "medium", "short", "long", "short", "start-up")
START_UP_SECONDS = 4.0
SAVES_OF_THE_LAST = 5
LAST_SECONDS = 120
"""How long the run that isn't killed may take, from its start to its end."""

WORLD_SIZES = (1, 2, 3)


@dataclass
class Life:
    """One run of the chain, and what was found after it.

    Attributes:
        run: its number.
        world_size: its ranks.
        length: how long it was let live, by name.
        victims: who was killed.
        moment: how the moment was chosen.
        phase: where the kill hit, as the disk shows it.
        resumed_at: the step at which the run began; None where it was killed before.
        last_step: the last one that all its ranks have done; None if there is none.
        repeated: the steps that the next run has to do again.
        saves: commits that were seen in this run.
        latest: the tag that `latest` names afterwards.
        tags: how many tags are left.
        had_to_be_killed: ranks that didn't end by themselves when another was killed.
        began_at: of the run, in seconds since the epoch.
        seconds: until it was dead.
        problems: what must not be.
    """

    run: int
    world_size: int
    length: str
    victims: str
    moment: str
    phase: str = "start-up"
    resumed_at: int | None = None
    last_step: int | None = None
    repeated: int = 0
    saves: int = 0
    latest: str = ""
    tags: int = 0
    had_to_be_killed: int = 0
    began_at: float = 0.0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass
class _Left:
    """What one run leaves to the next."""

    committed: int = 0
    verdict: Verdict = field(default_factory=lambda: Verdict("", 0, 0, frozenset(), ()))


def lives(directory: Path, seconds: float, seed: int, save_every: int) -> Iterator[Life]:
    """Start, kill and judge one run after another; each with what was found. Ends with the first problem.

    Args:
        directory: of the chain; it is made.
        seconds: how long, about.
        seed: of the training, and of what is chosen.
        save_every: steps between two saves.
    """
    directory.mkdir(parents=True)
    chooser = random.Random(seed)
    ends = time.monotonic() + seconds
    left = _Left()
    run, world_size = 0, 0
    while time.monotonic() < ends:
        world_size = chooser.choice([size for size in WORLD_SIZES if size != world_size])
        settings = Settings(directory, run, world_size, seed, save_every)
        life = _live(settings, left, ORDER[run % len(ORDER)], seconds, ends, chooser)
        yield life
        if life.problems:
            return
        run += 1
    world_size = chooser.choice([size for size in WORLD_SIZES if size != world_size])
    yield _end_in_order(Settings(directory, run, world_size, seed, save_every), left)


def _live(
    settings: Settings, left: _Left, length: str, chain_seconds: float, ends: float, chooser: random.Random
) -> Life:
    victims = "all at once" if settings.world_size == 1 else chooser.choice(processes.VICTIMS)
    moment = "start-up" if length == "start-up" else chooser.choice(("any", "in a save", "in a commit"))
    life = Life(settings.run, settings.world_size, length, victims, moment, began_at=time.time())
    ranks = processes.start(settings)
    try:
        if length == "start-up":
            processes.wait(settings, ranks, chooser.uniform(0, START_UP_SECONDS), lambda: False)
        else:
            processes.wait_for_first_save(settings, ranks, left.verdict)
            seconds = chooser.uniform(*LIVES[length]) * chain_seconds
            processes.wait(settings, ranks, min(seconds, max(0.0, ends - time.monotonic())), lambda: False, pause=0.1)
            processes.wait_for_moment(settings, ranks, moment, chooser)
        life.phase, stubborn = processes.kill(settings, ranks, victims, chooser)
        life.had_to_be_killed = len(stubborn)
    except FailedRunError as failure:
        life.problems.append(str(failure))
    finally:
        processes.end(ranks)
    _look(settings, left, life)
    return life


def _end_in_order(settings: Settings, left: _Left) -> Life:
    """Resume once more, and let the run come to its end: then nothing is left but what belongs there."""
    stop_at = left.verdict.resumes_at + SAVES_OF_THE_LAST * settings.save_every
    (settings.directory / STOP_AT).write_text(str(stop_at))
    life = Life(settings.run, settings.world_size, "last", "nobody", "never", "the end", began_at=time.time())
    ranks = processes.start(settings)
    deadline = time.monotonic() + LAST_SECONDS
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    processes.end(ranks)
    _look(settings, left, life)
    if any(code != 0 for code in codes):
        life.problems.append(f"the last run was not killed, and ended with {codes}{processes.logs(settings)}")
    if left.verdict.resumes_at != stop_at:
        life.problems.append(f"the last run saved step {stop_at}, and latest names {left.verdict.resumes_at}")
    if left.verdict.leftovers:
        life.problems.append(f"the last run was not killed, and left {sorted(left.verdict.leftovers)}")
    if left.verdict.tags > KEEP_LAST:
        life.problems.append(f"the last run was not killed, and left {left.verdict.tags} tags")
    return life


def _look(settings: Settings, left: _Left, life: Life) -> None:
    """Judge what the run has left, and what it had made of what it found."""
    life.seconds = round(time.time() - life.began_at, 3)
    outcome = judge_run(settings, left.verdict, left.committed, lambda step: KEEP_LAST, _verify)
    left.committed, left.verdict = outcome.committed, outcome.verdict
    life.resumed_at, life.saves = outcome.resumed_at, outcome.saves
    life.latest, life.tags = outcome.verdict.latest, outcome.verdict.tags
    life.problems += outcome.problems
    done = [read_steps(settings, rank)["step"] for rank in range(settings.world_size)]
    if all(len(steps) for steps in done):
        life.last_step = int(min(steps[-1] for steps in done))
        life.repeated = max(0, life.last_step - outcome.verdict.resumes_at)
    # The next save waits for the one behind training; so at most that one, and the steps until the next, are lost
    if life.repeated > 2 * settings.save_every:
        life.problems.append(f"step {life.last_step} was done, and the next run begins at {outcome.verdict.resumes_at}")


def _verify(tag: Path, step: int) -> list[str]:
    return [f"{tag.name}: {found}" for found in command("verify", tag)["problems"]]
