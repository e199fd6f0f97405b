"""An optimizer's state dict among the leaves of a DCP directory: its param groups, and its states.

`get_state_dict` writes it in one of two forms:

| | nested | flattened (`flatten_optimizer_state_dict=True`) |
|---|---|---|
| a state | `("state", parameter, name)` | `("state.parameter.name",)` |
| a setting | `("param_groups", number, name)` | `("param_groups.parameter.name",)`, for each parameter |
| a group's parameters | its setting `params` | not said: neighbours with the same settings are taken for one group |
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from lightning_zero.checkpoint.descriptions import number_of_steps, require
from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.foreign import ParameterGroup, Piece
from lightning_zero.checkpoint.fsdp.archives import Archives, Held
from lightning_zero.checkpoint.fsdp.metadata import Chunked, KeyPath, Leaf
from lightning_zero.checkpoint.fsdp.nesting import below, joined, nested
from lightning_zero.checkpoint.manifest import MASTER_CODES, PLAIN
from lightning_zero.errors import CorruptCheckpointError, UnsupportedModelError

_GROUPS, _STATES = "param_groups", "state"


def optimizer_keys(leaves: Mapping[KeyPath, Leaf]) -> list[KeyPath]:
    """Where optimizers' state dicts stand: wherever there are param groups."""
    found = {}
    for path in leaves:
        for depth, key in enumerate(path):
            if str(key).partition(".")[0] == _GROUPS:
                found[path[:depth]] = True
    return list(found)


def read_groups(leaves: Mapping[KeyPath, Leaf], archives: Archives) -> list[ParameterGroup]:
    """The param groups in one optimizer's state dict.

    Raises:
        CorruptCheckpointError: they aren't what torch writes.
        UnsupportedModelError: a setting is a tensor that is cut over ranks.
    """
    where = f"{archives.where}: the param groups"
    values = {
        path: archives.value(joined(path), leaf)
        for path, leaf in leaves.items()
        if joined(path).startswith(f"{_GROUPS}.")
    }
    if numbered := below(values, (_GROUPS,)):
        groups = [require(group, dict, where) for group in require(nested(numbered, where), list, where)]
        for name in (name for group in groups for name in require(group.get("params"), list, where)):
            require(name, str, where)
        return [ParameterGroup(tuple(group.pop("params")), group) for group in groups]
    of_each: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        name, _, setting = joined(path).removeprefix(f"{_GROUPS}.").rpartition(".")
        of_each.setdefault(name, {})[setting] = value
    alike = groupby(of_each.items(), key=lambda one: {name: _comparable(value) for name, value in one[1].items()})
    neighbours = [[*ones] for _, ones in alike]
    return [ParameterGroup(tuple(name for name, _ in ones), ones[0][1]) for ones in neighbours]


def _comparable(setting: Any) -> Any:
    """What is equal where a setting is: of a tensor (a learning rate that is one), its content."""
    if not isinstance(setting, Elements):
        return setting
    content = bytearray(setting.nbytes)
    setting.source.read(0, setting.numel, memoryview(content))
    return setting.stored, setting.shape, content


def read_states(
    leaves: Mapping[KeyPath, Leaf],
    number: int,
    module: Mapping[str, tuple[Chunked, Held]],
    archives: Archives,
) -> tuple[Held, int]:
    """The states in one optimizer's state dict, and how many steps it has made; 0 if it counts none.

    Args:
        leaves: of the state dict.
        number: of the optimizer.
        module: its parameters.
        archives: where they are read.

    Raises:
        CorruptCheckpointError: a state has no name that one can have, or is no parameter's.
        UnsupportedModelError: a state is neither kept element by element nor a number; or as `Archives.pieces`.
    """
    held: Held = []
    steps = 0.0
    for path, leaf in leaves.items():
        kind, _, rest = joined(path).partition(".")
        if kind != _STATES:
            continue
        name, _, state = rest.rpartition(".")
        what = f"{archives.where}: {state!r:.80} of {name!r:.200}"
        if name not in module or not state or "/" in state:
            raise CorruptCheckpointError(f"{what} is a state of none of the optimizer's parameters")
        tensor, masters = module[name]
        if isinstance(leaf, Chunked) and leaf.shape == tensor.shape and state != "step":
            pieces = archives.pieces(name, leaf, state, number)
            if leaf.code == tensor.code and leaf.code not in MASTER_CODES:
                # As wide as a 16-bit parameter because it had no master: it has one now
                pieces = [(rank, piece.widened()) for rank, piece in pieces]
            held += pieces
            continue
        if isinstance(leaf, Chunked) and leaf.numel != 1:
            raise UnsupportedModelError(
                f"{what} has the shape {leaf.shape!s:.80}, and its parameter {tensor.shape!s:.80}: it isn't kept "
                "element by element; the weights alone can be imported (module_only=True, --module-only)"
            )
        value = archives.value(f"{state} of {name}", leaf)
        if state == "step":
            steps = max(steps, number_of_steps(value, what))
        elif not isinstance(leaf, Chunked) and not isinstance(value, PLAIN):
            raise UnsupportedModelError(f"{what} is {type(value).__name__}: neither a tensor nor a plain value")
        held += [(rank, Piece(master.segment, value, state, number)) for rank, master in masters]
    return held, int(steps)
