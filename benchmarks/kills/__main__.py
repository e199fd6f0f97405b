"""Kill a training that saves all the time, hundreds of times, and look each time at what is left.

    python -m benchmarks.kills [--kills 200] [--mode both] [--seed 0] [--json FILE]

Every run resumes from what the one before left when it was killed (SIGKILL, one rank or all, at a random moment), on
another number of ranks, and is killed in its turn. The README says what is looked at. Exits with 1 if anything was
wrong; the directory is kept then.
"""

import argparse
import collections
import dataclasses
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.kills.chain import Kill, kills
from benchmarks.kills.ranks import MID_SAVE, preload


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of each mode")
    parser.add_argument("--mode", choices=("sync", "async", "both"), default="both")
    parser.add_argument("--seed", type=int, default=0, help="of what is chosen; the moments are the machine's, too")
    parser.add_argument("--length", type=int, default=20, help="runs that follow on one another in one directory")
    parser.add_argument("--every", type=int, default=10, help="print a line after so many kills")
    parser.add_argument("--directory", type=Path, default=None, help="where to work; a temporary directory by default")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    arguments = parser.parse_args()
    preload("benchmarks.kills.training")
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="lightning_zero-kills-"))
    found: list[Kill] = []
    began = time.monotonic()
    for mode in ("sync", "async") if arguments.mode == "both" else (arguments.mode,):
        chooser = random.Random(f"{arguments.seed} {mode}")
        for kill in kills(directory, mode, arguments.kills, chooser, length=arguments.length):
            found.append(kill)
            if kill.problems:
                _explain(kill, directory)
            if len(found) % arguments.every == 0:
                _say(found, time.monotonic() - began)
    table = _table(found)
    print(table)
    failed = sum(bool(kill.problems) for kill in found)
    if arguments.json:
        figures = {
            "kills": len(found),
            "failed": failed,
            "in_mid_save": sum(kill.phase in MID_SAVE for kill in found),
            "seconds": round(time.monotonic() - began, 1),
            "seed": arguments.seed,
            "table": table.splitlines(),
            "each": [dataclasses.asdict(kill) for kill in found],
        }
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    if not failed and arguments.directory is None:
        shutil.rmtree(directory)
    return 1 if failed else 0


def _say(found: list[Kill], seconds: float) -> None:
    last = found[-1]
    hit = sum(kill.phase in MID_SAVE for kill in found)
    failed = sum(bool(kill.problems) for kill in found)
    print(
        f"{len(found)} kills in {seconds:.0f} s, {hit} in mid-save, {failed} failed; "
        f"{last.mode}, {last.retention}: latest is {last.latest or 'not there yet'}",
        flush=True,
    )


def _explain(kill: Kill, directory: Path) -> None:
    where = directory / f"{kill.mode}-{kill.chain:03d}"
    print(f"\nFAILED: {kill}", file=sys.stderr)
    for problem in kill.problems:
        print(f"  {problem}", file=sys.stderr)
    print(
        f"  it is kept. To look at it: lightning-zero ls {where / 'ckpts'}; lightning-zero verify {where / 'ckpts'}; "
        f"cat {where / 'journal.jsonl'} {where}/run-{kill.run:03d}-rank-*.log\n",
        file=sys.stderr,
        flush=True,
    )


def _table(found: list[Kill]) -> str:
    """Kills by mode, victims and the phase that was hit."""
    phases = ("start-up", "between saves", *MID_SAVE)
    lines = [
        f"| mode, killed | {' | '.join(phases)} | all | failed |",
        f"|---|{'---|' * (len(phases) + 2)}",
    ]
    groups = collections.defaultdict(list)
    for kill in found:
        groups[f"{kill.mode}, {kill.victims}"].append(kill)
    groups["all"] = found
    for name, group in groups.items():
        counts = [sum(kill.phase == phase for kill in group) for phase in phases]
        cells = [*counts, len(group), sum(bool(kill.problems) for kill in group)]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    alone = [kill for kill in found if kill.victims == "one rank"]
    survivors = sum(kill.world_size - 1 for kill in alone)
    lines += [
        "",
        f"{sum(kill.phase in MID_SAVE for kill in found)} of {len(found)} kills hit in mid-save. "
        f"{sum(kill.resumed_at is not None for kill in found)} runs resumed. Of {survivors} ranks that outlived "
        f"one that was killed, {sum(kill.had_to_be_killed for kill in alone)} didn't end by themselves.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
