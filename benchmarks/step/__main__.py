"""The time of a training step and the peak memory of a rank, beside DDP and the other shardings, on two processes.

    python -m benchmarks.step [--rounds 3] [--steps 12] [--accumulate 1 4] [--width 512] [--json FILE] [--quick]

Every contestant runs in fresh processes, one after the other, and each round runs all of them, in an order that
rotates: so that a busy moment of the machine falls on all alike. Medians over all rounds; ratios are taken round by
round. The figure is a whole optimizer step from end to end, over as many micro-batches as `--accumulate` says.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine import limits_text, machine_limits
from benchmarks.ranks import WORLD_SIZE, Figures, installed, run_ranks
from benchmarks.rounds import median, median_ratio, rotated

DDP = "ddp"


@dataclass(frozen=True)
class Contestant:
    """Who takes part.

    Attributes:
        name: in the table.
        package: what has to be installed for it, if anything.
        bars: what the time beside DDP's should not exceed, by micro-batches a step.
    """

    name: str
    package: str | None = None
    bars: tuple[tuple[int, float], ...] = ()


OUR_BARS = ((1, 0.95), (4, 1.0))
CONTESTANTS = {
    DDP: Contestant("DDP"),
    "zero_redundancy": Contestant("DDP + ZeroRedundancyOptimizer"),
    "fsdp2_keeping": Contestant("FSDP2, keeping parameters"),
    "fsdp2_resharding": Contestant("FSDP2, resharding"),
    "deepspeed_1": Contestant("DeepSpeed ZeRO-1", package="deepspeed"),
    "deepspeed_2": Contestant("DeepSpeed ZeRO-2", package="deepspeed"),
    "deepspeed_3": Contestant("DeepSpeed ZeRO-3", package="deepspeed"),
    "zero_stage_1": Contestant("**lightning_zero, stage 1**", bars=OUR_BARS),
    "zero_stage_2": Contestant("**lightning_zero, stage 2**", bars=OUR_BARS),
    "alone": Contestant("forward and backward alone: the limit"),
}


@dataclass(frozen=True)
class Figure:
    """One cell pair of the table: a contestant at a number of micro-batches."""

    contestant: str
    name: str
    accumulate: int
    ratio: float
    seconds: float
    above_imports_mib: float
    bar: float | None


def run(contestant: str, accumulate: int, arguments: argparse.Namespace) -> Figures:
    """All ranks of one contestant: the median step, and the memory of the rank that needed the most."""
    options = ("--steps", arguments.steps, "--width", arguments.width, "--layers", arguments.layers)
    ranks = run_ranks("benchmarks.step.training", contestant, "--accumulate", accumulate, *options)
    return {
        "seconds": statistics.median(second for rank in ranks for second in rank["seconds"]),
        "above_imports_mib": max(rank["peak_mib"] - rank["base_mib"] for rank in ranks),
        "peak_mib": max(rank["peak_mib"] for rank in ranks),
        "parameters": ranks[0]["parameters"],
    }


def key(contestant: str, accumulate: int) -> str:
    """Of a round's entry."""
    return f"{contestant} x{accumulate}"


def figures_of(rounds: Sequence[dict[str, Figures]], accumulations: Sequence[int]) -> list[Figure]:
    """Medians of all rounds, in the table's order."""
    return [
        Figure(
            contestant,
            entry.name.strip("*"),
            accumulate,
            median_ratio(rounds, key(contestant, accumulate), key(DDP, accumulate), "seconds"),
            median(rounds, key(contestant, accumulate), "seconds"),
            median(rounds, key(contestant, accumulate), "above_imports_mib"),
            dict(entry.bars).get(accumulate),
        )
        for contestant, entry in CONTESTANTS.items()
        for accumulate in accumulations
        if key(contestant, accumulate) in rounds[0]
    ]


def table(figures: Sequence[Figure], accumulations: Sequence[int]) -> str:
    """As Markdown: three columns for each number of micro-batches."""
    by_place = {(figure.contestant, figure.accumulate): figure for figure in figures}
    title, columns = "| |", ("step, DDP = 1", "step, s", "memory, MiB")
    for accumulate in accumulations:
        suffix = "" if accumulate == 1 else f" (accumulating {accumulate})"
        title += "".join(f" {column}{suffix} |" for column in columns)
    lines = [title, "|---" * (1 + 3 * len(accumulations)) + "|"]
    for contestant, entry in CONTESTANTS.items():
        found = [by_place[contestant, each] for each in accumulations if (contestant, each) in by_place]
        if found:
            cells = (
                f"{each.ratio:.2f}{f' (≤ {each.bar:g})' if each.bar else ''} | {each.seconds:.3f} | "
                f"{each.above_imports_mib:.0f}"
                for each in found
            )
            lines.append(f"| {entry.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_text(figures: Sequence[Figure], parameters: int) -> str:
    """How much less memory ours need than ZeroRedundancyOptimizer, which keeps all gradients as DDP does."""
    gradients_mib = parameters * 4 / 2**20
    memory = {(figure.contestant, figure.accumulate): figure.above_imports_mib for figure in figures}
    parts = [
        f"stage {stage}{f' accumulating {accumulate}' if accumulate > 1 else ''} {saved:.0f} MiB less, "
        f"{saved / gradients_mib:.0%} of the gradients"
        for stage in (1, 2)
        for accumulate in sorted({figure.accumulate for figure in figures})
        if (f"zero_stage_{stage}", accumulate) in memory and ("zero_redundancy", accumulate) in memory
        for saved in [memory["zero_redundancy", accumulate] - memory[f"zero_stage_{stage}", accumulate]]
    ]
    return f"\n\nThan ZeroRedundancyOptimizer needs: {'; '.join(parts)}." if parts else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps; the first two are not counted")
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 4], help="micro-batches a step")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="one short round of a small model, for a look")
    parser.add_argument("--directory", type=Path, default=None, help="where the machine's disk is measured")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.steps, arguments.width, arguments.layers = 1, 6, 256, 4
    if arguments.steps < 4:
        parser.error("--steps is at least 4, of which two are counted")
    wanted = {name: CONTESTANTS[name] for name in CONTESTANTS if name in {DDP, *arguments.only}}
    for package in {entry.package for entry in wanted.values()}:
        if not installed(package, beside=[entry.name for entry in wanted.values() if entry.package == package]):
            wanted = {name: entry for name, entry in wanted.items() if entry.package != package}
    rounds: list[dict[str, Figures]] = []
    limits = []
    for number in range(arguments.rounds):
        limits.append(machine_limits(arguments.directory))
        rounds.append({})
        for accumulate in arguments.accumulate:
            for contestant in rotated(list(wanted), number):
                found = rounds[-1][key(contestant, accumulate)] = run(contestant, accumulate, arguments)
                print(f"round {number}: {key(contestant, accumulate)}: {found}", file=sys.stderr)
    figures = figures_of(rounds, arguments.accumulate)
    parameters = rounds[0][key(DDP, arguments.accumulate[0])]["parameters"]
    print(
        f"\n{parameters / 1e6:.1f} M parameters, fp32 (gradients: {parameters * 4 / 2**20:.0f} MiB), {WORLD_SIZE} "
        f"ranks, {platform.machine()}; memory is the peak of a rank above its imports\n\n"
        f"{table(figures, arguments.accumulate)}{memory_text(figures, parameters)}\n\n{limits_text(limits)}"
    )
    if arguments.json:
        content = {"parameters": parameters, "limits": limits, "figures": [asdict(each) for each in figures]}
        arguments.json.write_text(json.dumps({**content, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
