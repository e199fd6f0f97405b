"""`lightning-zero diff`: what differs between two checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.difference import Comparison, Difference, Side, bytes_to_compare, compare
from lightning_zero.checkpoint.storage import Location
from lightning_zero.cli.arguments import add_command, find_tag, location
from lightning_zero.cli.output import plain, print_json, print_table
from lightning_zero.cli.progress import progress_bar

if TYPE_CHECKING:
    from lightning_zero.cli.arguments import Commands

_SHOWN = 20
_VALUE_CHARACTERS = 40
_KINDS = {
    "parameter": "parameters",
    "frozen": "frozen parameters",
    "buffer": "buffers",
    "given": "given by hooks",
    "elsewhere": "tensors of callbacks and the like",
    "state": "optimizer states",
}


def add_to(commands: Commands) -> None:
    """Add the command."""
    text = (
        "Compare two checkpoints, of whatever stages and numbers of ranks, parameter by parameter: the model, the\n"
        "optimizers and their states, schedulers, hyper-parameters, the step. Exits with 1 if something differs.\n"
        "Pieces whose checksums are the same in both manifests aren't read; `verify` reads all against them."
    )
    example = "  lightning-zero diff ckpts/step=500.ckpt ckpts/step=1000.ckpt"
    command = add_command(commands, "diff", _diff, text, example)
    for name in ("a", "b"):
        command.add_argument(name, type=location, metavar=name.upper(), help="a tag's directory, or a save directory")
    command.add_argument("--all", action="store_true", help="show what is the same too, in the state dict's order")


def _diff(options: argparse.Namespace) -> int:
    a, b = (Side(_directory(path)) for path in (options.a, options.b))
    with progress_bar("comparing", bytes_to_compare(a, b), quiet=options.json) as progress:
        difference = compare(a, b, progress)
    if options.json:
        print_json(
            {
                "a": str(a.directory),
                "b": str(b.directory),
                "same": difference.same,
                "settings": [{"name": name, "a": ours, "b": theirs} for name, ours, theirs in difference.settings],
                "comparisons": [dataclasses.asdict(comparison) for comparison in difference.comparisons],
            }
        )
    else:
        for name, side in (("A", a), ("B", b)):
            ranks = f"{side.manifest.world_size} rank{'s' if side.manifest.world_size != 1 else ''}"
            print(f"{name}: {side.directory}, step {side.manifest.step}, {ranks}, stage {side.manifest.stage}")
        _print(difference, options.all)
    return 0 if difference.same else 1


def _directory(path: Location) -> Location:
    directory, problems = find_tag(path, None)
    for problem in problems:
        print(f"lightning-zero: {problem}", file=sys.stderr)
    commit.check_link(directory)
    return directory


def _print(difference: Difference, everything: bool) -> None:
    if difference.settings:
        print()
        print_table(
            [(plain(name), _short(ours), "→", _short(theirs)) for name, ours, theirs in difference.settings], "<<<<"
        )
    shown = difference.comparisons
    if not everything:
        shown = sorted((one for one in shown if one.verdict != "same"), key=_severity)
    left_out = 0 if everything else max(0, len(shown) - _SHOWN)
    shown = shown[: len(shown) - left_out]
    if shown:
        print()
        print_table([["", "what", "differing", "of", "max |A-B|", ""], *map(_cells, shown)], "<<>>><")
    if left_out:
        print(f"… and {left_out} more; --all shows them")
    print()
    for line in _summary(difference.comparisons):
        print(line)
    print("same" if difference.same else "different")


def _severity(comparison: Comparison) -> tuple[bool, float]:
    """What is in one of them alone, or of another shape, comes first; then the largest differences."""
    most = comparison.max_difference
    return bool(comparison.numel), -math.inf if math.isnan(most) else -most


def _cells(one: Comparison) -> list[str]:
    what = f"{plain(one.state or '')} of optimizer {one.optimizer}" if one.kind == "state" else one.kind
    remark = one.verdict if one.verdict.startswith("only") else plain(one.reason)
    if not one.numel:
        return [plain(one.name), what, "-", "-", "-", remark or one.verdict]
    most = f"{one.max_difference:.3g}" if one.differing else "-"
    return [plain(one.name), what, f"{one.differing:,}", f"{one.numel:,}", most, remark]


def _summary(comparisons: Iterable[Comparison]) -> Iterable[str]:
    """How many of each kind there are, and differ."""
    total: Counter[str] = Counter()
    unlike: Counter[str] = Counter()
    for comparison in comparisons:
        total[comparison.kind] += 1
        unlike[comparison.kind] += comparison.verdict != "same"
    for kind, name in _KINDS.items():
        if total[kind]:
            yield f"{name}: {unlike[kind]} of {total[kind]} differ"


def _short(text: str) -> str:
    text = plain(text)
    return text if len(text) <= _VALUE_CHARACTERS else f"{text[: _VALUE_CHARACTERS - 1]}…"
