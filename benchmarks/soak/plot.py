"""Draws what `--json` has written: the killed chain's loss over the undisturbed one's, and the memory of every rank.

python -m benchmarks.soak.plot results.json soak.svg
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

CHAIN, UNDISTURBED, SEEDS, KILL = "#b3261e", "#1f4e79", "#9aa5b1", "#d9a441"
RANKS = {1: "#7a9e7e", 2: "#5b7db1", 3: "#8e6c8a"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path, help="an .svg or a .png")
    arguments = parser.parse_args()
    found = json.loads(arguments.results.read_text())
    figure = Figure(figsize=(10, 9), layout="constrained")
    losses, differences, memory = figure.subplots(3, 1)
    _losses(losses, found)
    _differences(differences, found)
    _memory(memory, found)
    for axes in (losses, differences, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(arguments.picture)


def _losses(axes: Axes, found: Mapping[str, Any]) -> None:
    """Kills stand where the next run went on."""
    _, undisturbed, *seeds = found["training"]
    for number, seed in enumerate(seeds):
        axes.plot(*zip(*seed, strict=True), color=SEEDS, linewidth=0.8, label=None if number else "other seeds")
    axes.plot(*zip(*undisturbed, strict=True), color=UNDISTURBED, linewidth=2.4, label="undisturbed")
    axes.plot(*zip(*found["training"][0], strict=True), color=CHAIN, linewidth=0.9, label="killed and resumed")
    for number, life in enumerate(life for life in found["lives"] if life["resumed_at"]):
        label = None if number else "resumed on another number of ranks"
        axes.axvline(life["resumed_at"], color=KILL, linewidth=0.6, label=label, zorder=0)
    axes.set(xlabel="step", ylabel="loss in training", title="The loss of a training that was killed and resumed")


def _differences(axes: Axes, found: Mapping[str, Any]) -> None:
    chain, undisturbed, *seeds = (dict(map(tuple, one)) for one in found["validation"])
    for number, seed in enumerate(seeds):
        _distance(axes, seed, undisturbed, SEEDS, None if number else "another seed from the undisturbed")
    _distance(axes, chain, undisturbed, CHAIN, "killed and resumed from the undisturbed")
    axes.set(xlabel="step", ylabel="difference", yscale="log", title="The loss in validation: distance of two runs")


def _distance(axes: Axes, one: Mapping[int, float], other: Mapping[int, float], color: str, label: str | None) -> None:
    steps = sorted(one.keys() & other.keys())
    axes.plot(steps, [abs(one[step] - other[step]) for step in steps], color=color, linewidth=0.9, label=label)


def _memory(axes: Axes, found: Mapping[str, Any]) -> None:
    began, labelled = found["lives"][0]["began_at"], set()
    sizes = {life["run"]: life["world_size"] for life in found["lives"]}
    for line in found["memory"]:
        killed = line["chain"] == "killed"
        name = f"killed, {sizes[line['run']]} rank(s)" if killed else "undisturbed, 1 rank"
        color = RANKS[sizes[line["run"]]] if killed else SEEDS
        points = [((at - began) / 60, resident) for at, _, resident in line["points"]]
        if points:
            label = None if name in labelled else name
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.0, label=label)
            labelled.add(name)
    for life in found["lives"]:
        if life["victims"] != "nobody":
            axes.axvline((life["began_at"] + life["seconds"] - began) / 60, color=KILL, linewidth=0.6, zorder=0)
    axes.set(xlabel="minutes", ylabel="resident, MiB", title="Memory of each rank, and the kills")


if __name__ == "__main__":
    main()
