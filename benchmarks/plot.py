"""A benchmark's figures as bars, small enough for a README.

    python -m benchmarks.plot step benchmarks/step/results.json benchmarks/step/step.svg

What is ours has the strong colour; a dashed line is what everybody is compared with, and a dotted one a bar that ours
should stay below.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS, THEIRS = "#792ee5", "#b9bdc9"
INK, FAINT = "#4a4f5c", "#8b90a0"


@dataclass(frozen=True)
class Chart:
    """Horizontal bars of one figure.

    Attributes:
        title: with the unit.
        bars: label and value of each contestant.
        one: where what is compared with stands, if it is a ratio.
        bar: what ours should not exceed, if anything.
    """

    title: str
    bars: Sequence[tuple[str, float]]
    one: float | None = None
    bar: float | None = None


def step_charts(results: dict[str, Any]) -> list[Chart]:
    """Time and memory, with and without accumulation."""
    charts = []
    for accumulate in sorted({figure["accumulate"] for figure in results["figures"]}):
        figures = [figure for figure in results["figures"] if figure["accumulate"] == accumulate]
        suffix = "" if accumulate == 1 else f", accumulating {accumulate}"
        bar = next((figure["bar"] for figure in figures if figure["bar"]), None)
        ratios = [(figure["name"], figure["ratio"]) for figure in figures]
        charts.append(Chart(f"step, DDP = 1{suffix}", ratios, one=1, bar=bar))
        trained = [figure for figure in figures if figure["contestant"] != "alone"]
        memory = [(figure["name"], figure["above_imports_mib"]) for figure in trained]
        charts.append(Chart(f"peak memory, MiB{suffix}", memory))
    return charts


def checkpoint_charts(results: dict[str, Any]) -> list[Chart]:
    """What training waits for, until when it is durable, what a resume takes, and its memory."""
    figures = {figure["name"]: figure for figure in results["figures"]}

    def bars(names: dict[str, str], key: str) -> list[tuple[str, float]]:
        return [(label, figures[name][key]) for name, label in names.items() if (figures.get(name) or {}).get(key)]

    ours, dcp = "lightning_zero", "FSDP2 + DCP"
    ddp, deepspeed = "DDP, resume by torch.load", "DeepSpeed ZeRO-2, load_checkpoint"
    waits = {
        "plain write + fsync of the rank's bytes": "plain write + fsync",
        f"{ours}, save": f"{ours}, save",
        "DDP, torch.save on rank 0, no fsync": "DDP, torch.save",
        f"{dcp}, save": f"{dcp}, save",
        "DeepSpeed ZeRO-2, save_checkpoint, no fsync": "DeepSpeed ZeRO-2",
        f"{ours}, async_save: the stall": f"{ours}, async_save",
        f"{dcp}, async_save: the stall": f"{dcp}, async_save",
    }
    loads = {
        "plain read of the rank's bytes, page cache to warm memory": "plain read",
        f"{ours}, resume": ours,
        ddp: "DDP, torch.load",
        f"{dcp}, load": dcp,
        deepspeed: "DeepSpeed ZeRO-2",
    }
    memory = {f"{name}: memory beyond the state": label for name, label in loads.items() if name != f"{ours}, resume"}
    memory = {f"{ours}: memory beyond the state": ours, **memory}
    return [
        Chart("training waits for a save, s", bars(waits, "later")),
        Chart("a resume, s", bars(loads, "later")),
        Chart("memory beyond the state while loading, MiB", bars(memory, "first")),
    ]


def export_charts(results: dict[str, Any]) -> list[Chart]:
    """The whole process of each conversion: its time and its memory."""
    figures = results["conversions"].values()
    return [
        Chart("whole process, s", [(figure["name"].replace("`", ""), figure["seconds"]) for figure in figures]),
        Chart("peak memory, MiB", [(figure["name"].replace("`", ""), figure["peak_mib"]) for figure in figures]),
    ]


PICTURES: dict[str, Callable[[dict[str, Any]], list[Chart]]] = {
    "step": step_charts,
    "checkpoint": checkpoint_charts,
    "export": export_charts,
}


def draw(charts: Sequence[Chart], output: Path) -> None:
    """Two charts beside each other, and as many rows as that takes; SVG by the output's name."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "lightning_zero", "font.size": 8}
    from matplotlib import pyplot

    charts = [chart for chart in charts if chart.bars]
    rows = -(-len(charts) // 2)
    longest = max(len(chart.bars) for chart in charts)
    figure, axes = pyplot.subplots(rows, 2, figsize=(10, rows * (0.7 + 0.24 * longest)), squeeze=False)
    for axis, chart in zip(axes.flat, charts, strict=False):
        labels, heights = zip(*chart.bars, strict=True)
        colours = [OURS if label.startswith("lightning_zero") else THEIRS for label in labels]
        places = range(len(labels), 0, -1)
        axis.barh(places, heights, color=colours, height=0.7)
        axis.set_yticks(places, labels)
        for place, height in zip(places, heights, strict=True):
            text = f"{height:.0f}" if max(heights) > 20 else f"{height:.2f}"
            axis.annotate(text, (height, place), xytext=(3, 0), textcoords="offset points", va="center", color=INK)
        for where, style in ((chart.one, "--"), (chart.bar, ":")):
            if where is not None:
                axis.axvline(where, color=FAINT, linewidth=0.8, linestyle=style)
        axis.set_title(chart.title, fontsize=9, color=INK, loc="left")
        axis.set_xlim(0, 1.12 * max(heights))
        axis.tick_params(colors=INK, length=0)
        axis.set_xticks([])
        for side in ("top", "right", "bottom"):
            axis.spines[side].set_visible(False)
        axis.spines["left"].set_color(FAINT)
    for axis in axes.flat[len(charts) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=PICTURES)
    parser.add_argument("results", type=Path, help="the JSON that the benchmark wrote")
    parser.add_argument("output", type=Path, help="an .svg, or whatever else matplotlib writes")
    arguments = parser.parse_args(argv)
    draw(PICTURES[arguments.benchmark](json.loads(arguments.results.read_text())), arguments.output)
    print(f"{arguments.results} → {arguments.output}")


if __name__ == "__main__":
    main()
