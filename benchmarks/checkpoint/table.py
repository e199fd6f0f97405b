"""What is told of the turns: a contestant's figures, and those of one contestant beside another's.

A row may have a limit: what the machine allows, measured in the same turn of the same processes; its ratio is taken
turn by turn. A comparison is taken repeat by repeat. Where either has a bar, the ratio (a row's that has none: the
figure) should not exceed it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Turn = Mapping[str, Any]
Repeat = Mapping[str, Mapping[str, Any]]
"""By contestant and part (`zero save`), its `turns` among others."""


@dataclass(frozen=True)
class Row:
    """A figure of one contestant.

    Attributes:
        name: what is measured.
        source: contestant and part.
        value: the figure of one turn.
        limit: what the same turn's figure is compared with, if anything.
        bar: what the ratio to it should not exceed.
        unit: of the figure; in MiB, a later turn says nothing: it finds memory that the one before has left.
    """

    name: str
    source: str
    value: Callable[[Turn], float]
    limit: Callable[[Turn], float] | None = None
    bar: float | None = None
    unit: str = "s"


@dataclass(frozen=True)
class Comparison:
    """One row's figure where another's is 1; both by name."""

    name: str
    row: str
    beside: str
    bar: float | None = None


@dataclass(frozen=True)
class Told:
    """A line of the table."""

    name: str
    source: str
    unit: str
    first: float | None
    later: float | None
    ratio_first: float | None
    ratio_later: float | None
    bar: float | None


def _of(key: str) -> Callable[[Turn], float]:
    return lambda turn: float(turn[key])


def _steps_beside(turn: Turn) -> float:
    steps: list[float] = turn["steps_beside"]
    return statistics.median(steps) / float(turn["step_quiet"])


WRITE = "plain write + fsync of the rank's bytes"
SAVE = "**lightning_zero, save**"
STALL = "**lightning_zero, async_save: the stall**"
LOAD = "**lightning_zero, resume**"


def _save_rows() -> list[Row]:
    rows = [Row(WRITE, "zero save", _of("write"))]
    rows.append(Row(SAVE, "zero save", _of("save"), _of("write"), 1.3))
    peers = (
        ("ddp", "DDP, torch.save on rank 0, no fsync"),
        ("fsdp2", "FSDP2 + DCP, save"),
        ("deepspeed", "DeepSpeed ZeRO-2, save_checkpoint, no fsync"),
    )
    for contestant, name in peers:
        rows.append(Row(name, f"{contestant} save", _of("save"), _of("write")))
    return rows


def _behind_rows(contestant: str, stall: str, *, bars: bool) -> list[Row]:
    source, who = f"{contestant} behind", stall.strip("*").split(":")[0]
    return [
        Row(stall, source, _of("stall"), _of("copy"), 1.2 if bars else None),
        Row(f"{who}: until it is durable", source, _of("durable"), _of("write"), 2.0 if bars else None),
        Row(f"{who}: steps meanwhile, others = 1", source, _steps_beside, bar=1.1 if bars else None, unit=""),
        Row(f"{who}: training lost beside the stall", source, _of("lost")),
        Row(f"{who}: memory meanwhile", source, _of("above_mib"), unit="MiB"),
    ]


def _load_rows() -> list[Row]:
    peers = (
        ("ddp", "DDP, resume by torch.load"),
        ("fsdp2", "FSDP2 + DCP, load"),
        ("deepspeed", "DeepSpeed ZeRO-2, load_checkpoint"),
    )
    return [
        Row("plain read of the rank's bytes, page cache to warm memory", "zero load", _of("read")),
        Row("plain read, the optimizer's states into new memory", "zero load", _of("read_fresh"), _of("read")),
        Row(LOAD, "zero load", _of("load"), _of("read"), 1.5),
        Row("lightning_zero, load_zero_checkpoint in a running training", "zero load", _of("again"), _of("read"), 1.5),
        Row('lightning_zero, resume with verify="full"', "zero load", _of("full"), _of("read")),
        *(Row(name, f"{contestant} load", _of("load"), _of("read")) for contestant, name in peers),
        Row("**lightning_zero: memory beyond the state**", "zero load", _of("above_mib"), bar=64, unit="MiB"),
        *(
            Row(f"{name}: memory beyond the state", f"{contestant} load", _of("above_mib"), unit="MiB")
            for contestant, name in peers
        ),
    ]


DCP_STALL = "FSDP2 + DCP, async_save: the stall"
ROWS = (
    *_save_rows(),
    Row("copy of the rank's bytes, warm to warm", "zero behind", _of("copy")),
    *_behind_rows("zero", STALL, bars=True),
    *_behind_rows("fsdp2", DCP_STALL, bars=False),
    *_load_rows(),
)
COMPARISONS = (
    Comparison("lightning_zero's save beside DCP's", SAVE, "FSDP2 + DCP, save"),
    Comparison("… beside DeepSpeed's", SAVE, "DeepSpeed ZeRO-2, save_checkpoint, no fsync"),
    Comparison("lightning_zero's stall beside DCP's", STALL, DCP_STALL, 0.15),
    Comparison("… beside a save by DDP", STALL, "DDP, torch.save on rank 0, no fsync", 0.1),
    Comparison("lightning_zero's resume beside DCP's load", LOAD, "FSDP2 + DCP, load", 0.25),
    Comparison("… beside DeepSpeed's load", LOAD, "DeepSpeed ZeRO-2, load_checkpoint"),
)


def _turns(repeat: Repeat, source: str) -> list[dict[str, Any]]:
    """Of a contestant's part, each with the median quiet step of its process."""
    figures = repeat.get(source, {"turns": []})
    quiet = {"step_quiet": statistics.median(figures["steps_quiet"])} if figures.get("steps_quiet") else {}
    return [{**turn, **quiet} for turn in figures["turns"]]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def tell(repeats: Sequence[Repeat]) -> list[Told]:
    """The lines for which there are figures."""
    told = []
    for row in ROWS:
        found = [_turns(repeat, row.source) for repeat in repeats]
        first, later = [turns[0] for turns in found if turns], [turn for turns in found for turn in turns[1:]]
        if not first:
            continue
        ratios: list[float | None] = [None, None]
        if row.limit is not None:
            ratios = [_median([row.value(turn) / row.limit(turn) for turn in turns]) for turns in (first, later)]
        medians = [_median([row.value(turn) for turn in turns]) for turns in (first, later)]
        if row.unit == "MiB":
            medians[1] = None
        told.append(Told(row.name, row.source, row.unit, medians[0], medians[1], ratios[0], ratios[1], row.bar))
    rows = {row.name: row for row in ROWS}
    for comparison in COMPARISONS:
        row, beside = rows[comparison.row], rows[comparison.beside]
        ratios = []
        for part in (slice(0, 1), slice(1, None)):
            pairs = [(_turns(repeat, row.source)[part], _turns(repeat, beside.source)[part]) for repeat in repeats]
            ratios.append(
                _median(
                    [
                        statistics.median(map(row.value, ours)) / statistics.median(map(beside.value, theirs))
                        for ours, theirs in pairs
                        if ours and theirs
                    ]
                )
            )
        if ratios != [None, None]:
            told.append(Told(comparison.name, row.source, "", None, None, ratios[0], ratios[1], comparison.bar))
    return told


def markdown(told: Sequence[Told]) -> str:
    """The table."""
    lines = ["| | first | later | ratio, first | ratio, later | bar |", "|---|---|---|---|---|---|"]
    for line in told:
        digits = 0 if line.unit == "MiB" else 3
        cells = ["" if each is None else f"{each:.{digits}f} {line.unit}".strip() for each in (line.first, line.later)]
        cells += ["" if each is None else f"{each:.2f}" for each in (line.ratio_first, line.ratio_later)]
        cells.append("" if line.bar is None else f"≤ {line.bar:g}")
        lines.append(f"| {line.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(told: Sequence[Told]) -> list[dict[str, Any]]:
    """For the file."""
    return [asdict(line) | {"name": line.name.strip("*")} for line in told]
