"""Who has saved which checkpoint: it stays for as long as one of those who have saved it wants it.

Several callbacks may save in one directory under names of one shape: all epochs by one, the last few steps by another.
Whoever keeps a number of tags counts, and removes, only what is its own.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

from lightning_zero.checkpoint.storage import Location, PathOrUrl, is_remote, locate

FOR_GOOD = "for good"
"""A saver that never lets anything go."""
OTHER = "other"
"""One that is no callback of ours."""


class Savers:
    """By directory and tag, the state keys of the callbacks that want it, or `FOR_GOOD`, or `OTHER`.

    Of what an earlier run has saved, that is known which the state of a callback says that came with a checkpoint.
    """

    def __init__(self) -> None:
        self._of: dict[tuple[str, str], set[str]] = {}

    def note(self, path: PathOrUrl, saver: str) -> None:
        """It saves this one, perhaps as another has done before."""
        self._of.setdefault(_key(path), set()).add(saver)

    def may_count(self, path: PathOrUrl, saver: str) -> bool:
        """Whether it has saved this one and hasn't let it go; or nobody knows who has."""
        return saver in self._of.get(_key(path), (saver,))

    def let_go(self, path: PathOrUrl, saver: str) -> bool:
        """It wants this one no longer: whether nobody does, so that it can be removed."""
        wanted = self._of.get(_key(path), set())
        wanted.discard(saver)
        if not wanted:
            self._of.pop(_key(path), None)
        return not wanted

    def state(self, directory: PathOrUrl) -> dict[str, list[str]]:
        """Of the tags in a directory, by name: for a callback's state, and for `restore` in a later run."""
        here = _folder(locate(directory))
        return {name: sorted(savers) for (folder, name), savers in list(self._of.items()) if folder == here}

    def restore(
        self, directory: PathOrUrl, state: Mapping[str, Sequence[str]], among: Collection[str], loaded: PathOrUrl
    ) -> None:
        """Take over what was known when a checkpoint was saved.

        Args:
            directory: where the tags are.
            state: as it was given.
            among: the savers that there still are: of what another one has saved nobody knows whether it is wanted.
            loaded: the checkpoint. Was that itself not known, nobody of ours has saved it.
        """
        if locate(loaded).name not in state:
            self.note(loaded, OTHER)
        for name, savers in state.items():
            for saver in savers:
                if saver in (FOR_GOOD, OTHER, *among):
                    self.note(locate(directory) / name, saver)


def _key(path: PathOrUrl) -> tuple[str, str]:
    where = locate(path)
    return _folder(where.parent), where.name


def _folder(where: Location) -> str:
    return str(where) if is_remote(where) else os.path.realpath(where)
