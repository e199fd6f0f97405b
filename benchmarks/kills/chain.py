"""Chains of runs: each resumes from what the one before left when it was killed, and is killed in its turn."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.kills import ranks as processes
from benchmarks.kills.judge import Verdict, judge_run
from benchmarks.kills.ranks import FIRST_SAVE_SECONDS, MOMENTS, VICTIMS, FailedRunError
from benchmarks.kills.training import RETENTIONS, Mode, Retention, Settings


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
    ranks = processes.start(settings)
    try:
        if moment != "start-up":
            processes.wait_for_first_save(settings, ranks, chain.verdict)
        processes.wait_for_moment(settings, ranks, moment, chooser)
        kill.phase, stubborn = processes.kill(settings, ranks, victims, chooser)
        kill.had_to_be_killed = len(stubborn)
        kill.stuck = "; ".join(processes.where(settings.log(rank)) for rank in stubborn)
    except FailedRunError as failure:
        kill.problems.append(str(failure))
    finally:
        processes.end(ranks)
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
    ranks = processes.start(settings)
    for rank in ranks:
        rank.join(FIRST_SAVE_SECONDS)
    codes = [rank.exitcode for rank in ranks]
    processes.end(ranks)
    _look(chain, settings, kill)
    if any(codes):
        kill.problems.append(f"the last run was not killed, and ended with {codes}{processes.logs(settings)}")
    if chain.verdict.resumes_at != last_step or kill.resumed_at is None:
        kill.problems.append(f"the last run ended at step {last_step}, and latest names {chain.verdict.resumes_at}")
    if chain.verdict.leftovers:
        kill.problems.append(f"the last run was not killed, and left {sorted(chain.verdict.leftovers)}")
    if chain.verdict.tags > chain.retention.most_tags(last_step):
        kill.problems.append(f"the last run was not killed, and left {chain.verdict.tags} tags")
    return kill.problems


def _look(chain: _Chain, settings: Settings, kill: Kill) -> None:
    """Judge what the run has left, and what it had made of what it found."""
    outcome = judge_run(settings, chain.verdict, chain.committed, chain.retention.most_tags)
    chain.committed, chain.verdict = outcome.committed, outcome.verdict
    kill.resumed_at, kill.committed = outcome.resumed_at, outcome.committed
    kill.latest, kill.tags = outcome.verdict.latest, outcome.verdict.tags
    kill.problems += outcome.problems
