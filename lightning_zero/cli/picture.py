"""Who owns what, as a picture: parameters down, ranks across, a cell as dark as it holds bytes.

Above the cells stands what each rank holds, beside them what each parameter takes, both by kind. Where there are more
parameters than can be read, neighbours of one layer share a row; where there are more ranks, neighbours share a column.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lightning_zero.cli.holdings import HOLDINGS, Holding, Holdings
from lightning_zero.cli.output import bytes_text, plain
from lightning_zero.errors import ZeroError

_MOST_ROWS = 36
_MOST_COLUMNS = 64
_COLUMNS_WITH_TEXT = 10
_LABEL_CHARACTERS = 44

_KINDS: Mapping[Holding, tuple[str, str]] = {
    "parameters": ("parameters", "tab:blue"),
    "states": ("optimizer states", "tab:orange"),
    "frozen": ("frozen", "tab:gray"),
    "others": ("buffers, others", "tab:green"),
    "own": ("a rank's own", "tab:purple"),
}


class PlottingError(ZeroError):
    """There is nothing to draw."""


# --------------------------------------------------------------------------------------------- what is shown


@dataclass(frozen=True)
class _Row:
    """One parameter, or neighbours in the same layer: the bytes of each (rank, kind)."""

    label: str
    held: Mapping[tuple[int, Holding], int]

    def of_kind(self, kind: Holding) -> int:
        return sum(nbytes for (_, of), nbytes in self.held.items() if of == kind)

    def on(self, ranks: range) -> int:
        return sum(self.held.get((rank, kind), 0) for rank in ranks for kind in HOLDINGS)


def _rows(holdings: Holdings) -> list[_Row]:
    named = [(name, held) for name, held in holdings.by_name.items() if sum(held.values())]
    return [
        _Row(label, _summed([held for _, held in named[start:stop]]))
        for label, start, stop in _groups([name for name, _ in named])
    ]


def _groups(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Runs of neighbouring names, few enough to be read: a label, the first, one past the last."""
    paths = [name.split(".") for name in names]
    deepest = max(map(len, paths), default=1)
    fitting: list[tuple[str, int, int]] = []
    for depth in range(1, deepest + 1):
        runs = _runs([tuple(path[:depth]) for path in paths])
        if len(runs) > _MOST_ROWS:
            return fitting if len(fitting) > _MOST_ROWS // 3 else _merged(runs)
        fitting = [(".".join(path), start, stop) for path, start, stop in runs]
    return fitting


_Path = tuple[str, ...]


def _runs(paths: Sequence[_Path]) -> list[tuple[_Path, int, int]]:
    runs: list[tuple[_Path, int, int]] = []
    for index, path in enumerate(paths):
        if runs and runs[-1][0] == path:
            runs[-1] = (path, runs[-1][1], index + 1)
        else:
            runs.append((path, index, index + 1))
    return runs


def _merged(runs: Sequence[tuple[_Path, int, int]]) -> list[tuple[str, int, int]]:
    """Put as many siblings together as it takes: their parents are few enough."""
    families = [list(family) for _, family in groupby(runs, key=lambda run: run[0][:-1])]
    several = next(size for size in count(2) if sum(-(-len(family) // size) for family in families) <= _MOST_ROWS)
    merged = (family[first : first + several] for family in families for first in range(0, len(family), several))
    return [(_span([path for path, _, _ in group]), group[0][1], group[-1][2]) for group in merged]


def _span(paths: Sequence[_Path]) -> str:
    first, last = paths[0], paths[-1]
    if first == last:
        return ".".join(first)
    return f"{'.'.join(first)} to {last[-1] if first[:-1] == last[:-1] else '.'.join(last)}"


def _summed(many: Sequence[Mapping[tuple[int, Holding], int]]) -> dict[tuple[int, Holding], int]:
    total: dict[tuple[int, Holding], int] = {}
    for held in many:
        for place, nbytes in held.items():
            total[place] = total.get(place, 0) + nbytes
    return total


# ------------------------------------------------------------------------------------------- how it is drawn


def draw(holdings: Holdings, title: str) -> Figure:
    """Draw it.

    Args:
        holdings: what there is to show.
        title: its first line.

    Raises:
        PlottingError: there is nothing in it.
    """
    if not any(holdings.by_name.values()):
        raise PlottingError("the checkpoint holds no tensors to draw")
    rows, world_size = _rows(holdings), holdings.world_size
    several = -(-world_size // _MOST_COLUMNS)
    columns = [range(first, min(first + several, world_size)) for first in range(0, world_size, several)]
    height = 1.8 + 0.24 * max(len(rows), 6)
    figure = Figure((12, height), layout="constrained")
    figure.suptitle(f"{plain(title)}: who owns what, in bytes", parse_math=False)
    (above, corner), (cells, beside) = figure.subplots(
        2, 2, sharex="col", sharey="row", width_ratios=(3, 1), height_ratios=(1, height - 1)
    )
    corner.axis("off")
    _draw_cells(cells, rows, columns)
    by_rank = holdings.by_rank()
    _stack(above, {kind: [_mean([by_rank[rank][kind] for rank in ranks]) for ranks in columns] for kind in HOLDINGS})
    above.set_ylabel("a rank holds")
    _stack(beside, {kind: [row.of_kind(kind) for row in rows] for kind in HOLDINGS}, across=True)
    for place, row in enumerate(rows):
        nbytes = sum(row.held.values())
        beside.text(nbytes, place, f" {bytes_text(nbytes)}", va="center", size="small")
    beside.margins(x=0.3)  # room for these
    for axes in (above, beside):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower left", ncols=len(_KINDS), frameon=False)
    return figure


def write(figure: Figure, path: Path) -> None:
    """Write a picture as .svg or .png, by the path's ending; the words in an SVG are words."""
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # from matplotlib's own font, and a browser has others
        figure.savefig(path, dpi=150, bbox_inches="tight")


def _draw_cells(axes: Axes, rows: Sequence[_Row], columns: Sequence[range]) -> None:
    held = np.array([[row.on(ranks) for ranks in columns] for row in rows])
    fewest, most = held[held > 0].min(), held.max()
    image = axes.imshow(np.ma.masked_equal(held, 0), cmap="Blues", norm=LogNorm(fewest / 2, most), aspect="auto")
    legend = axes.figure.colorbar(image, ax=axes, location="bottom", shrink=0.4, label="a cell holds")
    legend.set_ticks([fewest, most], labels=[bytes_text(int(fewest)), bytes_text(int(most))])
    legend.minorticks_off()
    axes.set_yticks(range(len(rows)), [_shortened(row.label) for row in rows], parse_math=False)
    texts = [str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}" for ranks in columns]
    every = -(-len(texts) // 16)
    axes.set_xticks(range(0, len(texts), every), texts[::every])
    axes.set_xlabel("rank")
    if len(columns) <= _COLUMNS_WITH_TEXT:
        dark = math.sqrt(fewest / 2 * most)
        for (place, column), nbytes in np.ndenumerate(held):
            if nbytes:
                ink = "white" if nbytes > dark else "black"
                axes.text(column, place, bytes_text(int(nbytes)), ha="center", va="center", size="small", color=ink)


def _stack(axes: Axes, bars: Mapping[Holding, Sequence[float]], *, across: bool = False) -> None:
    """Bars, each made of what there is of each kind."""
    ends = np.zeros(len(bars["parameters"]))
    for kind, nbytes in bars.items():
        if any(nbytes):
            label, colour = _KINDS[kind]
            if across:
                axes.barh(range(len(ends)), nbytes, left=ends, label=label, color=colour)
            else:
                axes.bar(range(len(ends)), nbytes, bottom=ends, label=label, color=colour)
            ends += nbytes
    (axes.xaxis if across else axes.yaxis).set_major_formatter(_bytes_of)


def _mean(numbers: Sequence[int]) -> float:
    return sum(numbers) / len(numbers)


def _bytes_of(value: float, _: object) -> str:
    return bytes_text(int(value))


def _shortened(label: str) -> str:
    label, half = plain(label), _LABEL_CHARACTERS // 2
    return label if len(label) <= _LABEL_CHARACTERS else f"{label[: half - 1]}…{label[-half:]}"
