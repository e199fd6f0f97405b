"""A save directory behind a URL: object stores and the like, where nothing can be renamed, linked or locked.

[Note: the commit where nothing can be renamed]
What such a store does promise is that one object is written as a whole or not at all. So a save writes its files at
once under the tag, each with the save's id in its name; and writing `manifest.json`, which names them, is the commit.

| after | under the tag | the next load sees |
|---|---|---|
| writing some of the files | they, and what was there before | the checkpoint before, of this tag too |
| writing `manifest.json` | the new checkpoint; files of a replaced one | the new one, if `latest` names the tag |
| writing `latest` | the same | the new one |
| removing the files that nothing names | the new checkpoint | the new one |

A tag goes in the opposite order: `latest` names another one first, then `manifest.json` goes, then the rest. What a
dead save leaves behind is named by no manifest; it goes when its tag is saved again, or a day after it was written.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from datetime import datetime
from typing import TYPE_CHECKING, Any

from lightning_zero.checkpoint.manifest import MANIFEST_NAME
from lightning_zero.checkpoint.shards import is_ours
from lightning_zero.checkpoint.storage import create_file, names_in, read_file, remove_file
from lightning_zero.errors import IncompleteCheckpointError

if TYPE_CHECKING:
    from upath import UPath


def write_whole(url: UPath, content: bytes) -> None:
    """Write one small object, in one step."""
    with create_file(url, len(content)) as file:
        file.write(content)


def remove_all(directory: UPath, names: Collection[str]) -> None:
    """Remove objects under a URL, the manifest before all others: without it the rest is nothing."""
    for name in sorted(names, key=lambda name: name != MANIFEST_NAME):
        remove_file(directory / name)


def remove_uncommitted(directory: UPath, save_id: str) -> None:
    """Remove what a failed save has written under a tag; nothing, if what failed came after its commit."""
    try:
        committed = save_id.encode() in read_file(directory / MANIFEST_NAME)
    except IncompleteCheckpointError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise  # the store doesn't tell, for now perhaps; if it is none, it goes when it is stale
        committed = False
    if not committed:
        remove_all(directory, [name for name in names_in(directory) if save_id in name])


def remove_what_nothing_names(directory: UPath, named: Collection[str]) -> None:
    """Remove what a replaced checkpoint, or a dead save, has left under a tag; nobody else's objects."""
    there = [name for name in names_in(directory) if name not in named]
    remove_all(directory, [name for name in there if name == MANIFEST_NAME or is_ours(name)])


def remove_stale(save_dir: UPath, idle_seconds: float) -> None:
    """Remove what dead saves have left under tags that never came to be.

    Args:
        save_dir: the save directory.
        idle_seconds: how long nothing has to have been written under a tag for its save to be dead.
    """
    try:
        found: dict[str, dict[str, Any]] = save_dir.fs.find(save_dir.path, maxdepth=2, detail=True)
    except FileNotFoundError:
        return
    by_tag: dict[str, dict[str, float]] = {}
    for path, about in found.items():
        parent, _, name = path.rstrip("/").rpartition("/")
        by_tag.setdefault(parent.rpartition("/")[2], {})[name] = _written(about)
    by_tag.pop(save_dir.name, None)  # what lies beside the tags
    for tag, written in by_tag.items():
        # Whatever else lies there is somebody's data
        ours = all(is_ours(name, with_save_id=True) for name in written)
        if ours and time.time() - max(written.values()) > idle_seconds:
            remove_all(save_dir / tag, written)


def _written(about: dict[str, Any]) -> float:
    """When an object was written, in seconds since the epoch; now, where the store doesn't say."""
    for key in ("LastModified", "updated", "last_modified", "mtime", "created"):
        value = about.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return time.time()
