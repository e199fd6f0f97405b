"""Charts as SVG, with nothing but text: for a page that any browser shows without a server or a script.

Colours are CSS variables of the page, so that it can be light or dark. Every point says its values when it is hovered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 22, 42
_POINTS = 400
"""More than these on a line are no longer seen."""

Series = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Series], *, x_label: str, unit: str = "") -> str:
    """Lines over one axis, which begins at 0 unless the values keep far away from it.

    Args:
        series: for each label, the points, by x.
        x_label: what x is.
        unit: of y.
    """
    points = [point for line in series.values() for point in line if all(map(math.isfinite, point))]
    if not points:
        return "<p class='none'>nothing yet</p>"
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low = 0.0 if min(ys) >= 0 and min(ys) < 0.5 * max(ys) else min(ys)
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(low, max(ys))
    x_range, y_range = (min(xs), max(xs)), (min(low, y_ticks[0]), max(max(ys), y_ticks[-1]))

    def place(x: float, y: float) -> tuple[float, float]:
        return _scale(x, x_range, _LEFT, _WIDTH - _RIGHT), _scale(y, y_range, _HEIGHT - _BOTTOM, _TOP)

    parts = _frame(y_ticks, y_range, unit)
    for tick in x_ticks:
        x, _ = place(tick, 0)
        parts.append(f"<text class='tick' x='{x:.1f}' y='{_HEIGHT - 22}' text-anchor='middle'>{_number(tick)}</text>")
    parts.append(
        f"<text class='tick' x='{_WIDTH - _RIGHT}' y='{_HEIGHT - 6}' text-anchor='end'>{escape(x_label)}</text>"
    )
    for number, (label, line) in enumerate(series.items()):
        shown = _thinned([point for point in line if all(map(math.isfinite, point))])
        placed = [place(*point) for point in shown]
        if not placed:
            continue
        colour = f"var(--series-{number % 6})"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        radius = 3 if len(placed) <= 60 else 1.5
        for (x, y), (at, value) in zip(placed, shown, strict=True):
            hover = f"{escape(label)}: {_number(value)} {escape(unit)} at {escape(x_label)} {_number(at)}"
            parts.append(
                f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius}' fill='{colour}'><title>{hover}</title></circle>"
            )
    return _svg(parts) + _legend(list(series))


def stacked_bars(bars: Mapping[str, Mapping[str, float]], *, unit: str = "") -> str:
    """A bar for each label, made of parts.

    Args:
        bars: for each bar's label, the parts by name; all bars have the same names, in the same order.
        unit: of y.
    """
    if not bars:
        return "<p class='none'>nothing yet</p>"
    names = list(next(iter(bars.values())))
    y_ticks = _ticks(0, max(sum(parts.values()) for parts in bars.values()))
    y_range = (0.0, max(y_ticks[-1], max(sum(parts.values()) for parts in bars.values())))
    parts = _frame(y_ticks, y_range, unit)
    room = (_WIDTH - _LEFT - _RIGHT) / len(bars)
    every = max(1, math.ceil(len(bars) / 16))
    for place, (label, values) in enumerate(bars.items()):
        x, width, base = _LEFT + room * (place + 0.15), room * 0.7, 0.0
        for number, name in enumerate(names):
            top = _scale(base + values[name], y_range, _HEIGHT - _BOTTOM, _TOP)
            height = _scale(base, y_range, _HEIGHT - _BOTTOM, _TOP) - top
            hover = f"{escape(label)}, {escape(name)}: {_number(values[name])} {escape(unit)}"
            parts.append(
                f"<rect x='{x:.1f}' y='{top:.1f}' width='{width:.1f}' height='{height:.1f}' "
                f"fill='var(--series-{number % 6})'><title>{hover}</title></rect>"
            )
            base += values[name]
        if place % every == 0:
            parts.append(_text(x + width / 2, _HEIGHT - 22, label, "middle"))
    return _svg(parts) + _legend(names)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f"<text class='tick' x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{escape(text)}</text>"


def _svg(parts: Sequence[str]) -> str:
    return f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'>{''.join(parts)}</svg>"


def _frame(ticks: Sequence[float], y_range: tuple[float, float], unit: str) -> list[str]:
    parts = []
    for tick in ticks:
        y = _scale(tick, y_range, _HEIGHT - _BOTTOM, _TOP)
        parts.append(f"<line class='grid' x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(_text(_LEFT - 6, y + 4, _number(tick), "end"))
    parts.append(_text(4, _TOP - 9, unit, "start"))
    return parts


def _legend(labels: Sequence[str]) -> str:
    items = "".join(
        f"<span><i style='background:var(--series-{number % 6})'></i>{escape(label)}</span>"
        for number, label in enumerate(labels)
    )
    return f"<p class='legend'>{items}</p>"


def _scale(value: float, of: tuple[float, float], low: float, high: float) -> float:
    low_value, high_value = of
    share = 0.5 if high_value == low_value else (value - low_value) / (high_value - low_value)
    return low + share * (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 or not float(value).is_integer() else f"{value:.0f}"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = max(1, math.ceil(len(points) / _POINTS))
    return [*points[:-1:every], *points[-1:]]
