"""What must hold in a save directory, whatever was killed when: judged from outside, by what a user can call.

| what is looked at | by |
|---|---|
| which tags there are, which are complete | `lightning-zero ls --json` |
| whether every byte is as it was written | `lightning-zero verify --json` |
| whether every element is of the step that the manifest says | [Note: the ledger] |
| whether `latest` went backwards | [Note: the journal] |
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.kills.training import LEDGER_SIZES, ledger_values, read_journal
from lightning_zero import cli
from lightning_zero.checkpoint.load import Checkpoint

if TYPE_CHECKING:
    from benchmarks.kills.ranks import Run


@dataclass(frozen=True)
class Verdict:
    """What lies in a save directory.

    Attributes:
        latest: the tag that `latest` names; empty where there is no such file.
        resumes_at: the step from which the next run has to go on.
        tags: how many there are, complete or not.
        leftovers: names of staging and trash.
        problems: what must not be.
    """

    latest: str
    resumes_at: int
    tags: int
    leftovers: frozenset[str]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What a run made of what it found, and what it left.

    Attributes:
        resumed_at: the step at which it began; None where it was killed before.
        committed: the newest step that is known to be committed, in all runs so far.
        saves: how many steps this run is known to have committed.
        verdict: on the save directory.
        problems: what must not be.
    """

    resumed_at: int | None
    committed: int
    saves: int
    verdict: Verdict
    problems: tuple[str, ...]


def judge_run(
    run: Run,
    before: Verdict,
    committed_before: int,
    most_tags: Callable[[int], int],
    look_into: Callable[[Path, int], list[str]] | None = None,
) -> Outcome:
    """Judge a run that has ended, by its journal and by the directory as the run before left it.

    Args:
        run: the run.
        before: the verdict on the directory that it found.
        committed_before: the newest step that was known to be committed then; 0: none was.
        most_tags: how many tags there may be after a save of this step that has pruned.
        look_into: what is wrong with a complete tag of this step; by default what `look_into_ledger` finds.
    """
    mine = [line for line in read_journal(run.directory) if line["run"] == run.run]
    problems = [f"rank {line['rank']}: {line['text']}" for line in mine if line["event"] == "mismatch"]
    resumed = [line["step"] for line in mine if line["event"] == "resumed"]
    if resumed and resumed[0] != before.resumes_at:
        problems.append(f"the run began at step {resumed[0]}, and should have at {before.resumes_at}")
    steps = [line["step"] for line in mine if line["event"] == "committed"]
    committed = max([committed_before, *steps])
    verdict = judge(run.save_dir, committed, look_into)
    problems += verdict.problems
    # A save that was killed before it pruned leaves one more; the next that isn't killed prunes that one too
    most = most_tags(max(verdict.resumes_at, committed)) + 1
    saves = sum(step > before.resumes_at for step in steps)
    if verdict.tags > (most if saves > 1 else max(most, before.tags + 1)):
        problems.append(f"there are {verdict.tags} tags, and {before.tags} before; {most} would be enough")
    return Outcome(resumed[0] if resumed else None, committed, saves, verdict, tuple(problems))


def judge(save_dir: Path, committed_step: int, look_into: Callable[[Path, int], list[str]] | None = None) -> Verdict:
    """Judge a save directory that nobody writes to.

    Args:
        save_dir: the directory.
        committed_step: the newest step that was known to be committed; 0: none was.
        look_into: what is wrong with a complete tag of this step; by default what `look_into_ledger` finds.
    """
    look_into = look_into or look_into_ledger
    names = os.listdir(save_dir) if save_dir.is_dir() else []
    leftovers = frozenset(name for name in names if name.startswith("."))
    rows = command("ls", save_dir) if names else []
    steps = {row["tag"]: row["step"] for row in rows}
    problems = [f"{row['tag']} is not complete, and has a name" for row in rows if not row["complete"]]
    problems += [text for row in rows if row["complete"] for text in look_into(save_dir / row["tag"], row["step"])]
    latest = (save_dir / "latest").read_text() if "latest" in names else ""
    resumes_at = steps.get(latest) or max((row["step"] or 0 for row in rows if row["complete"]), default=0)
    if latest and latest not in steps:
        problems.append(f"latest names {latest!r}, which is not there: there are {sorted(steps)}")
    if not latest and committed_step:
        problems.append(f"there is no latest, and step {committed_step} was committed")
    if latest and (steps.get(latest) or 0) < committed_step:
        problems.append(f"latest names step {steps.get(latest)}, and step {committed_step} was committed")
    if latest and (found := command("verify", save_dir)["problems"]):
        problems.append(f"latest is not sound: {found}")
    return Verdict(latest, resumes_at, len(rows), leftovers, tuple(problems))


def command(name: str, directory: Path) -> Any:
    """What `lightning-zero NAME DIRECTORY --json` prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        cli.main([name, str(directory), "--json"])
    return json.loads(output.getvalue())


def look_into_ledger(tag: Path, step: int) -> list[str]:
    """What is wrong with a tag that calls itself complete, and of this step."""
    problems = [f"{tag.name}: {found}" for found in command("verify", tag)["problems"]]
    if problems:
        return problems
    parameter, momentum = ledger_values(step)
    checkpoint = Checkpoint(tag).lightning_checkpoint()
    state_dict, states = checkpoint["state_dict"], checkpoint["optimizer_states"][0]["state"].values()
    found = [(name, state_dict[name], parameter) for name in state_dict if name.startswith("ledger.")]
    found += [
        (f"a momentum of {state['momentum_buffer'].numel()} elements", state["momentum_buffer"], momentum)
        for state in states
        if state["momentum_buffer"].numel() in LEDGER_SIZES
    ]
    if len(found) != 2 * len(LEDGER_SIZES):
        problems.append(f"{tag.name}: there are {[name for name, *_ in found]}")
    for name, tensor, expected in (*found, ("the buffer", state_dict["steps"], step)):
        values = torch.unique(tensor.contiguous()).tolist()
        if values != [expected]:
            problems.append(f"{tag.name}, of step {step}: {name} holds {values[:5]} and not {expected}")
    return problems
