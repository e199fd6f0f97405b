"""A checkpoint that another system has written, said in segments: what each of its readers gives.

Its tensors are unread, and what is no tensor is said in the terms of `pickled`. Every element of every trained
parameter is there exactly once. `importing` writes it again as one of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_zero.checkpoint.archive import Record
from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.manifest import ITEM_BYTES, MANIFEST_NAME, Entry, Plain
from lightning_zero.checkpoint.storage import Location
from lightning_zero.checkpoint.torch_file import View
from lightning_zero.errors import CheckpointNotFoundError
from lightning_zero.segments import Segment

LIGHTNING_VERSION = "pytorch-lightning_version"
"""What Lightning's own dict has, whoever keeps it."""


def refuse_ours(directory: Location) -> None:
    """Make sure that nobody imports what is one of ours already.

    Raises:
        CheckpointNotFoundError: it is.
    """
    if (directory / MANIFEST_NAME).is_file():
        raise CheckpointNotFoundError(f"{directory} is a checkpoint of lightning_zero's, which needs no import")


def prefix_of(submodule: str) -> str:
    """What the names of a submodule's tensors begin with.

    Raises:
        ValueError: it is no name of one.
    """
    if submodule and not all(submodule.split(".")):
        raise ValueError(f"{submodule!r} is no submodule's name, such as 'model' or 'model.encoder'")
    return f"{submodule}." if submodule else ""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a rank holds of one tensor of the state dict, or of one of an optimizer's states of it.

    Attributes:
        segment: of the tensor.
        value: one element for each of the segment's, or what belongs to the whole: an unread number, or one as it is.
        state: of the optimizer; None for the tensor itself, which is the master, if it is trained.
        optimizer: which one.
    """

    segment: Segment
    value: Elements | Plain
    state: str | None = None
    optimizer: int = 0

    def widened(self) -> Piece:
        """The same, in fp32."""
        return replace(self, value=self.value.shown_in("F32")) if isinstance(self.value, Elements) else self


@dataclass(frozen=True, slots=True)
class Rank:
    """What one rank holds.

    Attributes:
        trained: masters and optimizer states.
        frozen: parameters that aren't trained.
        others: buffers, and whatever else is in the state dict.
    """

    trained: list[Piece] = field(default_factory=list)
    frozen: list[Piece] = field(default_factory=list)
    others: list[Piece] = field(default_factory=list)

    @property
    def records(self) -> set[Record]:
        """Where all of it is read."""
        views = (piece.value.source for piece in self if isinstance(piece.value, Elements))
        return {view.record for view in views if isinstance(view, View)}

    def renamed(self, rename: Callable[[str], str]) -> Rank:
        """The same, by other names."""

        def of(pieces: Iterable[Piece]) -> list[Piece]:
            return [replace(piece, segment=replace(piece.segment, name=rename(piece.segment.name))) for piece in pieces]

        return Rank(of(self.trained), of(self.frozen), of(self.others))

    def __iter__(self) -> Iterator[Piece]:
        yield from (*self.trained, *self.frozen, *self.others)


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """One of an optimizer's: the names of its parameters, in the optimizer's order, and its settings."""

    names: tuple[str, ...]
    settings: dict[Any, Any]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What is known of an optimizer: the name of its class, where it can be told, and its groups."""

    class_name: str
    groups: list[ParameterGroup]

    def renamed(self, rename: Callable[[str], str]) -> Optimizer:
        """The same, by other names."""
        groups = [replace(group, names=tuple(map(rename, group.names))) for group in self.groups]
        return replace(self, groups=groups)


@dataclass(frozen=True, slots=True)
class ForeignCheckpoint:
    """What a directory holds.

    Attributes:
        directory: that it was read from.
        name: that the tag is to have.
        stage: of ZeRO, or what its sharding comes to.
        step: how many steps were made, as far as it is known without Lightning.
        entries: the module's state dict, in its order.
        aliases: tied tensors: the other name, to the name under which it is stored.
        odd: what in the state dict is no tensor.
        optimizers: none, if the module alone was wanted.
        ranks: what each rank held.
        client_state: what was given to be kept beside; under Lightning, Lightning's own dict.
        schedulers: the states of torch's schedulers, where it isn't Lightning's dict that has them.
    """

    directory: Location
    name: str
    stage: int
    step: int
    entries: list[Entry]
    aliases: dict[str, str]
    odd: dict[str, Any]
    optimizers: list[Optimizer]
    ranks: list[Rank]
    client_state: dict[Any, Any]
    schedulers: list[Any]

    @property
    def is_lightnings(self) -> bool:
        """Whether a Trainer wrote it."""
        return LIGHTNING_VERSION in self.client_state

    def bytes_to_read(self, *, verify: bool) -> int:
        """What a reader's `progress` will add up to, if it is written as one of ours."""
        nbytes = 0
        for rank in self.ranks:
            tensors = [piece.value for piece in rank if isinstance(piece.value, Elements)]
            nbytes += sum(tensor.numel * ITEM_BYTES[tensor.stored] for tensor in tensors)
            nbytes += sum(record.nbytes for record in rank.records) if verify else 0
        return nbytes
