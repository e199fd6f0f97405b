"""Whether what lies in a tag's directory is what was written there.

Three depths: `none` believes the manifest; `sizes` looks whether every file is there with its exact size and its own
header, which finds whatever was cut short, lost or swapped; `full` reads every byte against its checksum. Nothing here
changes anything on disk, and no torch: `lightning-zero verify` starts at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import xxhash

from lightning_zero.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, StoredTensor, TrainerFile
from lightning_zero.checkpoint.shards import Problem, check_header, verify_tensors
from lightning_zero.checkpoint.storage import Location, open_file, read_file
from lightning_zero.errors import CorruptCheckpointError, IncompleteCheckpointError

Depth = Literal["none", "sizes", "full"]

THREADS = min(8, os.cpu_count() or 1)
_SHOWN = 10
_PORTION_BYTES = 64 << 20
"""About what one thread verifies before it takes something else: one rank's file is many threads' work."""


def read_manifest(directory: Location) -> Manifest:
    """The manifest of a tag's directory, checked for itself (`Manifest.from_json`).

    Raises:
        IncompleteCheckpointError: there is none.
        CorruptCheckpointError: it can't be believed.
    """
    path = directory / MANIFEST_NAME
    try:
        text = read_file(path).decode()
    except UnicodeDecodeError as error:
        raise CorruptCheckpointError(f"{path}: the manifest is not text ({error})") from None
    return Manifest.from_json(text, str(path))


def read_trainer(directory: Location, entry: TrainerFile) -> bytes:
    """The bytes of `trainer.pt`, always checked: they are few.

    Raises:
        IncompleteCheckpointError: it is not there, or is not of its size.
        CorruptCheckpointError: a byte differs.
    """
    path = directory / entry.name
    content = read_file(path, entry.nbytes + 1)
    if len(content) != entry.nbytes:
        raise IncompleteCheckpointError(f"{path} doesn't have {entry.nbytes} bytes; it was cut short, or replaced")
    if xxhash.xxh3_64_hexdigest(content) != entry.xxh3:
        raise CorruptCheckpointError(f"{path}: the checksum doesn't match; the file is damaged, or another save's")
    return content


def find_problems(
    directory: Location,
    manifest: Manifest,
    depth: Depth,
    progress: Callable[[int], None] = lambda nbytes: None,
    *,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Problem]:
    """What is wrong with a checkpoint's files; several threads read at once.

    Args:
        directory: the tag's.
        manifest: of that directory.
        depth: see the module.
        progress: is told, from several threads, of bytes that were read.
        share: which part of the work is meant, and of how many: the ranks divide it among them.
    """
    part, parts = share
    if depth == "none":
        return
    if part == 0:
        try:
            read_trainer(directory, manifest.trainer)
        except (IncompleteCheckpointError, CorruptCheckpointError) as error:
            yield Problem(manifest.trainer.name, None, 0, manifest.trainer.nbytes, str(error))

    def look(entry: FileEntry) -> list[Problem]:
        return list(check_header(directory / entry.name, entry))

    def verify(portion: tuple[FileEntry, Sequence[StoredTensor]]) -> list[Problem]:
        entry, tensors = portion
        try:
            file = open_file(directory / entry.name)
        except IncompleteCheckpointError:
            return []  # check_header has said so
        return list(verify_tensors(file, entry, tensors, progress))

    own = manifest.files[part::parts]
    if depth == "sizes" and len(own) <= 1:  # not worth a thread, which waits for a processor where all are busy
        for entry in own:
            yield from look(entry)
        return
    with ThreadPoolExecutor(THREADS, "lightning_zero-verify") as pool:
        for found in pool.map(look, own):
            yield from found
        if depth == "full":
            for found in pool.map(verify, list(_portions(manifest))[part::parts]):
                yield from found


def _portions(manifest: Manifest) -> Iterator[tuple[FileEntry, Sequence[StoredTensor]]]:
    """Every tensor of every file, in runs of about the same number of bytes."""
    for entry in manifest.files:
        portion: list[StoredTensor] = []
        nbytes = 0
        for tensor in entry.tensors:
            portion.append(tensor)
            nbytes += tensor.nbytes
            if nbytes >= _PORTION_BYTES:
                yield entry, portion
                portion, nbytes = [], 0
        if portion:
            yield entry, portion


def require_sound(directory: Location, manifest: Manifest, depth: Depth) -> None:
    """Raise what `find_problems` finds, all in one error.

    Raises:
        IncompleteCheckpointError: a file is missing or cut short, or is another save's (depth `sizes`).
        CorruptCheckpointError: a checksum doesn't match (depth `full`).
    """
    problems = list(map(str, find_problems(directory, manifest, depth)))
    if problems:
        raise problems_as_error(directory, problems, depth)


def problems_as_error(
    directory: Location, problems: Sequence[str], depth: Depth
) -> CorruptCheckpointError | IncompleteCheckpointError:
    """What was found at a depth, in one error."""
    shown = "; ".join(problems[:_SHOWN])
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    error = CorruptCheckpointError if depth == "full" else IncompleteCheckpointError
    return error(f"the checkpoint {directory} is not as it was written: {shown}{more}")
