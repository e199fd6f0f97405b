"""How long training waits for a checkpoint and what a resume costs, beside DDP's way, DCP and the bare machine.

    python -m benchmarks.checkpoint [--params 124e6 | small] [--repeats 3] [--only zero,ddp] [--json FILE]

Two ranks over gloo, one thread each, under Lightning's Trainer. Every contestant runs in fresh processes, one after the
other, and every repeat runs all of them. What is compared closely (a save and a plain write of the same bytes) takes
turns within one process. Ratios are taken turn by turn; medians over all. The first of a process is reported apart.

No caches are dropped: loads read what the page cache holds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoint.contestants import WORLD_SIZE, has_async_save
from benchmarks.checkpoint.gpt import SIZES
from tests.launch import free_port, rank_environment

CONTESTANTS = (
    "zero",
    "ddp",
    "zero-async",
    "dcp-async",
    "zero-prepare",
    "ddp-prepare",
    "zero-load",
    "ddp-load",
    "dcp-load",
)
"""In the order in which they run: the loads read what those before them have prepared."""

TIMEOUT_SECONDS = 300
Turn = dict[str, Any]


def run(contestant: str, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All ranks of one contestant: the turns as the slowest rank saw each figure."""
    command = [sys.executable, "-m", "benchmarks.checkpoint.contestants", contestant, f"--size={arguments.params}"]
    command += [f"--directory={directory}", f"--turns={arguments.turns}", f"--tokens={arguments.tokens}"]
    port, ranks = free_port(), []
    for rank in range(WORLD_SIZE):
        env = os.environ | rank_environment(rank, WORLD_SIZE, port) | {"OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{contestant} failed:\n" + "\n".join(error for _, error in outputs))
    results = [json.loads(output.strip().splitlines()[-1]) for output, _ in outputs]
    figures: dict[str, Any] = dict(results[0])
    figures["turns"] = [
        {key: value if isinstance(value, list) else max(turn[key] for turn in turns) for key, value in turns[0].items()}
        for turns in zip(*(result["turns"] for result in results), strict=True)
    ]
    return figures


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: what is measured.
        contestant: by whom.
        value: the figure of one turn.
        floor: what the same turn's figure is compared with, if anything.
        bar: what the ratio to it should not exceed.
        unit: of the figure.
    """

    name: str
    contestant: str
    value: Callable[[Turn], float]
    floor: Callable[[Turn], float] | None = None
    bar: float | None = None
    unit: str = "s"


def _of(key: str) -> Callable[[Turn], float]:
    return lambda turn: float(turn[key])


def _slower_beside(turn: Turn) -> float:
    return statistics.median(turn["steps_beside"]) / float(turn["step_quiet"])


ROWS = (
    Row("plain write + fsync of the same bytes", "zero", _of("write")),
    Row("**lightning_zero, save**", "zero", _of("save"), _of("write"), 1.3),
    Row("DCP, save", "zero", _of("dcp"), _of("write")),
    Row("DDP, torch.save on rank 0, no fsync", "ddp", _of("save")),
    Row("copy of the rank's bytes, warm to warm", "zero-async", _of("copy")),
    Row("**lightning_zero, async: the stall**", "zero-async", _of("stall"), _of("copy"), 1.2),
    Row("— until it is durable", "zero-async", _of("durable")),
    Row("— steps meanwhile, others = 1", "zero-async", _slower_beside, unit=""),
    Row("— training lost beside the stall", "zero-async", _of("lost")),
    Row("DCP, async_save: the stall", "dcp-async", _of("stall"), _of("copy")),
    Row("— until it is durable", "dcp-async", _of("durable")),
    Row("— steps meanwhile, others = 1", "dcp-async", _slower_beside, unit=""),
    Row("— training lost beside the stall", "dcp-async", _of("lost")),
    Row("plain read of the rank's bytes, page cache to warm memory", "zero-load", _of("read")),
    Row("— the optimizer states into new memory", "zero-load", _of("read_fresh"), _of("read")),
    Row("**lightning_zero, resume**", "zero-load", _of("load"), _of("read"), 1.5),
    Row("— beside the read into new memory", "zero-load", _of("load"), _of("read_fresh")),
    Row('— verify="full"', "zero-load", _of("full"), _of("load")),
    Row("DDP, resume by torch.load", "ddp-load", _of("load")),
    Row("DCP, load", "dcp-load", _of("load")),
    Row("**lightning_zero: memory beyond the state**", "zero-load", _of("above_mib"), bar=64, unit="MiB"),
    Row("DDP: memory beyond the state", "ddp-load", _of("above_mib"), unit="MiB"),
    Row("DCP: memory beyond the state", "dcp-load", _of("above_mib"), unit="MiB"),
)


def split(runs: Iterable[dict[str, Any]]) -> tuple[list[Turn], list[Turn]]:
    """The first turn of each process, and all later ones."""
    first, later = [], []
    for figures in runs:
        turns = figures["turns"]
        for turn in turns:
            if "steps_quiet" in figures:
                turn["step_quiet"] = statistics.median(figures["steps_quiet"])
        first += turns[:1]
        later += turns[1:]
    return first, later


def _shown(value: float, unit: str) -> str:
    return f"{value:.0f} {unit}" if unit == "MiB" else f"{value:.3f} {unit}".strip()


def table(repeats: Sequence[dict[str, dict[str, Any]]]) -> tuple[str, list[dict[str, Any]]]:
    """As Markdown, and as figures."""
    lines = ["| | first | later | ratio, first | ratio, later | bar |", "|---|---|---|---|---|---|"]
    figures = []
    for row in ROWS:
        first, later = split(repeat[row.contestant] for repeat in repeats if row.contestant in repeat)
        if not later:
            continue
        medians = [statistics.median(map(row.value, turns)) for turns in (first, later)]
        cells = [_shown(value, row.unit) for value in medians]
        if row.unit == "MiB":
            cells[1] = ""  # a later load finds memory that the one before has left
        ratios: list[float | None] = [None, None]
        if row.floor is not None:
            ratios = [statistics.median(row.value(t) / row.floor(t) for t in turns) for turns in (first, later)]
        cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        cells.append("" if row.bar is None else f"≤ {row.bar:g}")
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
        figures.append(
            {"name": row.name.strip("*— "), "contestant": row.contestant, "unit": row.unit, "first": medians[0]}
            | {"later": medians[1], "ratio_first": ratios[0], "ratio_later": ratios[1], "bar": row.bar}
        )
    _add_stall_beside_ddp(lines, figures)
    return "\n".join(lines), figures


def _add_stall_beside_ddp(lines: list[str], figures: list[dict[str, Any]]) -> None:
    """The stall against a save by DDP, which runs in other processes: the ratio of the medians."""
    by_name = {figure["name"]: figure for figure in figures}
    stall = by_name.get("lightning_zero, async: the stall")
    whole = by_name.get("DDP, torch.save on rank 0, no fsync")
    if stall and whole:
        first, later = (stall[key] / whole[key] for key in ("first", "later"))
        lines.append(f"| the stall, beside DDP's save | | | {first:.2f} | {later:.2f} | < 0.1 |")
        figures.append({"name": "the stall, beside DDP's save", "ratio_first": first, "ratio_later": later, "bar": 0.1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", choices=SIZES, default="124e6", help="124e6: GPT-2; small: 24 million, for a look")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes of each contestant")
    parser.add_argument("--turns", type=int, default=4, help="saves or loads in each process; at least 2")
    parser.add_argument("--tokens", type=int, default=32, help="of a training step")
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="some of them, by name: %(default)s")
    parser.add_argument("--directory", type=Path, default=None, help="on the disk that is to be measured")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if arguments.turns < 2 or not set(wanted) <= set(CONTESTANTS):
        parser.error(f"--turns is at least 2, and --only names some of {', '.join(CONTESTANTS)}")
    if not has_async_save() and "zero-async" in wanted:
        print("this lightning_zero has no async_save yet: zero-async is left out", file=sys.stderr)
        wanted.remove("zero-async")
    repeats: list[dict[str, dict[str, Any]]] = []
    loads: list[float] = []
    for number in range(arguments.repeats):
        loads.append(os.getloadavg()[0])
        repeats.append({})
        for contestant in (name for name in CONTESTANTS if name in wanted):
            if contestant in ("zero", "zero-prepare"):
                folder = tempfile.TemporaryDirectory(prefix="checkpoint-benchmark-", dir=arguments.directory)
            repeats[-1][contestant] = run(contestant, Path(folder.name), arguments)
            print(f"repeat {number}: {contestant}: {repeats[-1][contestant]['turns']}", file=sys.stderr)
    text, figures = table(repeats)
    some = next(iter(repeats[0].values()))
    print(f"\n{some['parameters'] / 1e6:.1f} M parameters, fp32, {WORLD_SIZE} ranks, {platform.machine()}\n\n{text}")
    if arguments.json:
        content = {"parameters": some["parameters"], "load_average": loads, "figures": figures, "repeats": repeats}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
