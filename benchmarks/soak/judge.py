"""What a soak has to show: memory that stays flat, data and losses as if nobody had been killed.

| what is looked at | must be |
|---|---|
| memory of a rank, in a run | in the median of its last quarter within 2 % of its first quarter's, after the warm-up |
| open files and threads of a rank | at the fewest, no more in its last quarter than in its first |
| memory at the same age, in the first and the last run on as many ranks | within 2 % |
| the windows of each step, of all ranks | those that the example's own sampler deals out |
| the loss of a step that was done again | the first one's, but for the order of summation |
| the validation's loss, in each stretch of the curve | no further from an undisturbed run than seeds from each other |

A run of few samples can't tell a leak from a process that is still settling: see `TREND_SAMPLES`.
"""

from __future__ import annotations

import itertools
import statistics
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from gpt import ElasticSampler, StandardLibrary

from benchmarks.kills.training import read_journal
from benchmarks.soak.training import BLOCK_SIZE, GLOBAL_BATCH, Settings, read_memory, read_steps

TOLERANCE = 0.02
WARM_UP_SAMPLES = 15
"""One a save: caches fill, threads start, the host memory of saves is reserved."""

TREND_SAMPLES = 40
"""A run of fewer, after the warm-up, isn't judged for its trend."""

STRETCHES = 10
STRETCH_POINTS = 5
REPEATED_TOLERANCE = 1e-3
"""Of a loss: at most 40 steps lie between the state that both have begun with and the last step that was repeated."""


@dataclass(frozen=True)
class Trend:
    """How one rank of one run grew; its memory in MiB.

    Attributes:
        chain: `killed`, or which reference.
        run: its number.
        rank: of the run.
        world_size: of the run.
        samples: one a save, the warm-up left out.
        steps: how many the samples span.
        resident: in the median of the first and the last quarter.
        anonymous: of it, what isn't a file's.
        files: that were open; the fewest of a quarter, since a slow save is still being written at some samples.
        threads: that there were, the same.
        bytes_per_save: the slope of `anonymous` between the two.
        judged: whether there are enough samples.
    """

    chain: str
    run: int
    rank: int
    world_size: int
    samples: int
    steps: int
    resident: tuple[float, float]
    anonymous: tuple[float, float]
    files: tuple[float, float]
    threads: tuple[float, float]
    bytes_per_save: float
    judged: bool

    @property
    def growth(self) -> float:
        """Of the resident memory; 0.01 is one percent."""
        return self.resident[1] / self.resident[0] - 1

    def problems(self) -> list[str]:
        """What must not be."""
        if not self.judged:
            return []
        who = f"{self.chain}, run {self.run}, rank {self.rank} of {self.world_size}, in {self.steps} steps"
        found = []
        if self.growth > TOLERANCE:
            found.append(f"memory grew from {self.resident[0]:.1f} MiB to {self.resident[1]:.1f} MiB: {who}")
        for name, (first, last) in (("open files", self.files), ("threads", self.threads)):
            if last > first:
                found.append(f"{name} grew from {first:g} to {last:g}: {who}")
        return found


@dataclass(frozen=True)
class SameAge:
    """Resident memory in MiB at the same age, in the first and the last run on as many ranks."""

    world_size: int
    runs: tuple[int, int]
    resident: tuple[float, float]

    def problems(self) -> list[str]:
        """What must not be."""
        if self.resident[1] <= self.resident[0] * (1 + TOLERANCE):
            return []
        return [
            f"at the same age, run {self.runs[1]} has {self.resident[1]:.1f} MiB, and run {self.runs[0]} on "
            f"{self.world_size} ranks had {self.resident[0]:.1f} MiB"
        ]


@dataclass(frozen=True)
class Stretch:
    """A part of the validation's curve: root mean squares of differences.

    Attributes:
        first_step: of its points.
        last_step: of its points.
        points: how many.
        chain: of the killed chain from the undisturbed run of the same seed.
        seeds: of undisturbed runs of different seeds from each other.
    """

    first_step: int
    last_step: int
    points: int
    chain: float
    seeds: float

    def problems(self) -> list[str]:
        """What must not be."""
        if self.chain <= self.seeds:
            return []
        return [
            f"from step {self.first_step} to {self.last_step} the killed chain's loss is {self.chain:.4f} from the "
            f"undisturbed run's, and seeds are {self.seeds:.4f} apart"
        ]


# ------------------------------------------------------------------------------------------------------ memory


def trends(chain: str, runs: Sequence[Settings]) -> list[Trend]:
    """One for each rank that lived long enough to be looked at."""
    return [
        _trend(chain, run, rank, samples)
        for run in runs
        for rank in range(run.world_size)
        if len(samples := read_memory(run, rank)[WARM_UP_SAMPLES:]) >= 4
    ]


def _trend(chain: str, run: Settings, rank: int, samples: Sequence[Mapping[str, float]]) -> Trend:
    quarter = len(samples) // 4

    def ends(name: str, typical: Callable[[Iterable[float]], float]) -> tuple[float, float]:
        first, last = (typical([s[name] for s in part]) for part in (samples[:quarter], samples[-quarter:]))
        return first, last

    def mebibytes(name: str) -> tuple[float, float]:
        first, last = ends(name, statistics.median)
        return first / 2**20, last / 2**20

    anonymous = mebibytes("anonymous")
    return Trend(
        chain,
        run.run,
        rank,
        run.world_size,
        samples=len(samples),
        steps=int(samples[-1]["step"] - samples[0]["step"]),
        resident=mebibytes("resident"),
        anonymous=anonymous,
        files=ends("files", min),
        threads=ends("threads", min),
        bytes_per_save=(anonymous[1] - anonymous[0]) * 2**20 / (len(samples) - quarter),
        judged=len(samples) >= TREND_SAMPLES,
    )


def same_age(runs: Sequence[Settings]) -> list[SameAge]:
    """For each number of ranks on which two runs or more outlived the warm-up: the mean of all their ranks."""
    found = []
    for world_size in sorted({run.world_size for run in runs}):
        ages = {}
        for run in runs:
            ranks = [read_memory(run, rank)[WARM_UP_SAMPLES:][:5] for rank in range(run.world_size)]
            if run.world_size == world_size and all(len(samples) == 5 for samples in ranks):
                medians = [statistics.median(sample["resident"] for sample in samples) for samples in ranks]
                ages[run.run] = statistics.mean(medians) / 2**20
        if len(ages) > 1:
            first, last = min(ages), max(ages)
            found.append(SameAge(world_size, (first, last), (ages[first], ages[last])))
    return found


# ------------------------------------------------------------------------------------------------ data and losses


@dataclass(frozen=True)
class Repeated:
    """Steps that were done again after a kill.

    Attributes:
        steps: how many.
        largest: difference of the loss to the first time.
    """

    steps: int
    largest: float


def whole_steps(run: Settings) -> dict[int, tuple[float, int]]:
    """By step that all ranks have done: the loss of the global batch, and the sum over its windows."""
    ranks = [{int(record["step"]): record for record in read_steps(run, rank)} for rank in range(run.world_size)]
    common = sorted(set.intersection(*(set(steps) for steps in ranks)))
    return {
        step: (
            statistics.fmean(float(steps[step]["loss"]) for steps in ranks),
            sum(int(steps[step]["windows"]) for steps in ranks),
        )
        for step in common
    }


def curve(runs: Sequence[Mapping[int, tuple[float, int]]]) -> dict[int, float]:
    """The training's loss by step; of a step that was done again, the last time counts."""
    return {step: loss for steps in runs for step, (loss, _) in steps.items()}


def repeated(runs: Sequence[Mapping[int, tuple[float, int]]]) -> Repeated:
    """Compare each step that was done again with the time before."""
    seen: dict[int, float] = {}
    differences = []
    for steps in runs:
        for step, (loss, _) in steps.items():
            if step in seen:
                differences.append(abs(loss - seen[step]))
            seen[step] = loss
    return Repeated(len(differences), max(differences, default=0.0))


def wrong_data(runs: Sequence[Mapping[int, tuple[float, int]]], seed: int) -> list[int]:
    """The steps whose windows aren't those that the example's sampler deals out, over all epochs."""
    expected = expected_windows(seed, max((max(steps) for steps in runs if steps), default=0))
    return [step for steps in runs for step, (_, windows) in steps.items() if windows != expected[step]]


def expected_windows(seed: int, steps: int) -> list[int]:
    """By step, from 1 on, the sum over the windows of the global batch. The first element is none's."""
    data = StandardLibrary(block_size=BLOCK_SIZE, batch_size=GLOBAL_BATCH, seed=seed)
    data.setup("fit")
    text = data.training_windows.text.numpy().tobytes()
    sampler = data.train_dataloader().sampler
    assert isinstance(sampler, ElasticSampler)
    expected, epoch = [0], 0
    while len(expected) <= steps:
        sampler.set_epoch(epoch)
        indices = list(sampler)
        for first in range(0, len(indices) - GLOBAL_BATCH + 1, GLOBAL_BATCH):
            starts = [index * BLOCK_SIZE for index in indices[first : first + GLOBAL_BATCH]]
            expected.append(sum(zlib.crc32(text[start : start + BLOCK_SIZE + 1]) for start in starts))
        epoch += 1
    return expected


def validation(run: Settings) -> dict[int, float]:
    """The validation's loss by step, of all runs of the chain; of a step that was done again, the last time counts."""
    return {line["step"]: line["loss"] for line in read_journal(run.directory) if line["event"] == "validated"}


def stretches(chain: Mapping[int, float], references: Sequence[Mapping[int, float]]) -> list[Stretch]:
    """Compare as far as all curves go; the first reference has the chain's seed."""
    common = sorted(set(chain).intersection(*references))
    if not common:
        return []
    parts = np.array_split(np.array(common), max(1, min(STRETCHES, len(common) // STRETCH_POINTS)))
    return [
        Stretch(
            int(part[0]),
            int(part[-1]),
            len(part),
            chain=_distance(chain, references[0], part),
            seeds=float(
                np.sqrt(np.mean([_distance(a, b, part) ** 2 for a, b in itertools.combinations(references, 2)]))
            ),
        )
        for part in parts
    ]


def _distance(one: Mapping[int, float], other: Mapping[int, float], steps: np.ndarray) -> float:
    return float(np.sqrt(np.mean([(one[step] - other[step]) ** 2 for step in steps.tolist()])))
