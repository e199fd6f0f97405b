"""Which checkpoint is meant by a path, a URL or a tag.

| `resolve` is given | `latest` | it gives |
|---|---|---|
| a tag's directory, or a file in one | not looked at | that directory |
| a save directory and a tag | not looked at | the tag, or CheckpointNotFoundError with the tags that there are |
| a save directory | names a sound tag | that tag |
| a save directory | missing, damaged, or names what is not sound | a warning, and the newest sound tag |
| a save directory without a sound tag | any | CheckpointNotFoundError, with what is wrong with each |
| a directory, or a tag, of another system's | any | CheckpointNotFoundError, with the command that imports it |

No row deletes or repairs anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.integrity import Depth, find_problems, read_manifest, require_sound
from lightning_zero.checkpoint.manifest import MANIFEST_NAME
from lightning_zero.checkpoint.origins import advice, require_ours
from lightning_zero.checkpoint.storage import Location, PathOrUrl, locate
from lightning_zero.errors import CheckpointNotFoundError, ZeroError


def is_checkpoint(path: PathOrUrl) -> bool:
    """Whether `resolve` is worth a try: a tag's directory, a file of one, or a save directory with a tag in it."""
    where = locate(path)
    where = where.parent if where.name == commit.LATEST and where.is_file() else where
    if _tag_directory(where) is not None or (where / commit.LATEST).is_file():
        return True
    # What is hidden is a dead save's: its manifest may be there
    shown = (child for child in where.iterdir() if not child.name.startswith(".")) if where.is_dir() else ()
    return any((child / MANIFEST_NAME).is_file() for child in shown)


def is_tag(path: PathOrUrl) -> bool:
    """Whether it names one checkpoint: a tag's directory, or a file in it."""
    return _tag_directory(locate(path)) is not None


def resolve(
    path: PathOrUrl,
    tag: str | None = None,
    *,
    verify: Depth | None = "sizes",
    rejected: Mapping[str, str] | None = None,
) -> Location:
    """The directory of the tag that is meant: see the table above.

    Args:
        path: a save directory, a tag's directory, or a file in one; a path or a URL.
        tag: of the save directory; `latest` decides where it is None.
        verify: how sound the tag that `latest` names has to be; None: the caller looks at it.
        rejected: tags that have turned out not to be sound, with what is wrong with each.

    Raises:
        CheckpointNotFoundError: it isn't there.
        CorruptCheckpointError: the tag that was asked for is a link that leaves the save directory.
    """
    where, rejected = locate(path), rejected or {}
    if where.name == commit.LATEST and where.is_file():
        where = where.parent
    if tag is not None:
        named = _named(where, tag)
        require_ours(named)
        return named
    if (directory := _tag_directory(where)) is not None:
        return directory
    if not where.is_dir():
        raise CheckpointNotFoundError(
            f"{where} is not a checkpoint of lightning_zero; give the save directory, or a tag's directory"
            if where.exists()
            else f"there is no checkpoint at {where}"
        )
    try:
        latest = commit.read_latest(where)
        if latest is None:
            problem = f"{where / commit.LATEST} is missing"
        elif latest in rejected:
            problem = f"the checkpoint that {where / commit.LATEST} names can't be used: {rejected[latest]}"
        else:
            directory = _named(where, latest)
            if verify is not None:
                require_sound(directory, read_manifest(directory), verify)
            return directory
    except ZeroError as error:
        problem = f"the checkpoint that {where / commit.LATEST} names can't be used: {error}"
    found = commit.list_tags(where)
    problems = {candidate.name: rejected.get(candidate.name) or candidate.problem for candidate in found}
    for candidate in sorted(found, key=lambda tag: not tag.resumable):  # weights alone only where there is no other
        if problems[candidate.name] or candidate.manifest is None:
            continue
        if verify == "full" and (wrong := next(find_problems(candidate.path, candidate.manifest, verify), None)):
            problems[candidate.name] = str(wrong)
            continue
        warnings.warn(f"{problem}.\nThe newest sound checkpoint is taken instead: {candidate.path}", stacklevel=2)
        return candidate.path
    listed = "".join(f"\n  {name}: {wrong}" for name, wrong in problems.items())
    raise CheckpointNotFoundError(
        f"{where} holds no sound checkpoint; {problem}{advice(where)}{'. Its tags:' if listed else ''}{listed}"
    )


def _tag_directory(path: Location) -> Location | None:
    """The tag's directory that a path names, itself or by a file in it; one that has lost its manifest, too."""
    for directory in (path, *([path.parent] if path.is_file() else [])):
        if (directory / MANIFEST_NAME).is_file() or commit.looks_like_tag(directory):
            return directory
    return None


def _named(save_dir: Location, tag: str) -> Location:
    directory = existing(save_dir, tag)
    commit.check_link(directory)
    return directory


def existing(save_dir: Location, tag: str) -> Location:
    """A tag's directory, whatever is in it.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    directory = save_dir / commit.validate_tag(tag)
    if directory.is_dir():
        return directory
    if (save_dir / MANIFEST_NAME).is_file():
        raise CheckpointNotFoundError(
            f"{save_dir} is one checkpoint already, in which there is no {tag!r}; leave the tag out, or give the save "
            "directory that it lies in"
        )
    there = [found.name for found in commit.list_tags(save_dir)]
    raise CheckpointNotFoundError(
        f"there is no checkpoint {tag!r} in {save_dir}; there {f'are {there}' if there else 'is none at all'}"
    )
