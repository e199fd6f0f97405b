"""Whether what lies in a tag's directory is what was written there.

Three depths: `none` believes the manifest; `sizes` looks whether every file is there with its exact size and its own
header, which finds whatever was cut short, lost or swapped; `full` reads every byte against its checksum. Nothing here
changes anything on disk, and no torch: `lightning-zero verify` starts at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import xxhash

from lightning_zero.checkpoint.manifest import MANIFEST_NAME, TRAINER_NAME, Manifest, TrainerFile
from lightning_zero.checkpoint.shards import Problem, check_header, open_shard, verify_file
from lightning_zero.errors import CorruptCheckpointError, IncompleteCheckpointError

Depth = Literal["none", "sizes", "full"]

THREADS = min(8, os.cpu_count() or 1)
_SHOWN = 10


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a tag's directory, checked for itself (`Manifest.from_json`).

    Raises:
        IncompleteCheckpointError: there is none.
        CorruptCheckpointError: it can't be believed.
    """
    path = directory / MANIFEST_NAME
    with os.fdopen(open_shard(path), "rb") as file:
        content = file.read()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise CorruptCheckpointError(f"{path}: the manifest is not text ({error})") from None
    return Manifest.from_json(text, str(path))


def read_trainer(directory: Path, entry: TrainerFile) -> bytes:
    """The bytes of `trainer.pt`, always checked: they are few.

    Raises:
        IncompleteCheckpointError: it is not there, or is not of its size.
        CorruptCheckpointError: a byte differs.
    """
    path = directory / TRAINER_NAME
    with os.fdopen(open_shard(path), "rb") as file:
        content = file.read(entry.nbytes + 1)
    if len(content) != entry.nbytes:
        raise IncompleteCheckpointError(f"{path} doesn't have {entry.nbytes} bytes; it was cut short, or replaced")
    if xxhash.xxh3_64_hexdigest(content) != entry.xxh3:
        raise CorruptCheckpointError(f"{path}: the checksum doesn't match; the file is damaged, or another save's")
    return content


def find_problems(
    directory: Path,
    manifest: Manifest,
    depth: Depth,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Iterator[Problem]:
    """What is wrong with a checkpoint's files; several are read at once.

    Args:
        directory: the tag's.
        manifest: of that directory.
        depth: see the module.
        progress: is told, from several threads, of bytes that were read.
    """
    if depth == "none":
        return
    try:
        read_trainer(directory, manifest.trainer)
    except (IncompleteCheckpointError, CorruptCheckpointError) as error:
        yield Problem(TRAINER_NAME, None, 0, manifest.trainer.nbytes, str(error))
    if depth == "sizes":
        for entry in manifest.files:
            yield from check_header(directory / entry.name, entry)
        return
    with ThreadPoolExecutor(THREADS, "lightning_zero-verify") as pool:
        for found in pool.map(lambda entry: list(verify_file(directory / entry.name, entry, progress)), manifest.files):
            yield from found


def require_sound(directory: Path, manifest: Manifest, depth: Depth) -> None:
    """Raise what `find_problems` finds, all in one error.

    Raises:
        IncompleteCheckpointError: a file is missing or cut short, or is another save's (depth `sizes`).
        CorruptCheckpointError: a checksum doesn't match (depth `full`).
    """
    problems = list(find_problems(directory, manifest, depth))
    if problems:
        shown = "; ".join(map(str, problems[:_SHOWN]))
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        error = CorruptCheckpointError if depth == "full" else IncompleteCheckpointError
        raise error(f"the checkpoint {directory} is not as it was written: {shown}{more}")
