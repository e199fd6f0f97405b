"""Lightning lets a `CheckpointIO` be wrapped in others: what is inside, and what the wrappers' threads still do."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.io.async_plugin import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from lightning_zero.plugin.checkpoint_io import ZeroCheckpointIO


def unwrapped(io: CheckpointIO | None) -> ZeroCheckpointIO | None:
    """The one that writes directories, whatever is wrapped around it; None if it is another that saves in the end."""
    while isinstance(io, _WrappingCheckpointIO):
        io = io.checkpoint_io
    return io if isinstance(io, ZeroCheckpointIO) else None


def wait_for_threads(io: CheckpointIO) -> None:
    """Wait for a save that goes on in a wrapper's thread, and raise what went wrong with it.

    Lightning's `AsyncCheckpointIO` saves in a thread, where the ranks would agree while they train. So it is waited
    for: everything that comes through it is as safe as without it, and not faster.
    """
    for wrapper in _wrappers(io):
        if isinstance(wrapper, AsyncCheckpointIO) and wrapper._executor is not None:
            wrapper._executor.submit(lambda: None).result()
            if wrapper._error is not None:
                error, wrapper._error = wrapper._error, None
                raise error


def _wrappers(io: CheckpointIO | None) -> Iterator[_WrappingCheckpointIO]:
    while isinstance(io, _WrappingCheckpointIO):
        yield io
        io = io.checkpoint_io
