"""`lightning-zero ls`: the checkpoints in a save directory."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.origins import advice
from lightning_zero.checkpoint.resolution import is_tag
from lightning_zero.checkpoint.storage import absolute
from lightning_zero.cli.arguments import add_command, add_directory, directory_of
from lightning_zero.cli.output import age_text, bytes_text, print_json, print_table
from lightning_zero.errors import CheckpointNotFoundError, ZeroError

if TYPE_CHECKING:
    from lightning_zero.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    """Add the command."""
    text = "List the checkpoints: step, epoch, world size, stage, bytes, age, and which is the latest."
    add_directory(add_command(commands, "ls", _ls, text, "  lightning-zero ls ckpts"))


def _ls(options: argparse.Namespace) -> int:
    save_dir = directory_of(absolute(options.dir))
    only = None
    if is_tag(save_dir):
        save_dir, only = save_dir.parent, save_dir.name
    if not save_dir.is_dir():
        raise CheckpointNotFoundError(f"there is no directory {save_dir}")
    try:
        latest = commit.read_latest(save_dir)
    except ZeroError as error:
        latest = None
        print(f"lightning-zero: {error}", file=sys.stderr)
    rows = [_row(tag, latest) for tag in commit.list_tags(save_dir) if only in (None, tag.name)]
    if rows and only is None and latest not in (None, *(row["tag"] for row in rows)):
        print(f"lightning-zero: {save_dir / commit.LATEST} names {latest!r}, which is not there", file=sys.stderr)
    if options.json:
        print_json(rows)
    elif not rows:
        print(f"no checkpoints in {save_dir}{advice(save_dir)}")
    else:
        header = ["tag", "step", "epoch", "world size", "stage", "bytes", "age", ""]
        print_table([header, *map(_cells, rows)], "<>>>>>><")
    return 0


def _row(tag: commit.TagInfo, latest: str | None) -> dict[str, Any]:
    manifest = tag.manifest
    return {
        "tag": tag.name,
        "step": manifest.step if manifest else None,
        "epoch": manifest.epoch if manifest else None,
        "world_size": manifest.world_size if manifest else None,
        "stage": manifest.stage if manifest else None,
        "bytes": manifest.nbytes if manifest else None,
        "created": manifest.created if manifest else None,
        "age_seconds": round(max(0.0, time.time() - tag.modified)),
        "latest": tag.name == latest,
        "complete": tag.complete,
        "problem": tag.problem,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    cells = ["-" if row[key] is None else str(row[key]) for key in ("tag", "step", "epoch", "world_size", "stage")]
    size = "-" if row["bytes"] is None else bytes_text(row["bytes"])
    remarks = ["latest"] * row["latest"] + ["INCOMPLETE"] * (not row["complete"])
    return [*cells, size, age_text(row["age_seconds"]), ", ".join(remarks)]
