"""A DCP directory, read as segments: the module, the optimizers, and what was kept beside them.

Who has written it isn't said, and so it is told by what stands where:

| | the module's state dict | an optimizer's, wherever there are param groups |
|---|---|---|
| Lightning's `FSDPStrategy` | `model` | `optimizer_0`, …; Lightning's own dict is in `meta.pt` |
| Lightning's `ModelParallelStrategy` | `state_dict` | the same |
| a loop, by `get_state_dict` | `model`, as a rule | `optimizer`, as a rule |

Nor is it said which entries are buffers, which are frozen parameters, and which are tied: whatever no optimizer has is
stored as it is.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_zero.checkpoint.commit import validate_tag
from lightning_zero.checkpoint.descriptions import require
from lightning_zero.checkpoint.elements import NAMES
from lightning_zero.checkpoint.foreign import (
    LIGHTNING_VERSION,
    ForeignCheckpoint,
    Optimizer,
    Rank,
    prefix_of,
    refuse_ours,
)
from lightning_zero.checkpoint.fsdp.archives import Archives
from lightning_zero.checkpoint.fsdp.metadata import Chunked, KeyPath, Leaf, is_distributed, read_metadata
from lightning_zero.checkpoint.fsdp.nesting import below, is_below, joined, nested
from lightning_zero.checkpoint.fsdp.optimizer import optimizer_keys, read_groups, read_states
from lightning_zero.checkpoint.manifest import Entry
from lightning_zero.checkpoint.origins import advice
from lightning_zero.checkpoint.storage import Location, PathOrUrl, absolute, locate, names_in, open_file
from lightning_zero.checkpoint.torch_file import Progress, describe_torch_file
from lightning_zero.errors import CheckpointMismatchError, CheckpointNotFoundError

_LIGHTNINGS_DICT = "meta.pt"
_MODEL_KEYS = ("model", "state_dict")
_NUMBER = re.compile(r"\d{1,18}")

_STAGE = 3
"""What FSDP's sharding comes to, for the record."""


def find_distributed(path: PathOrUrl) -> Location:
    """The directory that is meant: this one, or that of a file.

    Raises:
        CheckpointNotFoundError: it holds no checkpoint of DCP's.
    """
    given = absolute(locate(path))
    where = given.parent if given.is_file() else given
    if not is_distributed(where):
        if not where.is_dir():
            raise CheckpointNotFoundError(f"{where} is no directory")
        names = sorted(names_in(where))
        for directory in (where, *(where / name for name in names)):
            refuse_ours(directory)
        if where is not given:
            raise CheckpointNotFoundError(
                f"{given} is no file of a sharded checkpoint's; a full checkpoint needs no import: pass it as ckpt_path"
            )
        there = [name for name in names if is_distributed(where / name)]
        raise CheckpointNotFoundError(
            f"{where} holds no checkpoint of torch.distributed.checkpoint"
            f"{f'; there are {there}' if there else advice(where)}"
        )
    return where


def read_distributed(
    directory: Location,
    tag: str | None = None,
    *,
    model_key: str | None = None,
    optimizer_key: str | None = None,
    module_only: bool = False,
    submodule: str = "",
    verify: bool = True,
    progress: Progress = lambda nbytes: None,
) -> ForeignCheckpoint:
    """Open a directory; its tensors stay unread.

    Args:
        directory: as `find_distributed` gives it.
        tag: that it is to become; the directory's own name if it is None.
        model_key: where the module's state dict stands, `""` for all that is no optimizer's; see the table if it is
            None.
        optimizer_key: where the one optimizer's does.
        module_only: leave the optimizers out.
        submodule: the name that the saved module has within the one that it is to be loaded into; none if it is that.
        verify: compare the descriptions in the files with their checksums.
        progress: is told of the tensors' bytes as they are read.

    Raises:
        IncompleteCheckpointError: a file is missing, or a part of a tensor.
        CorruptCheckpointError: a file isn't what DCP writes, or they don't fit together.
        CheckpointMismatchError: it can't be told where the module stands, or whose a state is.
        UnsupportedModelError: what isn't cut into rows, or was transformed as it was written.
    """
    name = validate_tag(directory.name if tag is None else tag)
    archives = Archives(directory, progress, verify=verify)
    found = _divide(read_metadata(directory), model_key, optimizer_key, archives.where)
    tensors = {entry: leaf for entry, leaf in found.module.items() if isinstance(leaf, Chunked)}
    odd = {entry: archives.value(entry, leaf) for entry, leaf in found.module.items() if entry not in tensors}
    optimizers = [Optimizer("", read_groups(leaves, archives)) for leaves in found.optimizers]
    trained = {parameter for optimizer in optimizers for group in optimizer.groups for parameter in group.names}
    if missing := sorted(trained - tensors.keys()):
        raise CheckpointMismatchError(
            f"{archives.where}: an optimizer has {missing[0]!r:.200}, and the module hasn't; "
            "say where what belongs together stands (model_key=, optimizer_key=; --model-key, --optimizer-key)"
        )

    module = {entry: (tensor, archives.pieces(entry, tensor)) for entry, tensor in tensors.items()}
    held = [one for _, pieces in module.values() for one in pieces]
    steps = 0
    for number, optimizer in enumerate([] if module_only else optimizers):
        own = {parameter: module[parameter] for group in optimizer.groups for parameter in group.names}
        states, made = read_states(found.optimizers[number], number, own, archives)
        held += states
        steps = max(steps, made)
    ranks = {rank: Rank() for rank in sorted({rank for rank, _ in held})}
    for rank, piece in held:
        (ranks[rank].trained if piece.segment.name in trained else ranks[rank].others).append(piece)

    client_state = _lightnings(directory, verify) | _kept(found.beside, archives)
    if optimizers and not steps and not module_only and LIGHTNING_VERSION not in client_state:
        warnings.warn(f"{directory}: no optimizer says how many steps were made: it counts as none", stacklevel=3)
    prefix = prefix_of(submodule)

    def rename(entry: str) -> str:
        return prefix + entry

    return ForeignCheckpoint(
        directory=directory,
        name=name,
        stage=_STAGE,
        step=steps,
        entries=[
            Entry(rename(entry), tensor.shape, NAMES[tensor.code], "parameter" if entry in trained else "given")
            for entry, tensor in tensors.items()
        ],
        aliases={},
        odd={rename(entry): value for entry, value in odd.items()},
        optimizers=[] if module_only else [optimizer.renamed(rename) for optimizer in optimizers],
        ranks=[rank.renamed(rename) for rank in ranks.values()] or [Rank()],
        client_state=client_state,
        schedulers=[_numbered(state) for state in client_state.values() if _is_schedulers(state)],
    )


# ------------------------------------------------------------------------------------------------- what stands where


@dataclass(frozen=True, slots=True)
class _Divided:
    """The leaves: of the module's state dict by their names in it, of each optimizer's, and all others."""

    module: dict[str, Leaf]
    optimizers: list[dict[KeyPath, Leaf]]
    beside: dict[KeyPath, Leaf]


def _divide(leaves: Mapping[KeyPath, Leaf], model_key: str | None, optimizer_key: str | None, where: str) -> _Divided:
    keys = optimizer_keys(leaves) if optimizer_key is None else [_key(leaves, optimizer_key, where)]
    rest = {path: leaf for path, leaf in leaves.items() if not any(is_below(path, key) for key in keys)}
    model = _model_key(rest, where) if model_key is None else _key(rest, model_key, where)
    entries = below(rest, model)
    if not model:  # the module's own names stand beside everything else
        entries = {path: leaf for path, leaf in entries.items() if len(path) == 1 and isinstance(leaf, Chunked)}
    return _Divided(
        {joined(path): leaf for path, leaf in entries.items()},
        [below(leaves, key) for key in keys],
        {path: leaf for path, leaf in rest.items() if not (is_below(path, model) and path[len(model) :] in entries)},
    )


def _key(leaves: Mapping[KeyPath, Leaf], name: str, where: str) -> KeyPath:
    """The key that goes by that name."""
    found = (path[:depth] for path in leaves for depth in range(len(path)) if joined(path[:depth]) == name)
    if (key := next(found, None)) is None:
        raise CheckpointMismatchError(f"{where}: nothing stands below {name!r:.80}; there {_there(leaves)}")
    return key


def _model_key(leaves: Mapping[KeyPath, Leaf], where: str) -> KeyPath:
    keys = {path[:depth] for path in leaves for depth in range(1, len(path)) if path[depth - 1] in _MODEL_KEYS}
    depth = min(map(len, keys), default=0)
    outermost = [key for key in keys if len(key) == depth]
    if len(outermost) != 1:
        raise CheckpointMismatchError(
            f"{where}: it can't be told where the module's state dict stands; there {_there(leaves)}: "
            "name the one (model_key=, --model-key; '' where the module's own names stand there)"
        )
    return outermost[0]


def _there(leaves: Mapping[KeyPath, Leaf]) -> str:
    keys = sorted({str(path[0]) for path in leaves})
    return f"is {str(keys[:10])[:400]}{' and more' if len(keys) > 10 else ''}"


def _lightnings(directory: Location, verify: bool) -> dict[Any, Any]:
    """Lightning's dict, or Fabric's, if one of them has written this."""
    if _LIGHTNINGS_DICT not in names_in(directory):
        return {}
    path = directory / _LIGHTNINGS_DICT
    return require(describe_torch_file(path, open_file, lambda nbytes: None, verify=verify).value, dict, f"{path}")


def _kept(leaves: Mapping[KeyPath, Leaf], archives: Archives) -> dict[Any, Any]:
    """What stands beside the module and the optimizers, where it is small: without tensors."""
    large = {path[0] for path, leaf in leaves.items() if isinstance(leaf, Chunked)}
    if large:
        warnings.warn(
            f"{archives.where}: {str(sorted(map(str, large)))[:400]}, with tensors in it, belongs to no module and no "
            "optimizer: it isn't imported",
            stacklevel=4,
        )
    values = {path: archives.value(joined(path), leaf) for path, leaf in leaves.items() if path[0] not in large}
    return require(nested(values, archives.where), dict, archives.where)


def _is_schedulers(state: object) -> bool:
    return isinstance(state, dict) and "last_epoch" in state


def _numbered(state: dict[Any, Any]) -> dict[Any, Any]:
    """A scheduler's state with its milestones numbered: DCP has made strings of a dict's keys."""
    return {
        name: {int(key): count for key, count in value.items()}
        if type(value) is dict and all(type(key) is str and _NUMBER.fullmatch(key) for key in value)
        else value
        for name, value in state.items()
    }
