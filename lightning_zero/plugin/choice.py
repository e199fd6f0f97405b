"""Which checkpoint all ranks load.

Rank 0 chooses, and every rank looks at a part of the files. Where `latest` decides, a tag that isn't sound is passed
over, with a warning, and rank 0 chooses again; a tag that was asked for is loaded, or is an error.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

from lightning_zero.checkpoint.integrity import Depth, find_problems, problems_as_error, read_manifest
from lightning_zero.checkpoint.manifest import Manifest
from lightning_zero.checkpoint.resolution import is_checkpoint, is_tag, resolve
from lightning_zero.checkpoint.storage import Location, locate
from lightning_zero.errors import ZeroError
from lightning_zero.plugin.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Choice:
    """The tag's directory that was chosen, and its manifest."""

    path: str
    manifest: Manifest


@dataclass(slots=True)
class _Seen:
    """What one rank sees of a tag: which save it is, and what is wrong with its part of the files."""

    save_id: str = ""
    problems: tuple[str, ...] = ()


def choose(
    ranks: Ranks,
    path: str | os.PathLike[str],
    tag: str | None = None,
    *,
    verify: Depth,
    share: tuple[int, int],
    where: str,
    required: bool = False,
) -> Choice | None:
    """Choose a checkpoint that is sound for all ranks. Called on every rank.

    Args:
        ranks: all of them.
        path: the save directory, or a tag's.
        tag: of the save directory.
        verify: how deep to look.
        share: which part of the files this rank looks at, and of how many.
        where: what this rank is called in messages.
        required: a directory without a checkpoint is an error; else there is None.

    Raises:
        CheckpointNotFoundError: the tag isn't there, or none is sound.
        IncompleteCheckpointError: the tag that was asked for lacks something.
        CorruptCheckpointError: it isn't what was written.
    """
    rejected: dict[str, str] = {}

    def decide() -> tuple[str, bool] | None:
        if tag is None and not is_checkpoint(path) and not (required and locate(path).is_dir()):
            return None
        return str(resolve(path, tag, verify=None, rejected=rejected)), tag is None and not is_tag(path)

    while (decided := ranks.decided_by_first(decide)) is not None:
        chosen, by_latest = decided
        directory = locate(chosen)
        manifests: list[Manifest] = []
        seen = ranks.everyones(partial(_look, directory, verify, share, where, manifests))
        problems = [problem for one in seen for problem in one.problems]
        if not problems and len({one.save_id for one in seen}) > 1:
            problems = [f"the ranks see checkpoints of different saves in {directory}"]
        if not problems:
            return Choice(chosen, manifests[0])
        if not by_latest:
            raise problems_as_error(directory, problems, verify)
        rejected[directory.name] = "; ".join(problems)
    return None


def _look(
    directory: Location, verify: Depth, share: tuple[int, int], where: str, manifests: list[Manifest]
) -> list[_Seen]:
    try:
        manifest = read_manifest(directory)
        found = find_problems(directory, manifest, verify, share=share)
        seen = _Seen(manifest.save_id, tuple(f"{where}: {problem}" for problem in found))
    except ZeroError as error:
        return [_Seen(problems=(f"{where}: {error}",))]
    manifests.append(manifest)
    return [seen]
