"""Rounds: every contestant runs once in each, so that a busy moment of the machine falls on all alike.

The order rotates from round to round, so that nobody is always the one who finds the page cache warm, or full. Ratios
are taken within a round, and the figure is the median of these.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def rotated(items: Sequence[T], number: int) -> list[T]:
    """The same items, beginning with another one in every round."""
    first = number % len(items) if items else 0
    return [*items[first:], *items[:first]]


def values(rounds: Sequence[Mapping[str, Any]], name: str, key: str) -> Iterator[float]:
    """A contestant's figure, from every round that it took part in."""
    return (float(each[name][key]) for each in rounds if name in each)


def median(rounds: Sequence[Mapping[str, Any]], name: str, key: str) -> float:
    """A contestant's figure over all rounds."""
    return statistics.median(values(rounds, name, key))


def median_ratio(rounds: Sequence[Mapping[str, Any]], name: str, reference: str, key: str) -> float:
    """A contestant's figure, where the reference's of the same round is 1."""
    return statistics.median(float(each[name][key]) / float(each[reference][key]) for each in rounds if name in each)
