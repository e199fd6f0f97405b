"""What ranks tell of a save: to each other, while it is made, and to whoever asked for it."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_zero.checkpoint.manifest import FileEntry, TrainerFile
from lightning_zero.checkpoint.storage import Location

MOST_LINKS = 10
"""How often a file is linked before it is compared with its checksums again: damage to it is all links' damage."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of frozen parameters that this rank has written, or linked, in an earlier save.

    Attributes:
        path: of the file.
        entry: what is in it.
        links: how often it was linked since its bytes were last written, or compared with their checksums.
    """

    path: Location
    entry: FileEntry
    links: int = 0


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save did.

    Attributes:
        path: the tag's directory.
        step: of training.
        bytes: of the whole checkpoint.
        written_bytes: of it, what was written by this save, and not linked from the one before.
        seconds: from the call until the checkpoint was committed, on this rank.
        stall_seconds: how long training waited: this rank's, or behind training the longest of all ranks'.
        rank_seconds: how long each rank wrote.
        frozen: this rank's file of frozen parameters, if there are any.
    """

    path: Location
    step: int
    bytes: int
    written_bytes: int
    seconds: float
    stall_seconds: float
    rank_seconds: tuple[float, ...]
    frozen: StoredFile | None = None

    @property
    def slowest_rank(self) -> int:
        """The rank that wrote longest."""
        return max(range(len(self.rank_seconds)), key=self.rank_seconds.__getitem__)

    def __str__(self) -> str:
        """One line for the log."""
        gigabytes, linked = self.written_bytes / 1e9, self.bytes - self.written_bytes
        return (
            f"saved {self.path.name} at step {self.step}: {gigabytes:.3g} GB"
            f"{f' (and {linked / 1e9:.3g} GB linked)' if linked else ''} in {self.seconds:.3g} s "
            f"({gigabytes / self.seconds:.3g} GB/s); training waited {self.stall_seconds:.3g} s; "
            f"the slowest rank, {self.slowest_rank}, wrote for {max(self.rank_seconds):.3g} s"
        )


@dataclass(frozen=True, slots=True)
class Written:
    """What one rank has written."""

    files: tuple[FileEntry, ...]
    trainer: TrainerFile | None
    nbytes: int
    seconds: float
    stall_seconds: float
    links: int = 0
