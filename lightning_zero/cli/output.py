"""What a person reads: aligned columns, bytes and ages in short; and what a program reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def print_json(value: Any) -> None:
    """One JSON document; what JSON doesn't know stands there as text."""
    print(json.dumps(_jsonable(value), indent=2, allow_nan=False))


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, bool | int | str | None) else str(value)


def print_table(rows: Sequence[Sequence[str]], alignment: str) -> None:
    """Columns, two spaces apart.

    Args:
        rows: each with as many cells.
        alignment: for each column `<` or `>`.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, alignment, widths, strict=True))
        print("  ".join(cells).rstrip())


def bytes_text(nbytes: int) -> str:
    """Such as `1.5 GB`, by powers of 1000."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if nbytes >= 1000**power:
            return f"{nbytes / 1000**power:.1f} {unit}"
    return f"{nbytes} B"


def age_text(seconds: int) -> str:
    """Such as `3 h`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def plain(text: str) -> str:
    """A name from a checkpoint as it can be printed anywhere: no control character reaches the terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]
