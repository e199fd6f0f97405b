"""A picture as a list of boxes and texts, and how it is written.

An SVG is written by hand. A PNG needs matplotlib, as a mere rasteriser: so both look alike.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightning_zero.errors import ZeroError

INK = "#1e293b"


class PlottingError(ZeroError):
    """A picture that can't be drawn or written, for want of content or of a package."""


@dataclass(frozen=True, slots=True)
class Box:
    """A filled rectangle, in pixels from the upper left corner."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    radius: float = 0.0


@dataclass(frozen=True, slots=True)
class Label:
    """A line of text; `y` is its base line."""

    x: float
    y: float
    text: str
    size: float = 12.0
    colour: str = INK
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False


@dataclass
class Picture:
    """What is drawn, later shapes over earlier ones."""

    width: float = 0.0
    height: float = 0.0
    shapes: list[Box | Label] = field(default_factory=list)


def write(picture: Picture, path: Path) -> None:
    """Write a picture as .svg or .png, by the path's ending.

    Raises:
        PlottingError: a .png without matplotlib.
    """
    if path.suffix.lower() == ".svg":
        path.write_text(svg(picture), encoding="utf-8")
    else:
        _write_png(picture, path)


def svg(picture: Picture) -> str:
    """The text of an SVG."""
    size = f'width="{picture.width:g}" height="{picture.height:g}" viewBox="0 0 {picture.width:g} {picture.height:g}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
        "font-family=\"Inter, Helvetica, Arial, 'DejaVu Sans', sans-serif\">"
    ]
    for shape in picture.shapes:
        if isinstance(shape, Box):
            radius = f' rx="{shape.radius:g}"' if shape.radius else ""
            lines.append(
                f'<rect x="{shape.x:.2f}" y="{shape.y:.2f}" width="{shape.width:.2f}" height="{shape.height:.2f}"'
                f'{radius} fill="{shape.colour}"/>'
            )
        else:
            weight = ' font-weight="bold"' if shape.bold else ""
            lines.append(
                f'<text x="{shape.x:.2f}" y="{shape.y:.2f}" font-size="{shape.size:g}" fill="{shape.colour}"'
                f' text-anchor="{shape.anchor}"{weight}>{html.escape(shape.text)}</text>'
            )
    return "\n".join([*lines, "</svg>", ""])


def _write_png(picture: Picture, path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch
    except ModuleNotFoundError as error:
        raise PlottingError(
            f"a .png needs {error.name}: pip install 'lightning-zero[plot]', or draw an .svg, which needs nothing"
        ) from None
    dots = 100
    figure = Figure(figsize=(picture.width / dots, picture.height / dots), dpi=2 * dots)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, picture.width)
    axes.set_ylim(picture.height, 0)
    axes.axis("off")
    for shape in picture.shapes:
        if isinstance(shape, Box):
            style = f"round,pad=0,rounding_size={shape.radius}" if shape.radius else "square,pad=0"
            corner = (shape.x, shape.y)
            axes.add_patch(
                FancyBboxPatch(corner, shape.width, shape.height, boxstyle=style, facecolor=shape.colour, linewidth=0)
            )
        else:
            axes.text(
                shape.x,
                shape.y,
                shape.text.replace("$", r"\$"),
                fontsize=shape.size * 72 / dots * 0.93,
                color=shape.colour,
                ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor],
                va="baseline",
                weight="bold" if shape.bold else "normal",
            )
    figure.savefig(path)
