"""How long training waits for a checkpoint and what a resume costs, beside DDP, FSDP2 + DCP, DeepSpeed, the machine.

    python -m benchmarks.checkpoint [--params 124e6 | small] [--repeats 3] [--turns 4] [--json FILE] [--quick]

Two ranks over gloo, one thread each. Every contestant saves, saves behind training and loads in fresh processes, and
every repeat runs all of them, in an order that rotates. What is compared closely (a save and a plain write of as many
bytes) takes turns within one process; which of the two begins changes from repeat to repeat. Ratios are taken turn by
turn; medians over all. The first of a process is reported apart.

No caches are dropped: loads read what the page cache holds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoint.table import figures, markdown, tell
from benchmarks.machine import limits_text, machine_limits
from benchmarks.ranks import WORLD_SIZE, Figures, installed, run_ranks
from benchmarks.rounds import rotated

PARTS = {
    "zero": ("save", "behind", "load"),
    "ddp": ("save", "load"),
    "fsdp2": ("save", "behind", "load"),
    "deepspeed": ("save", "load"),
}
"""What each contestant does, in this order: the load reads what the save has left."""


def run(contestant: str, part: str, directory: Path, arguments: argparse.Namespace, first: int) -> Figures:
    """All ranks of one contestant: the turns as the slowest rank saw each figure."""
    options = ("--size", arguments.params, "--turns", arguments.turns, "--tokens", arguments.tokens)
    ranks = run_ranks(
        "benchmarks.checkpoint.contestants", contestant, part, "--directory", directory, "--first", first, *options
    )
    found: dict[str, Any] = dict(ranks[0])
    found["turns"] = [
        {key: value if isinstance(value, list) else max(turn[key] for turn in turns) for key, value in turns[0].items()}
        for turns in zip(*(rank["turns"] for rank in ranks), strict=True)
    ]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--params",
        default="124e6",
        help="124e6: GPT-2; 203e6: a wider one; small: 24 million; tiny: to see that it runs",
    )
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes of each contestant")
    parser.add_argument("--turns", type=int, default=4, help="saves or loads in each process; at least 2")
    parser.add_argument("--tokens", type=int, default=32, help="of a training step")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="one short repeat of a small model, for a look")
    parser.add_argument("--directory", type=Path, default=None, help="on the disk that is to be measured")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.params, arguments.repeats, arguments.turns = "small", 1, 2
    if arguments.turns < 2:
        parser.error("--turns is at least 2: the first of a process is another matter than the next")
    wanted = [name for name in PARTS if name in arguments.only]
    if "deepspeed" in wanted and not installed("deepspeed", beside=["its contestant"]):
        wanted.remove("deepspeed")
    repeats: list[dict[str, Figures]] = []
    limits, loads = [], []
    for number in range(arguments.repeats):
        limits.append(machine_limits(arguments.directory))
        loads.append(os.getloadavg()[0])
        repeats.append({})
        for contestant in rotated(wanted, number):
            with tempfile.TemporaryDirectory(prefix="checkpoint-benchmark-", dir=arguments.directory) as folder:
                for part in PARTS[contestant]:
                    found = repeats[-1][f"{contestant} {part}"] = run(contestant, part, Path(folder), arguments, number)
                    print(f"repeat {number}: {contestant} {part}: {found['turns']}", file=sys.stderr)
    told = tell(repeats)
    parameters = next(iter(repeats[0].values()))["parameters"]
    print(
        f"\n{parameters / 1e6:.1f} M parameters, fp32, {WORLD_SIZE} ranks, {platform.machine()}\n\n"
        f"{markdown(told)}\n\n{limits_text(limits)}"
    )
    if arguments.json:
        content = {"parameters": parameters, "load_average": loads, "limits": limits, "figures": figures(told)}
        arguments.json.write_text(json.dumps({**content, "repeats": repeats}, indent=1) + "\n")


if __name__ == "__main__":
    main()
