"""What a checkpoint holds: Lightning's dict and the partition, said in segments.

Lightning hands over a dict with the module's state dict and whatever hooks and callbacks made of it. An entry that
*is* a live parameter (the same memory) is stored as the segments of its masters, which each rank has of its own
share; so a 16-bit model isn't stored twice. A frozen parameter is the same on every rank, and each writes a part.
Anything else (buffers, averaged weights that a callback put in a parameter's place) is stored by rank 0 as given; the
masters of a 16-bit parameter whose place was taken are then stored beside the optimizer's state of it. Large tensors
elsewhere in the dict go into rank 0's shard too: see `placeholders`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_zero.checkpoint.containers import KEYED, take_apart, text_of
from lightning_zero.checkpoint.content import RankContent, SharedContent, TensorToSave
from lightning_zero.checkpoint.manifest import DTYPES, PLAIN, Entry, OptimizerEntry, Role, StoredValue
from lightning_zero.checkpoint.placeholders import take_out
from lightning_zero.checkpoint.tensors import CODES
from lightning_zero.engine.buckets import Piece
from lightning_zero.engine.optimizer import MASTER
from lightning_zero.engine.partition import Partition
from lightning_zero.errors import UnsupportedModelError
from lightning_zero.plugin.metric_state import MetricState
from lightning_zero.plugin.random_state import get_random_state
from lightning_zero.segments import ParameterSpec, plan_buckets

_LARGE_BYTES = 64 << 10


def contents(
    checkpoint: Mapping[str, Any],
    module: Module,
    partition: Partition | None,
    *,
    rank: int,
    world_size: int,
    stage: int,
    metrics: Mapping[str, MetricState] | None = None,
    loaders: Sequence[Mapping[str, Any]] = (),
    logged: Mapping[str, Any] | None = None,
    validating: bool = False,
) -> tuple[RankContent, SharedContent]:
    """Divide Lightning's dict into what this rank writes and what the ranks share.

    Args:
        checkpoint: what `Trainer.save_checkpoint` dumped; it isn't changed.
        module: the live one.
        partition: what the ranks own, if an optimizer has been set up and its state is to be saved.
        rank: this rank.
        world_size: of how many.
        stage: the ZeRO stage, for the record.
        metrics: what this rank's metrics have accumulated.
        loaders: what the order of this rank's data was drawn from: see `data_order`.
        logged: what this rank has logged: see `logged_metrics`.
        validating: whether it is saved in the middle of a validation.
    """
    division = _Division(checkpoint, module, partition, rank, world_size)
    division.add_state_dict()
    trainer = division.add_elsewhere()
    if partition is not None:
        division.add_masters(partition)
        if "optimizer_states" in checkpoint:
            division.add_optimizer_states(partition)
            trainer["optimizer_states"] = [
                {**state, "state": _unsegmented(state["state"], alone=world_size == 1)}
                for state in checkpoint["optimizer_states"]
            ]
    rank_state = io.BytesIO()
    own = {
        "random": get_random_state(),
        "loops": checkpoint.get("loops"),
        "metrics": dict(metrics or {}),
        "loaders": [*loaders],
        "logged": dict(logged or {}),
        "validating": validating,
    }
    torch.serialization.save(own, rank_state)
    return (
        RankContent(
            division.tensors,
            division.values,
            rank_state.getvalue(),
            step=checkpoint["global_step"],
            unchanging=division.unchanging,
        ),
        SharedContent(checkpoint["epoch"], stage, division.entries, division.aliases, division.optimizers, trainer),
    )


class _Division:
    """Lightning's dict on its way into segments. What is added first comes first in the shard.

    Attributes:
        tensors: what this rank writes, and what it writes once, as long as it doesn't change (`unchanging`).
        values: the optimizer's states of this rank's segments that are no tensors.
        entries: what there is in all, with the other names of tied tensors (`aliases`).
        optimizers: whose states they are.
    """

    def __init__(
        self, checkpoint: Mapping[str, Any], module: Module, partition: Partition | None, rank: int, world_size: int
    ) -> None:
        self.tensors: list[TensorToSave] = []
        self.unchanging: list[TensorToSave] = []
        self.values: list[StoredValue] = []
        self.entries: list[Entry] = []
        self.aliases: dict[str, str] = {}
        self.optimizers: list[OptimizerEntry] = []
        self._checkpoint = checkpoint
        self._state_dict: Mapping[str, Any] = checkpoint["state_dict"]
        self._rank = rank
        self._world_size = world_size
        self._live = {_memory(parameter): parameter for parameter in module.parameters()}
        self._buffers = {_memory(buffer) for buffer in module.buffers()}
        buckets = partition.buckets if partition is not None else ()
        self._slots = {slot.parameter: slot for bucket in buckets for slot in bucket.slots}
        self._stored_names: dict[Parameter, str] = {}
        """Of the parameters that the state dict holds."""

    def add_state_dict(self) -> None:
        """What the module's state dict holds, but for the parameters that have masters."""
        untrained: list[tuple[str, Tensor]] = []
        frozen: list[tuple[str, Tensor]] = []
        for name, value in self._state_dict.items():
            if not isinstance(value, Tensor):
                continue
            parameter = self._live.get(_memory(value)) if value.numel() else None
            if parameter in self._stored_names:
                self.aliases[name] = self._stored_names[parameter]
                continue
            role = self._role(parameter, value)
            if parameter is not None:
                self._stored_names[parameter] = name
            self._add_entry(name, value, role)
            if role == "frozen":
                frozen.append((name, value))
            elif role == "given" and parameter is not None:
                untrained.append((name, value))
            elif role != "parameter":
                self._add_by_first(name, value.detach())
        self.tensors += _share_of(untrained, self._rank, self._world_size)
        self.unchanging += _share_of(frozen, self._rank, self._world_size)

    def _role(self, parameter: Parameter | None, value: Tensor) -> Role:
        if parameter is None:
            return "buffer" if _memory(value) in self._buffers else "given"
        if parameter in self._slots:
            return "parameter"
        return "given" if parameter.requires_grad else "frozen"

    def _add_entry(self, name: str, value: Tensor, role: Role) -> None:
        self.entries.append(Entry(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), role))

    def _add_by_first(self, name: str, value: Tensor) -> None:
        if self._rank == 0 and value.numel():
            self.tensors.append(TensorToSave("model", name, 0, value.numel(), value.reshape(-1)))

    def add_elsewhere(self) -> dict[str, Any]:
        """Large tensors elsewhere in the dict; what is left of it, for `trainer.pt`."""
        rest = {key: self._checkpoint[key] for key in self._checkpoint if key not in ("state_dict", "optimizer_states")}
        rest, elsewhere = take_out(rest, _is_large, self._state_dict.keys())
        for name, value in elsewhere.items():
            self._add_entry(name, value, "elsewhere")
            self._add_by_first(name, value)
        state_dict = {name: value for name, value in self._state_dict.items() if not isinstance(value, Tensor)}
        return {**self._checkpoint, **rest, "state_dict": state_dict}

    def add_masters(self, partition: Partition) -> None:
        """This rank's segments of the parameters that the state dict holds."""
        for bucket in partition.buckets:
            for piece in bucket.pieces:
                parameter, segment = piece.slot.parameter, piece.segment
                if parameter not in self._stored_names or not segment.numel:
                    continue
                # One that an optimizer holds, and that isn't trained, has a master too: it may be trained later
                place = self.tensors if parameter.requires_grad else self.unchanging
                flat, steady = piece.master.reshape(-1), piece.master.dtype != parameter.dtype
                name, start, stop = self._stored_names[parameter], segment.start, segment.stop
                place.append(TensorToSave("model", name, start, stop, flat, steady=steady))

    def add_optimizer_states(self, partition: Partition) -> None:
        """This rank's part of every optimizer's state.

        Raises:
            UnsupportedModelError: one that no checkpoint can hold in parts.
        """
        names = {parameter: self._stored_names.get(parameter, slot.name) for parameter, slot in self._slots.items()}
        for index, segmented in enumerate(partition.segmented):
            optimizer = segmented.optimizer
            groups = tuple(tuple(names[p] for p in group["params"]) for group in optimizer.param_groups)
            self.optimizers.append(OptimizerEntry(type(optimizer).__name__, groups))
            held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            for piece in segmented.pieces:
                if piece.slot.parameter not in held:  # another may have its name by now
                    continue
                state = dict(optimizer.state.get(piece.master, {}))
                if not all(isinstance(key, str) for key in state):
                    state = {KEYED: state}
                parameter = piece.slot.parameter
                left_out = not parameter.requires_grad and piece.slot.name not in self._state_dict
                if parameter not in self._stored_names and piece.master.dtype != parameter.dtype and not left_out:
                    state[MASTER] = piece.master.detach()
                for key, value in state.items() if piece.segment.numel else ():
                    self._add_state(index, names[piece.slot.parameter], piece, key, value)

    def _add_state(self, index: int, name: str, piece: Piece, key: str, value: Any) -> None:
        try:
            stored = _stored(key, value, piece)
        except TypeError as error:
            if self._world_size == 1:  # then it goes with the rest of the dict
                return
            raise UnsupportedModelError(
                f"{self.optimizers[index].class_name} keeps a {error} in the state {key!r} of {name!r}; a checkpoint "
                "holds tensors, numbers, strings and None, and lists, tuples, deques, dicts and sets of these. Save "
                "weights alone (save_weights_only=True), or use DDPStrategy for it, or another optimizer"
            ) from None
        start, stop = piece.segment.start, piece.segment.stop
        for of, leaf in stored.items():
            if isinstance(leaf, Tensor):
                self.tensors.append(TensorToSave("optimizer", name, start, stop, leaf, index, of, steady=True))
            else:
                self.values.append(StoredValue(index, name, start, stop, of, leaf))


def _is_large(value: Any) -> bool:
    """Whether it is a plain tensor of a large storage: a pickle would hold all of that, however small the tensor."""
    if type(value) is not Tensor or value.requires_grad or value.layout != torch.strided or not value.is_contiguous():
        return False
    if value.is_meta or value.is_conj() or value.is_neg() or str(value.dtype).removeprefix("torch.") not in DTYPES:
        return False
    return value.untyped_storage().nbytes() >= _LARGE_BYTES


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Two tensors with the same of these are one."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _share_of(whole: list[tuple[str, Tensor]], rank: int, world_size: int) -> list[TensorToSave]:
    """This rank's part of tensors that are the same on every rank."""
    by_size: dict[int, list[tuple[str, Tensor]]] = {}
    for name, value in whole:
        by_size.setdefault(value.element_size(), []).append((name, value))
    shares = []
    for size, alike in by_size.items():
        specs = [ParameterSpec(name, tuple(value.shape), size) for name, value in alike]
        total = sum(spec.numel for spec in specs) * size + 1
        flat = {name: value.detach().reshape(-1) for name, value in alike}
        for bucket in plan_buckets(specs, world_size, "element", total):
            for segment, _ in bucket.owned(rank):
                part = flat[segment.name][segment.start : segment.stop]
                shares.append(TensorToSave("model", segment.name, segment.start, segment.stop, part))
    return shares


def _stored(key: str, value: Any, piece: Piece) -> dict[str, Any]:
    """A state as tensors and plain values, by the names under which they are stored: see `containers`.

    Raises:
        TypeError: it, or something in it, is of a class that can't be stored, which is the message.
    """
    if type(value) is Tensor and value.layout == torch.strided and value.dtype in CODES:
        if value.shape == piece.master.shape:  # as nearly all are
            return {key: value.reshape(-1)}
        if not value.dim():
            return {key: value}
    stored: dict[str, Any] = {}

    def store(name: str, leaf: Any) -> Any:
        _require_leaf(name, leaf)
        if isinstance(leaf, Tensor) and leaf.shape == piece.master.shape:
            stored[name] = leaf.reshape(-1)
        elif isinstance(leaf, Tensor) and leaf.shape == (piece.segment.numel,):
            # It would be taken for element-wise, and get the parameter's shape
            stored[f"{name}[]"] = leaf.reshape(*[1] * (piece.master.dim() + 1), -1)
            return {"tensor": f"{name}[]", "shape": [*leaf.shape]}
        else:
            stored[name] = leaf
        return name

    described = take_apart(key, value, store)
    return stored if described == key else {key: text_of(described), **stored}


def _require_leaf(name: str, leaf: Any) -> str:
    """Raise the TypeError of `_stored`, if there is a reason."""
    if isinstance(leaf, Tensor) and not hasattr(leaf, "__tensor_flatten__"):
        if leaf.layout != torch.strided or leaf.dtype not in CODES:
            raise TypeError(f"{leaf.layout} tensor of {leaf.dtype}")
    elif not isinstance(leaf, PLAIN):
        raise TypeError(type(leaf).__name__)
    return name


def _can_be_stored(value: Any) -> bool:
    try:
        take_apart("", value, _require_leaf)
    except TypeError:
        return False
    return True


def _unsegmented(state: Mapping[Any, Any], *, alone: bool) -> dict[Any, Any]:
    """What of an optimizer's state is no tensor or number of a parameter, and so goes with the rest of the dict.

    State under keys of the optimizer's own is the same on every rank. Objects of its own classes are there only where
    nothing is partitioned.
    """
    rest: dict[Any, Any] = {}
    for key, value in state.items():
        if not isinstance(key, int):
            rest[key] = value
        elif alone:
            odd = {name: item for name, item in value.items() if not _can_be_stored(item)}
            if odd:
                rest[key] = odd
    return rest
