"""Train the example for an hour, kill it again and again, and look whether anything is lost, or piles up.

    python -m benchmarks.soak [--minutes 60] [--save-every 20] [--seed 0] [--directory DIR] [--json FILE]
    python -m benchmarks.soak --table FILE

The chain of killed runs takes four fifths of the time. Undisturbed runs go on beside it, on one rank each, and in the
last fifth until they have reached its step: one with the chain's seed, which it is compared with, and two with others,
whose distance from each other is the noise. The README says what is looked at. Exits with 1 if anything was wrong; the
directory is kept then.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kills import ranks as processes
from benchmarks.soak import judge
from benchmarks.soak.chain import Life, lives
from benchmarks.soak.table import table
from benchmarks.soak.training import STOP_AT, Settings, read_memory

CHAIN_SHARE = 0.8
JUDGE_SHARE = 0.05
REFERENCES = 3
NICENESS = 5
"""Of the undisturbed runs: they have one rank each, and would be far ahead."""

POINTS = 300
"""Of a curve in the JSON file."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="in all")
    parser.add_argument("--save-every", type=int, default=20, help="steps")
    parser.add_argument("--seed", type=int, default=0, help="of what is chosen, and of the training")
    parser.add_argument("--directory", type=Path, default=None, help="where to work; a temporary directory by default")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    parser.add_argument("--table", type=Path, default=None, help="print the table of such a file, and do nothing else")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return 0
    processes.preload(
        "lightning.pytorch.cli", "torch.utils.tensorboard", "torchdata.stateful_dataloader", "benchmarks.soak.training"
    )
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="lightning_zero-soak-"))
    found = _soak(directory.absolute(), arguments.minutes * 60, arguments.seed, arguments.save_every)
    print(table(found))
    if arguments.json:
        lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())  # curves in one line
        arguments.json.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if found["problems"]:
        print("\nFAILED:", *found["problems"], sep="\n  ", file=sys.stderr)
        killed = directory / "killed"
        print(
            f"\nEverything is kept. To look at it: lightning-zero ls {killed / 'ckpts'}; lightning-zero verify "
            f"{killed / 'ckpts'}; cat {killed / 'journal.jsonl'} {killed}/run-*.memory {killed}/run-*.log",
            file=sys.stderr,
        )
        return 1
    if arguments.directory is None:
        shutil.rmtree(directory)
    return 0


def _soak(directory: Path, seconds: float, seed: int, save_every: int) -> dict[str, Any]:
    began = time.time()
    references = [
        Settings(directory / f"undisturbed-{number}", 0, 1, seed + 1000 * number, save_every, NICENESS)
        for number in range(REFERENCES)
    ]
    undisturbed = []
    found: list[Life] = []
    try:
        for reference in references:
            reference.directory.mkdir(parents=True)
            undisturbed.append(processes.start(reference))
        for life in lives(directory / "killed", seconds * CHAIN_SHARE, seed, save_every):
            found.append(life)
            _say(life, time.time() - began)
        reached = max((life.last_step or 0 for life in found), default=0)
        for reference in references:
            (reference.directory / STOP_AT).write_text(str(reached))
        deadline = began + seconds * (1 - JUDGE_SHARE)
        for [rank] in undisturbed:
            rank.join(max(0.0, deadline - time.time()))
        problems = _undisturbed_problems(references, undisturbed)
    finally:
        for ranks in undisturbed:
            processes.end(ranks)
    runs = [Settings(directory / "killed", life.run, life.world_size, seed, save_every) for life in found]
    problems += [f"run {life.run}: {problem}" for life in found for problem in life.problems]
    return _judge(found, runs, references, problems) | {
        "began_at": began,
        "seconds": round(time.time() - began, 1),
        "seed": seed,
        "save_every": save_every,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
    }


def _undisturbed_problems(references: Sequence[Settings], undisturbed: Sequence[Sequence[Any]]) -> list[str]:
    """One that still runs has only been slow."""
    return [
        f"the undisturbed run of seed {reference.seed} ended with {rank.exitcode}{processes.logs(reference)}"
        for reference, [rank] in zip(references, undisturbed, strict=True)
        if rank.exitcode
    ]


def _judge(
    found: Sequence[Life], runs: Sequence[Settings], references: Sequence[Settings], problems: list[str]
) -> dict[str, Any]:
    steps = [judge.whole_steps(run) for run in runs]
    reference_steps = [judge.whole_steps(reference) for reference in references]
    trends = judge.trends("killed", runs)
    for reference in references:
        trends += judge.trends(reference.directory.name, [reference])
    ages = judge.same_age(runs)
    validations = [judge.validation(run) for run in (runs[0], *references)]
    stretches = judge.stretches(validations[0], validations[1:])
    again = judge.repeated(steps)
    wrong = judge.wrong_data(steps, runs[0].seed)
    problems += [problem for part in (trends, ages, stretches) for each in part for problem in each.problems()]
    if not stretches:
        problems.append("no undisturbed run has come to a validation that the killed one has")
    if again.largest > judge.REPEATED_TOLERANCE:
        problems.append(f"a step that was done again has another loss: {again.largest}")
    if wrong:
        problems.append(f"{len(wrong)} steps had other windows than the sampler deals out, the first is {wrong[0]}")
    curves = [judge.curve(steps), *(judge.curve([one]) for one in reference_steps)]
    return {
        "problems": problems,
        "lives": [dataclasses.asdict(life) for life in found],
        "steps": sum(map(len, steps)),
        "last_step": max(curves[0], default=0),
        "compared_up_to": stretches[-1].last_step if stretches else 0,
        "undisturbed_up_to": [max(one, default=0) for one in reference_steps],
        "repeated": dataclasses.asdict(again),
        "wrong_data": len(wrong),
        "trends": [dataclasses.asdict(trend) | {"growth": trend.growth} for trend in trends],
        "same_age": [dataclasses.asdict(age) for age in ages],
        "stretches": [dataclasses.asdict(stretch) for stretch in stretches],
        "largest_validation_difference": _largest(validations[0], validations[1]),
        "training_differences": _growing(curves[0], curves[1]),
        "training": [_thinned(one) for one in curves],
        "validation": [sorted(one.items()) for one in validations],
        "memory": _memory([*runs, *references]),
    }


def _largest(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    return max((abs(one[step] - other[step]) for step in one.keys() & other.keys()), default=0.0)


def _growing(chain: Mapping[int, float], reference: Mapping[int, float]) -> dict[int, float]:
    """The largest difference of the training's loss, over the first so many steps."""
    marks = (100, 1000, 10_000, 100_000)
    common = sorted(chain.keys() & reference.keys())
    reach = [mark for mark in marks if common and mark <= common[-1]]
    return {
        mark: max((abs(chain[step] - reference[step]) for step in common if step <= mark), default=0.0)
        for mark in reach
    }


def _thinned(curve: Mapping[int, float]) -> list[tuple[int, float]]:
    """Means over equal parts of the curve."""
    steps = sorted(curve)
    width = max(1, -(-len(steps) // POINTS))
    parts = [steps[first : first + width] for first in range(0, len(steps), width)]
    return [(part[-1], round(sum(curve[step] for step in part) / len(part), 5)) for part in parts]


def _memory(runs: Sequence[Settings]) -> list[dict[str, Any]]:
    found = []
    for run in runs:
        for rank in range(run.world_size):
            samples = read_memory(run, rank)
            samples = samples[:: -(-len(samples) // POINTS) or 1]
            points = [[round(s["at"], 1), int(s["step"]), round(s["resident"] / 2**20, 2)] for s in samples]
            found.append({"chain": run.directory.name, "run": run.run, "rank": rank, "points": points})
    return found


def _say(life: Life, seconds: float) -> None:
    print(
        f"{seconds:6.0f} s  run {life.run} on {life.world_size}, {life.length}: from step {life.resumed_at} to "
        f"{life.last_step}, {life.saves} saves; killed ({life.victims}) in {life.phase}; "
        f"latest is {life.latest or 'not there yet'}{'; FAILED' if life.problems else ''}",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
