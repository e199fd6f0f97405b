"""The results of a soak as the tables of the README, made from what `--json` has written."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any


def table(found: Mapping[str, Any]) -> str:
    """Two tables in Markdown: the chain, and what was looked at."""
    return f"{_chain(found)}\n\n{_verdict(found)}"


def _chain(found: Mapping[str, Any]) -> str:
    lines = [
        "| ranks | runs | resumed | killed | in mid-save | saves | done again, most |",
        "|---|---|---|---|---|---|---|",
    ]
    for world_size in (1, 2, 3, None):
        lives = [life for life in found["lives"] if world_size in (None, life["world_size"])]
        killed = [life for life in lives if life["victims"] != "nobody"]
        phases = Counter(life["phase"] for life in killed)
        mid_save = len(killed) - phases["start-up"] - phases["between saves"]
        resumed = sum(bool(life["resumed_at"]) for life in lives)
        saves = sum(life["saves"] for life in lives)
        again = max((life["repeated"] for life in lives), default=0)
        cells = (world_size or "all", len(lives), resumed, len(killed), mid_save, saves, again)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _verdict(found: Mapping[str, Any]) -> str:
    judged = [trend for trend in found["trends"] if trend["judged"]]
    rows = [
        ("steps of the killed chain, those done again counted twice", f"{found['steps']:,}, in {_minutes(found)}"),
        ("steps whose windows were not those of an undisturbed run", f"{found['wrong_data']}"),
        (
            "largest difference of a loss that was computed again",
            f"{found['repeated']['largest']:.1e} ({found['repeated']['steps']} steps)",
        ),
    ]
    if judged:
        worst = max(judged, key=lambda trend: trend["growth"])
        longest = max(judged, key=lambda trend: trend["samples"])
        rows += [
            ("memory, the rank that grew most", _trend(worst)),
            ("memory, the rank that lived longest", _trend(longest)),
            (
                "memory that isn't a file's, bytes more after each save (median of all ranks)",
                f"{statistics.median(trend['bytes_per_save'] for trend in judged):,.0f}",
            ),
            (
                "open files and threads, most growth",
                ", ".join(f"{max(t[name][1] - t[name][0] for t in judged):+g}" for name in ("files", "threads")),
            ),
        ]
    else:
        rows.append(("memory", "no run was long enough to tell"))
    for age in found["same_age"]:
        first, last = age["resident"]
        runs = age["runs"]
        rows.append(
            (f"memory at the same age on {age['world_size']}, runs {runs[0]} and {runs[1]}", _from_to(first, last))
        )
    stretches = found["stretches"]
    if stretches:
        nearest = max(stretches, key=lambda s: s["chain"] / s["seeds"] if s["seeds"] else math.inf)
        rows += [
            (
                "training's loss from the undisturbed run's, at most",
                "; ".join(f"{difference:.1e} by step {int(mark):,}" for mark, difference in _marks(found)) or "-",
            ),
            (
                f"validation's loss from the undisturbed run's, at most, up to step {found['compared_up_to']:,}",
                f"{found['largest_validation_difference']:.1e}",
            ),
            (
                f"the same, RMS in the worst of {len(stretches)} stretches; seeds from each other there",
                f"{nearest['chain']:.1e}; {nearest['seeds']:.1e}",
            ),
        ]
    rows.append(("problems", str(len(found["problems"]))))
    return "\n".join(["| what | found |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])


def _marks(found: Mapping[str, Any]) -> list[tuple[str, float]]:
    return list(found["training_differences"].items())


def _minutes(found: Mapping[str, Any]) -> str:
    lives = found["lives"]
    return f"{(lives[-1]['began_at'] + lives[-1]['seconds'] - lives[0]['began_at']) / 60:.0f} minutes"


def _trend(trend: Mapping[str, Any]) -> str:
    who = f"{trend['chain']}, run {trend['run']}, rank {trend['rank']} of {trend['world_size']}"
    return f"{_from_to(*trend['resident'])} in {trend['steps']:,} steps ({who})"


def _from_to(first: float, last: float) -> str:
    return f"{first:.1f} → {last:.1f} MiB ({last / first - 1:+.2%})"
