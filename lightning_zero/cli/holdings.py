"""Who owns what in a checkpoint: bytes by entry, rank and kind, out of the manifest alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_zero.checkpoint.manifest import Manifest, Role

Holding = Literal["parameters", "states", "frozen", "others", "own"]
"""Masters; optimizer states; frozen parameters; buffers and what hooks and callbacks gave; what one rank alone needs
(its random states)."""

HOLDINGS: tuple[Holding, ...] = get_args(Holding)

_BY_ROLE: Mapping[Role, Holding] = {
    "parameter": "parameters",
    "frozen": "frozen",
    "buffer": "others",
    "given": "others",
    "elsewhere": "others",
}


@dataclass(frozen=True)
class Holdings:
    """Bytes by rank and kind, for each entry.

    Attributes:
        world_size: the number of ranks.
        by_name: for each entry, in the state dict's order (then parameters that are none, of which there are only
            states): the bytes of each (rank, kind).
        own: what each rank stores for itself alone.
    """

    world_size: int
    by_name: Mapping[str, Mapping[tuple[int, Holding], int]]
    own: Mapping[int, int]

    @classmethod
    def of(cls, manifest: Manifest) -> Holdings:
        """Sum up what a manifest lists."""
        roles: dict[str, Role] = {
            entry.name: "frozen" if entry.name in manifest.frozen else entry.role for entry in manifest.entries
        }
        by_name: dict[str, Counter[tuple[int, Holding]]] = {name: Counter() for name in roles}
        own: Counter[int] = Counter()
        for file in manifest.files:
            for tensor in file.tensors:
                if tensor.kind == "rank":
                    own[file.rank] += tensor.nbytes
                    continue
                kind: Holding = "states" if tensor.kind == "optimizer" else _BY_ROLE[roles[tensor.name]]
                by_name.setdefault(tensor.name, Counter())[file.rank, kind] += tensor.nbytes
        return cls(manifest.world_size, by_name, own)

    def by_rank(self) -> list[dict[Holding, int]]:
        """What each rank holds of each kind."""
        ranks: list[dict[Holding, int]] = [dict.fromkeys(HOLDINGS, 0) for _ in range(self.world_size)]
        for held in self.by_name.values():
            for (rank, kind), nbytes in held.items():
                ranks[rank][kind] += nbytes
        for rank, nbytes in self.own.items():
            ranks[rank]["own"] += nbytes
        return ranks

    def owners(self, name: str) -> list[int]:
        """The ranks that hold something of an entry."""
        return sorted({rank for (rank, _), nbytes in self.by_name[name].items() if nbytes})


def states_by_optimizer(manifest: Manifest) -> list[dict[str, int]]:
    """For each optimizer: its states' names, and their bytes; 0 for those that are no tensors."""
    states: list[defaultdict[str, int]] = [defaultdict(int) for _ in manifest.optimizers]
    for file in manifest.files:
        for tensor in file.tensors:
            if tensor.optimizer is not None and tensor.state is not None:
                states[tensor.optimizer][tensor.state] += tensor.nbytes
        for value in file.values:
            states[value.optimizer][value.state] += 0
    return [dict(sorted(by_name.items())) for by_name in states]


def ranges_text(ranks: Iterable[int]) -> str:
    """Such as `0-3, 7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
