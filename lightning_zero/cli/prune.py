"""`lightning-zero prune`: old checkpoints go."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.manifest import MANIFEST_NAME
from lightning_zero.checkpoint.retention import Retention
from lightning_zero.checkpoint.storage import Location, absolute, is_remote, names_in
from lightning_zero.cli.arguments import add_command, location, positive
from lightning_zero.cli.output import bytes_text, print_json, print_table
from lightning_zero.errors import CheckpointNotFoundError

if TYPE_CHECKING:
    from lightning_zero.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    """Add the command."""
    text = "Remove all but the newest checkpoints, and never the one that `latest` names, nor a torn one."
    example = "  lightning-zero prune ckpts --keep-last 3 --keep-every-n-steps 10000 --dry-run"
    command = add_command(commands, "prune", _prune, text, example)
    command.add_argument("dir", type=location, metavar="DIR", help="a save directory, a path or a URL")
    command.add_argument("--keep-last", type=positive, required=True, metavar="N", help="how many stay")
    command.add_argument(
        "--keep-every-n-steps", type=positive, metavar="N", help="those whose step is a multiple of it stay as well"
    )
    command.add_argument("--dry-run", action="store_true", help="only say what would go")


def _prune(options: argparse.Namespace) -> int:
    save_dir: Location = absolute(options.dir)
    if (save_dir / MANIFEST_NAME).is_file():
        raise CheckpointNotFoundError(f"{save_dir} is one checkpoint; give the save directory that it lies in")
    if not save_dir.is_dir():
        raise CheckpointNotFoundError(f"there is no directory {save_dir}")
    old = Retention(options.keep_last, options.keep_every_n_steps).superseded(save_dir)
    going = {tag.name for tag in old}
    kept = [tag.name for tag in commit.list_tags(save_dir) if tag.name not in going]
    freed = _bytes_freed(old)
    if not options.dry_run:
        for tag in old:
            commit.remove_tag(save_dir, tag.name)
    sizes = [(tag.name, tag.manifest.nbytes if tag.manifest else 0) for tag in old]
    if options.json:
        removed = [{"tag": name, "bytes": nbytes} for name, nbytes in sizes]
        print_json({"removed": removed, "kept": kept, "freed_bytes": freed, "dry_run": options.dry_run})
        return 0
    does = "would remove" if options.dry_run else "removed"
    if sizes:
        print_table([[f"{does} {name}", bytes_text(nbytes)] for name, nbytes in sizes], "<>")
    print(f"{does} {len(sizes)}, keeps {len(kept)}; {bytes_text(freed)} {'would be ' * options.dry_run}freed")
    return 0


def _bytes_freed(tags: Iterable[commit.TagInfo]) -> int:
    """What their files alone take on the disk: a file that another tag has too goes with its last hard link."""
    links: Counter[tuple[int, int]] = Counter()
    files: dict[tuple[int, int], os.stat_result] = {}
    freed = 0
    for tag in tags:
        if is_remote(tag.path):
            freed += tag.manifest.nbytes if tag.manifest else 0
            continue
        for name in names_in(tag.path):
            with suppress(FileNotFoundError):  # whoever trains, or prunes too, is removing it
                status = (tag.path / name).lstat()
                files[status.st_dev, status.st_ino] = status
                links[status.st_dev, status.st_ino] += 1
    return freed + sum(status.st_size for file, status in files.items() if links[file] >= status.st_nlink)
