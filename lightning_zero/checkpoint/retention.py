"""Which tags of a save directory stay, and which go once a newer one is there.

| a tag | stays |
|---|---|
| that `latest` names, or a link | always |
| among the newest complete ones | as long as it is |
| whose step is a multiple of `keep_every_n_steps` | always |
| that is protected by name, as the best ones are | as long as it is |
| that is torn, or has a name that isn't asked for | always: it isn't ours to judge |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.commit import TagInfo, real_path
from lightning_zero.checkpoint.manifest import MANIFEST_NAME
from lightning_zero.checkpoint.storage import Location
from lightning_zero.errors import CorruptCheckpointError


@dataclass
class Retention:
    """What is kept of a save directory.

    Attributes:
        keep_last: how many of the newest complete tags, at least 1.
        keep_every_n_steps: tags whose step is a multiple of it stay as well.
        among: by their names, the tags that are looked at; no other is counted, or given.
        let_go: whether a tag that needn't be kept can be removed: nobody else wants it.
        settled: the tags that are known to stay for their step, with the versions of their manifests, which needn't be
            read again then: there may be hundreds. Whoever prunes again and again hands the same dict in.

    Raises:
        ValueError: nothing would be kept.
    """

    keep_last: int
    keep_every_n_steps: int | None = None
    among: Callable[[str], bool] = lambda name: True
    let_go: Callable[[str], bool] = lambda name: True
    settled: dict[str, tuple[int, float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {self.keep_last}")

    def apply(self, save_dir: Location, protect: Collection[str] = (), *, beside: int = 0) -> list[str]:
        """Remove what `superseded` gives, and nothing where `latest` is damaged.

        Returns:
            The tags that were removed.
        """
        try:
            old = self.superseded(save_dir, protect, beside=beside)
        except CorruptCheckpointError:
            return []  # nobody knows which one would be missed
        removed = [tag.name for tag in old if self.let_go(tag.name)]
        for name in removed:
            commit.remove_tag(save_dir, name)
        return removed

    def superseded(self, save_dir: Location, protect: Collection[str] = (), *, beside: int = 0) -> list[TagInfo]:
        """The tags that needn't be kept.

        Args:
            save_dir: the save directory.
            protect: tags that stay whatever their age; they count among the newest all the same.
            beside: how many of the newest are kept beside the last: copies of others.

        Raises:
            CorruptCheckpointError: `latest` is damaged.
        """
        latest = commit.read_latest(save_dir)
        settled = {name for name, version in self.settled.items() if version == _version(save_dir / name)}
        tags = [tag for tag in commit.list_tags(save_dir, without=settled) if tag.complete]
        linked = {real_path(tag.path) for tag in tags if tag.path.is_symlink()}
        counted = [tag for tag in tags if not tag.path.is_symlink() and self.among(tag.name)]
        older = counted[self.keep_last + beside :]
        for_good = {tag.name for tag in older if self._stays_for_its_step(tag)}
        self._settle(save_dir, settled | for_good)
        staying = {latest, *for_good, *protect}
        return [tag for tag in older if tag.name not in staying and real_path(tag.path) not in linked]

    def _stays_for_its_step(self, tag: TagInfo) -> bool:
        return self.keep_every_n_steps is not None and tag.step % self.keep_every_n_steps == 0

    def _settle(self, save_dir: Location, names: Iterable[str]) -> None:
        versions = {name: _version(save_dir / name) for name in names}
        self.settled.clear()
        self.settled.update({name: version for name, version in versions.items() if version is not None})


def _version(tag: Location) -> tuple[int, float] | None:
    """Another one whenever the tag is saved again."""
    try:
        status = (tag / MANIFEST_NAME).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime
