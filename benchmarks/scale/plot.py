"""The figures of `python -m benchmarks.scale --json FILE`, drawn.

python -m benchmarks.scale.plot FILE PICTURE
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"70B": "#2a78b5", "1T": "#c4521c"}
PARTS = {"commit": ("rank 0 commits", "o-"), "resume": ("every rank resumes", "o--"), "plan_partition": ("plans", "o:")}


def draw(results: dict[str, Any], picture: Path) -> None:
    mpl.rcParams.update({"svg.hashsalt": "scale", "font.size": 9})  # the same picture from the same figures
    figure, (segments, seconds, memory) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for model, cells in results["cells"].items():
        ranks, colour = [int(count) for count in cells], COLOURS[model]

        look: dict[str, Any] = {"color": colour, "markersize": 3}

        made = [cell["manifest"] for cell in cells.values()]
        segments.plot(ranks, [cell["segments"] for cell in made], "o-", label=model, **look)
        in_cuts = [cell["segments_without_rounds"] for cell in made]
        segments.plot(ranks, in_cuts, ":", label=f"{model}, each bucket cut", **look)
        for part, (title, style) in PARTS.items():
            for axes, key in ((seconds, "cpu_seconds"), (memory, "memory_mb")):
                axes.plot(ranks, [cell[part][key] for cell in cells.values()], style, label=f"{model}: {title}", **look)
    for axes, title in ((segments, "segments"), (seconds, "seconds"), (memory, "memory above the imports, MB")):
        axes.set(title=title, xlabel="ranks", xscale="log", xticks=ranks, xticklabels=ranks)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    segments.set_yscale("log")
    seconds.set_ylim(bottom=0)
    memory.set_ylim(bottom=0)
    segments.legend(fontsize=7)
    seconds.legend(fontsize=7)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
