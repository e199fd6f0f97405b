"""Lightning's `CheckpointIO` for sharded checkpoint directories; anything else goes to and from a plain file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_args

import msgspec
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.background import BackgroundSave
from lightning_zero.checkpoint.content import RankContent, SharedContent
from lightning_zero.checkpoint.integrity import Depth, read_manifest
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.manifest import Manifest
from lightning_zero.checkpoint.nodes import Place
from lightning_zero.checkpoint.plan import TagValidation
from lightning_zero.checkpoint.report import MOST_LINKS, SaveReport, StoredFile
from lightning_zero.checkpoint.resolution import is_checkpoint, resolve
from lightning_zero.checkpoint.save import begin_save
from lightning_zero.checkpoint.snapshot import Snapshot
from lightning_zero.checkpoint.storage import Location, locate, remove_file
from lightning_zero.errors import CheckpointNotFoundError, CorruptCheckpointError
from lightning_zero.plugin.arguments import require_bool

PREPARED = "lightning_zero_prepared_save"
"""Where a `PreparedSave` is in Lightning's dict: an entry comes through a wrapper that makes another dict of it."""


class PreparedSave(msgspec.Struct, frozen=True, eq=False):
    """What the ranks write into a directory, and how. No dataclass: Lightning would copy what is in it.

    Attributes:
        content: what this rank puts in, or why it can't.
        shared: what they have in common.
        group: the ranks; None for a single process.
        update_latest: have `latest` name it.
        behind: go on with training while it is written; then `group_behind` is the thread's own.
        tag_validation: what to do where the ranks were given different tags.
        place: where this rank is.
        began: when training began to wait, by `time.perf_counter()`.
    """

    content: RankContent | Exception
    shared: SharedContent | None
    group: dist.ProcessGroup | None
    update_latest: bool
    behind: bool
    group_behind: dist.ProcessGroup | None
    tag_validation: TagValidation
    place: Place | None
    began: float


class LoadedCheckpoint(dict[str, Any]):
    """Lightning's dict as it came from a directory: its tensors are read when they are copied to their place."""

    def __init__(self, checkpoint: dict[str, Any], source: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.source = source


def weights_option(weights_only: bool | None) -> dict[str, bool]:
    """How it is passed on to a `CheckpointIO`: not at all where nobody has set it, since Lightning 2.5's has none."""
    return {} if weights_only is None else {"weights_only": weights_only}


class ZeroCheckpointIO(TorchCheckpointIO):
    """Saves and loads checkpoint directories, all ranks together; on a mounted file system, or at any URL of fsspec's.

    Args:
        async_save: go on with training while a checkpoint is written. Training waits for a copy of this rank's segments
            in host memory, which is used again for the next. One save is under way at a time. What fails is raised at
            the next save, or at the end of fit; deletions wait until the newer checkpoint is there.
        verify: what a load checks: `"none"`, `"sizes"` (every file is there with its size and header) or `"full"`
            (every byte against its checksum).
        fsync: make sure that a checkpoint has reached the disk before it takes its name. Turn it off only where a
            power cut doesn't matter.
        node_local: every node has a disk of its own under the same path, and gets the whole checkpoint. So a resume
            needs no shared storage, and no particular nodes; a node without the checkpoint is an error that says so.
    """

    def __init__(
        self, *, async_save: bool = False, verify: Depth = "sizes", fsync: bool = True, node_local: bool = False
    ) -> None:
        super().__init__()
        if verify not in get_args(Depth):
            raise ValueError(f'verify must be "none", "sizes" or "full", not {verify!r}')
        require_bool("async_save", async_save)
        require_bool("fsync", fsync)
        require_bool("node_local", node_local)
        self.async_save = async_save
        self.verify = verify
        self.fsync = fsync
        self.node_local = node_local
        self.last_save: SaveReport | None = None
        """What the last save did that is done."""
        self._reports: deque[SaveReport] = deque()  # a thread may add to it
        self._frozen: StoredFile | None = None
        self._path_behind: Location | None = None
        self._verified: Manifest | None = None
        self._prepare_process()

    def _prepare_process(self) -> None:
        self._snapshot = Snapshot()
        self._background = BackgroundSave()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_snapshot": None, "_background": None}  # threads and memory are a process's own

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare_process()

    # --- save ---

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a directory, called on every rank; or, for a dict that no ZeroStrategy prepared, one plain file."""
        prepared = checkpoint.get(PREPARED)
        if prepared is None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        pending = self._background.join()
        try:
            self._save(prepared, locate(path))
        finally:
            # Raised only now: the failure of one save doesn't cost the next, and all ranks have met
            if pending is not None:
                raise pending

    def _save(self, prepared: PreparedSave, directory: Location) -> None:
        before = None
        if not isinstance(prepared.content, Exception) and prepared.content.unchanging:
            before = self._frozen or _frozen_of_latest(directory.parent, prepared)
        rest = begin_save(
            directory,
            prepared.content,
            prepared.shared,
            group=prepared.group,
            update_latest=prepared.update_latest,
            fsync=self.fsync,
            tag_validation=prepared.tag_validation,
            place=prepared.place if self.node_local else None,
            frozen_before=before,
            snapshot=self._snapshot if prepared.behind else None,
            group_behind=prepared.group_behind,
            began=prepared.began,
        )

        def save() -> None:
            self.last_save = report = rest()
            self._reports.append(report)
            if prepared.update_latest and report.frozen is not None:  # others may be removed at once
                self._frozen = report.frozen

        self._path_behind = directory if prepared.behind else None
        if prepared.behind:
            self._background.begin(save)
        else:
            save()

    def is_being_saved(self, path: str | Path) -> bool:
        """Whether a save of this very path is under way behind training."""
        return self._path_behind is not None and self._path_behind == locate(path) and self._background.is_running

    def join(self) -> None:
        """Wait for the save that is under way, if there is one.

        Raises:
            CheckpointWriteError: it failed. It isn't raised a second time.
        """
        error = self._background.join()
        if error is not None:
            raise error

    def take_reports(self) -> list[SaveReport]:
        """What the saves did that were done since this was last asked."""
        return [self._reports.popleft() for _ in range(len(self._reports))]

    def reserve(self, nbytes: int, *, pinned: bool) -> None:
        """Get the host memory of a save behind training, ahead of the first: see `Snapshot.reserve`."""
        self._snapshot.reserve(nbytes, pinned=pinned)

    def before_step(self) -> None:
        """Before an optimizer changes what is being copied: see `Snapshot.fence`."""
        self._snapshot.fence()

    def after_commit(self, action: Callable[[], object]) -> None:
        """Do something when the checkpoint that is being saved is there; at once, if none is. Not, if it fails."""
        self._background.after_commit(action)

    @override
    def teardown(self) -> None:
        """Wait for the save that is under way, and give the host memory back."""
        self.join()
        self._snapshot.release()

    # --- load and remove ---

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a directory (a tag's, or a save directory, whose `latest` then decides) or a plain file."""
        self.join()
        if not is_checkpoint(path):
            place = map_location or (lambda storage, _: storage)
            try:
                return super().load_checkpoint(path, place, **weights_option(weights_only))
            except FileNotFoundError:
                beside = [tag.name for tag in commit.list_tags(locate(path).parent)]
                named = f"; beside it there are {beside}" if beside else ""
                raise CheckpointNotFoundError(f"there is no checkpoint at {path}{named}") from None
            except (KeyError, IndexError, EOFError, UnpicklingError) as error:  # what comes of what is no pickle
                if "weights_only" in str(error):  # torch doesn't trust it: the default of Lightning 2.6, not of 2.5
                    raise
                reason = f"{type(error).__name__}: {error}"
                raise CorruptCheckpointError(f"{path} isn't a checkpoint, or was cut short ({reason})") from error
        if self._verified is not None:
            source = Checkpoint(resolve(path, verify="none"), verify="none", manifest=self._verified)
        else:
            source = Checkpoint(resolve(path, verify=self.verify), verify=self.verify)
        return LoadedCheckpoint(source.lightning_checkpoint(weights_only=weights_only is not False), source)

    @contextmanager
    def loading_verified(self, manifest: Manifest) -> Iterator[None]:
        """What is loaded within has been looked at, as deep as `verify` says; here is its manifest."""
        self._verified = manifest
        try:
            yield
        finally:
            self._verified = None

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a tag's directory, or a file. `latest` never goes on naming what was removed.

        While a save is under way, it happens after that one's commit: what is to be removed may be the only copy.
        """
        self.after_commit(partial(_remove, locate(path)))


def _remove(where: Location) -> None:
    if where.is_dir() and not where.is_symlink():
        commit.remove_tag(where.parent, where.name)
    else:
        remove_file(where)


def _frozen_of_latest(save_dir: Location, prepared: PreparedSave) -> StoredFile | None:
    """This rank's frozen parameters in the checkpoint that `latest` names, as an earlier run has left them."""
    try:
        latest = commit.read_latest(save_dir)
        if latest is None:
            return None
        rank = prepared.group.rank() if prepared.group is not None else 0
        files = read_manifest(save_dir / latest).files
    except Exception:  # a store's own kinds too: the other ranks wait for this one
        return None
    found = (StoredFile(save_dir / latest / f.name, f, links=MOST_LINKS) for f in files if f.frozen and f.rank == rank)
    return next(found, None)
