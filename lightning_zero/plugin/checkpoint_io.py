"""Lightning's `CheckpointIO` for sharded checkpoint directories; anything else goes to and from a plain file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.integrity import Depth
from lightning_zero.checkpoint.load import Checkpoint, is_checkpoint, resolve
from lightning_zero.checkpoint.save import RankContent, SaveReport, SharedContent, save_checkpoint
from lightning_zero.errors import CheckpointWriteError

PREPARED = "lightning_zero_prepared_save"
"""Where a `PreparedSave` is in Lightning's dict: an entry comes through a wrapper that makes another dict of it."""


class PreparedSave:
    """What the ranks write into a directory, and the group they agree in."""

    def __init__(
        self, content: RankContent, shared: SharedContent, group: dist.ProcessGroup | None, *, update_latest: bool
    ) -> None:
        self.content = content
        self.shared = shared
        self.group = group
        self.update_latest = update_latest


class LoadedCheckpoint(dict[str, Any]):
    """Lightning's dict as it came from a directory: its tensors are read when they are copied to their place."""

    def __init__(self, checkpoint: dict[str, Any], source: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.source = source


class ZeroCheckpointIO(TorchCheckpointIO):
    """Saves and loads checkpoint directories, all ranks together.

    Args:
        verify: what a load checks: `"none"`, `"sizes"` (every file is there with its size and header) or `"full"`
            (every byte against its checksum).
        fsync: make sure that a checkpoint has reached the disk before it takes its name. Turn it off only where a
            power cut doesn't matter.
    """

    def __init__(self, *, verify: Depth = "sizes", fsync: bool = True) -> None:
        super().__init__()
        if verify not in get_args(Depth):
            raise ValueError(f'verify must be "none", "sizes" or "full", not {verify!r}')
        self.verify = verify
        self.fsync = fsync
        self.last_save: SaveReport | None = None

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a directory, called on every rank; or, for a dict that no ZeroStrategy prepared, one plain file."""
        prepared = checkpoint.get(PREPARED)
        if prepared is None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if "://" in str(path):
            raise CheckpointWriteError(
                f"{path} is not saved: sharded checkpoints go to mounted file systems, not to URLs. Give a path, or "
                "write whole checkpoints to the URL by ZeroStrategy(checkpoint_io=TorchCheckpointIO())"
            )
        self.last_save = save_checkpoint(
            Path(path),
            prepared.content,
            prepared.shared,
            group=prepared.group,
            update_latest=prepared.update_latest,
            fsync=self.fsync,
        )

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a directory (a tag's, or a save directory, whose `latest` then decides) or a plain file."""
        if not is_checkpoint(path):
            options = (
                {} if weights_only is None else {"weights_only": weights_only}
            )  # Lightning 2.5 knows no such thing
            return super().load_checkpoint(path, map_location or (lambda storage, _: storage), **options)
        source = Checkpoint(resolve(path, verify=self.verify), verify=self.verify)
        return LoadedCheckpoint(source.lightning_checkpoint(weights_only=weights_only is not False), source)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a tag's directory, or a file. `latest` never goes on naming what was removed."""
        where = Path(path)
        if where.is_dir() and not where.is_symlink():
            commit.remove_tag(where.parent, where.name)
        elif where.is_symlink() or where.exists():
            where.unlink()
