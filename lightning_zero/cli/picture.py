"""Who owns what, as a picture: parameters down, ranks across, a cell as dark as it holds bytes.

Above the cells stands what each rank holds, beside them what each parameter takes, both by kind. Where there are more
parameters than can be read, neighbours of one layer share a row; where there are more ranks, neighbours share a column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby

from lightning_zero.cli.drawing import INK, Box, Label, Picture, PlottingError
from lightning_zero.cli.holdings import HOLDINGS, Holding, Holdings
from lightning_zero.cli.output import bytes_text, plain

_MOST_ROWS = 36
_MOST_COLUMNS = 64
_LABEL_CHARACTERS = 44

_INK, _FAINT, _PAPER, _EMPTY = INK, "#64748b", "#ffffff", "#f1f5f9"
_RAMP = ("#dbeafe", "#93c5fd", "#60a5fa", "#2563eb", "#1e3a8a")
_KINDS: Mapping[Holding, tuple[str, str]] = {
    "parameters": ("parameters", "#2563eb"),
    "states": ("optimizer states", "#f59e0b"),
    "frozen": ("frozen", "#94a3b8"),
    "others": ("buffers, others", "#10b981"),
    "own": ("a rank's own", "#a78bfa"),
}


# --------------------------------------------------------------------------------------------- what is shown


@dataclass(frozen=True)
class _Row:
    """One parameter, or neighbours in the same layer: the bytes of each (rank, kind)."""

    label: str
    held: Mapping[tuple[int, Holding], int]


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


# ----------------------------------------------------------------------------------------- how it is laid out

_MARGIN = 28.0
_TOP, _RANKS_HEIGHT, _BARS_WIDTH = 92.0, 106.0, 190.0
_NUMBER_WIDTH = 100.0
_LEGEND_HEIGHT = 24.0


@dataclass(frozen=True)
class _Grid:
    """Where the cells are, and what is in them."""

    rows: Sequence[_Row]
    columns: Sequence[range]
    cells: Sequence[Sequence[int]]
    left: float
    top: float
    column_width: float
    row_height: float

    @classmethod
    def of(cls, holdings: Holdings, left: float) -> _Grid:
        rows, world_size = _rows(holdings), holdings.world_size
        several = -(-world_size // _MOST_COLUMNS)
        columns = [range(first, min(first + several, world_size)) for first in range(0, world_size, several)]
        cells = [
            [sum(row.held.get((rank, kind), 0) for rank in column for kind in HOLDINGS) for column in columns]
            for row in rows
        ]
        width = max([len(_shortened(row.label)) for row in rows], default=0) * 7.3 + _MARGIN + 12
        column_width = min(120.0, max(11.0, 720.0 / len(columns)))
        row_height = min(44.0, max(17.0, 560.0 / max(1, len(rows))))
        return cls(rows, columns, cells, max(left, width), _TOP + _RANKS_HEIGHT + 34, column_width, row_height)

    @property
    def right(self) -> float:
        return self.left + self.column_width * len(self.columns)

    @property
    def bottom(self) -> float:
        return self.top + self.row_height * len(self.rows)

    @property
    def scale(self) -> tuple[int, int]:
        """The fewest and the most bytes of a cell that has any."""
        held = [nbytes for row in self.cells for nbytes in row if nbytes]
        return min(held, default=1), max(held, default=1)


def draw(holdings: Holdings, title: str) -> Picture:
    """Lay the picture out.

    Args:
        holdings: what there is to show.
        title: its first line.

    Raises:
        PlottingError: there is nothing in it.
    """
    if not any(holdings.by_name.values()):
        raise PlottingError("the checkpoint holds no tensors to draw")
    by_rank = holdings.by_rank()
    sizes = [sum(held.values()) for held in by_rank]
    first, last = bytes_text(min(sizes)), bytes_text(max(sizes))
    each = first if first == last else f"{first} to {last}"
    title = plain(title)
    grid = _Grid.of(holdings, left=len(each) * 8.4 + _MARGIN + 12)
    kinds = [kind for kind in HOLDINGS if any(held[kind] for held in by_rank)]
    width = max(grid.right + 20 + _BARS_WIDTH + _NUMBER_WIDTH, 2 * _MARGIN + 12.5 * len(title))
    picture = Picture(width, grid.bottom + 52)
    add = picture.shapes.append
    ranks = "1 rank" if holdings.world_size == 1 else f"{holdings.world_size} ranks"
    add(Label(_MARGIN, 40, title, 20, bold=True))
    add(Label(_MARGIN, 62, f"who owns what: bytes by parameter and rank, on {ranks}", 13, _FAINT))
    add(Label(grid.left - 12, _TOP + 14, "a rank holds", 12, _FAINT, "end"))
    add(Label(grid.left - 12, _TOP + 32, each, 12, _INK, "end", bold=True))
    _draw_ranks(picture, grid, by_rank)
    _draw_cells(picture, grid)
    _draw_parameters(picture, grid)
    _draw_legend(picture, grid, kinds)
    picture.shapes.insert(0, Box(0, 0, picture.width, picture.height, _PAPER))
    return picture


def _draw_ranks(picture: Picture, grid: _Grid, by_rank: Sequence[Mapping[Holding, int]]) -> None:
    """What each rank holds, above the cells; the average, where several share a column."""
    means = [
        {kind: sum(by_rank[rank][kind] for rank in column) / len(column) for kind in HOLDINGS}
        for column in grid.columns
    ]
    tallest = max(sum(held.values()) for held in means) or 1
    gap, width = _gap(grid.column_width), grid.column_width
    for index, held in enumerate(means):
        y = _TOP + _RANKS_HEIGHT
        for kind, nbytes in held.items():
            height = _RANKS_HEIGHT * nbytes / tallest
            y -= height
            if nbytes:
                picture.shapes.append(Box(grid.left + index * width + gap, y, width - 2 * gap, height, _KINDS[kind][1]))
    texts = [str(column[0]) if len(column) == 1 else f"{column[0]}-{column[-1]}" for column in grid.columns]
    spacious = width >= 60
    every = 2 ** math.ceil(math.log2(max(1.0, (max(map(len, texts)) * 7 + 6) / width)))
    y = _TOP + _RANKS_HEIGHT + 18
    for index in range(0, len(texts), every):
        text = f"rank {texts[index]}" if spacious else texts[index]
        picture.shapes.append(Label(grid.left + (index + 0.5) * width, y, text, 11, _FAINT, "middle"))
    if not spacious:
        picture.shapes.append(Label(grid.left - 12, y, "rank", 11, _FAINT, "end"))


def _draw_cells(picture: Picture, grid: _Grid) -> None:
    """The names, and a cell for each row and column."""
    width, height = grid.column_width, grid.row_height
    gap, radius = min(_gap(width), _gap(height)), 3.0 if min(width, height) >= 16 else 1.0
    fewest, most = grid.scale
    for index, (row, cells) in enumerate(zip(grid.rows, grid.cells, strict=True)):
        y = grid.top + index * height
        picture.shapes.append(Label(grid.left - 12, y + height / 2 + 4, _shortened(row.label), 12, _INK, "end"))
        for number, nbytes in enumerate(cells):
            x = grid.left + number * width
            depth = _depth(nbytes, fewest, most)
            colour = _shade(depth) if nbytes else _EMPTY
            picture.shapes.append(Box(x + gap, y + gap, width - 2 * gap, height - 2 * gap, colour, radius))
            if nbytes and width >= 64:
                ink = _PAPER if depth > 0.55 else _INK
                text = bytes_text(nbytes)
                picture.shapes.append(Label(x + width / 2, y + height / 2 + 4, text, 11, ink, "middle"))


def _draw_parameters(picture: Picture, grid: _Grid) -> None:
    """What each row takes, beside the cells."""
    widest = max([sum(row.held.values()) for row in grid.rows], default=0) or 1
    gap = _gap(grid.row_height)
    for index, row in enumerate(grid.rows):
        x, y = grid.right + 20, grid.top + index * grid.row_height
        for kind in HOLDINGS:
            width = _BARS_WIDTH * sum(nbytes for (_, of), nbytes in row.held.items() if of == kind) / widest
            if width:
                height = grid.row_height - 2 * gap
                picture.shapes.append(Box(x, y + gap, max(width, 0.75), height, _KINDS[kind][1]))
                x += width
        text = bytes_text(sum(row.held.values()))
        picture.shapes.append(Label(x + 7, y + grid.row_height / 2 + 4, text, 11, _FAINT))


def _draw_legend(picture: Picture, grid: _Grid, kinds: Sequence[Holding]) -> None:
    """What the colours mean, in one line or in two."""
    add, x, y = picture.shapes.append, _MARGIN, grid.bottom + 36
    for kind in kinds:
        text, colour = _KINDS[kind]
        add(Box(x, y - 10, 12, 12, colour, 2))
        add(Label(x + 18, y, text))
        x += 18 + 7 * len(text) + 20
    steps, step_width = 24, 6.0
    fewest, most = map(bytes_text, grid.scale)
    fewest = f"a cell: {fewest}"
    ramp = picture.width - _MARGIN - 7.5 * len(most) - 8 - steps * step_width
    if ramp - 8 - 7.5 * len(fewest) < x:
        y += _LEGEND_HEIGHT
        ramp = _MARGIN + 7.5 * len(fewest) + 8
        picture.height += _LEGEND_HEIGHT
    add(Label(ramp - 8, y, fewest, 12, _FAINT, "end"))
    for step in range(steps):
        add(Box(ramp + step * step_width, y - 10, step_width + 0.3, 12, _shade(step / (steps - 1))))
    add(Label(ramp + steps * step_width + 8, y, most, 12, _FAINT))


def _shortened(label: str) -> str:
    label, half = plain(label), _LABEL_CHARACTERS // 2
    return label if len(label) <= _LABEL_CHARACTERS else f"{label[: half - 1]}…{label[-half:]}"


def _gap(size: float) -> float:
    """Half of what lies between neighbours of some size."""
    return 2.0 if size >= 24 else 1.0 if size >= 14 else 0.5


def _depth(nbytes: int, fewest: int, most: int) -> float:
    """Where a number of bytes lies between the fewest and the most, from 0 to 1, by its logarithm."""
    if nbytes <= 0 or fewest >= most:
        return 0.75
    return (math.log(nbytes) - math.log(fewest)) / (math.log(most) - math.log(fewest))


def _shade(depth: float) -> str:
    position = min(max(depth, 0.0), 1.0) * (len(_RAMP) - 1)
    index = min(int(position), len(_RAMP) - 2)
    low, high = (bytes.fromhex(colour[1:]) for colour in _RAMP[index : index + 2])
    mixed = (round(a + (b - a) * (position - index)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
