"""Who has saved which checkpoint: it stays for as long as one of those who have saved it wants it.

Several callbacks may save in one directory under names of one shape: all epochs by one, the last few steps by another.
Whoever keeps a number of tags counts, and removes, only what is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_zero.checkpoint.storage import PathOrUrl, absolute, locate


class Savers:
    """By path, the state keys of callbacks; an empty one for whoever is no callback of ours.

    Of what an earlier run has saved nothing is known but what came with the checkpoint that this one resumed from.
    """

    def __init__(self) -> None:
        self._of: dict[str, set[str]] = {}

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
            self.forget(path)
        return not wanted

    def forget(self, path: PathOrUrl) -> None:
        """It is removed."""
        self._of.pop(_key(path), None)

    def state(self) -> dict[str, list[str]]:
        """For a checkpoint, and for `restore` in a later run."""
        return {path: sorted(savers) for path, savers in list(self._of.items())}

    def restore(self, state: Mapping[str, Sequence[str]]) -> None:
        """What was known when the checkpoint was saved."""
        for path, savers in state.items():
            self._of.setdefault(path, set()).update(savers)


def _key(path: PathOrUrl) -> str:
    return str(absolute(locate(path)))
