"""Whose checkpoint a directory holds, where it isn't ours; and the command that makes one of ours of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_zero.checkpoint.commit import LATEST
from lightning_zero.checkpoint.deepspeed.files import LIGHTNING_TAG, is_deepspeed_tag
from lightning_zero.checkpoint.fsdp.metadata import is_distributed
from lightning_zero.checkpoint.manifest import MANIFEST_NAME
from lightning_zero.checkpoint.storage import Location, names_in
from lightning_zero.errors import CheckpointNotFoundError


@dataclass(frozen=True, slots=True)
class Origin:
    """A system that writes checkpoints: its name, and the command that imports them."""

    writer: str
    command: str


_DEEPSPEED = Origin("DeepSpeed", "import-deepspeed")
_FSDP = Origin("FSDP", "import-fsdp")


def origin_of(directory: Location) -> Origin | None:
    """Who has written the checkpoint in a directory; None where there is none, or it is ours, or nobody may look."""
    try:
        if is_deepspeed_tag(directory) or is_deepspeed_tag(directory / LIGHTNING_TAG):
            return _DEEPSPEED
        return _FSDP if is_distributed(directory) else None
    except OSError:
        return None


def origins_beside(directory: Location) -> Iterator[tuple[Location, Origin]]:
    """Others' checkpoints in a directory, in the one that it lies in, and in all that lie beside it."""
    parent = directory.parent
    for there in (directory, parent, *(parent / name for name in sorted(names_in(parent)))):
        if (origin := origin_of(there)) is not None:
            yield there, origin


def require_ours(directory: Location) -> None:
    """Make sure that a tag's directory isn't another system's.

    Raises:
        CheckpointNotFoundError: it is.
    """
    if not (directory / MANIFEST_NAME).is_file() and (origin := origin_of(directory)) is not None:
        raise CheckpointNotFoundError(_advice(directory, origin))


def advice(path: Location) -> str:
    """What to do about a path without a checkpoint of ours, to be appended to a message.

    Others' may be there; or save directories, where what was given is the run's.
    """
    found = next(origins_beside(path / LATEST), None)
    if found:
        return f"; {_advice(*found)}"
    save_dirs = [str(path / name) for name in sorted(names_in(path)) if _is_save_directory(path / name)]
    return f"; there are some in {' and in '.join(save_dirs[:3])}" if save_dirs else ""


def _is_save_directory(directory: Location) -> bool:
    try:
        return (directory / LATEST).is_file()
    except OSError:
        return False


def _advice(there: Location, origin: Origin) -> str:
    return f"{there} is a checkpoint of {origin.writer}'s: lightning-zero {origin.command} {there} DST imports it"
