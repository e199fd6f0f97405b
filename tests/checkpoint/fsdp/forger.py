"""Writes directories as torch.distributed.checkpoint lays them out, without ranks: what they would have held."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.models import Model


def forge(directory: Path, state: dict[str, Any], world_size: int = 3, dimension: int = 0) -> Path:
    """Write what `dcp.save` would, with every tensor cut along a dimension."""
    directory.mkdir(parents=True, exist_ok=True)
    flattened, paths = flatten_state_dict(state)
    files = [io.BytesIO() for _ in range(world_size)]
    storage: dict[MetadataIndex, _StorageInfo] = {}
    leaves: dict[str, Any] = {}

    def put(rank: int, index: MetadataIndex, value: object) -> None:
        begin = files[rank].tell()
        torch.save(value, files[rank])
        storage[index] = _StorageInfo(f"__{rank}_0.distcp", begin, files[rank].tell() - begin)

    for name, value in flattened.items():
        if not isinstance(value, Tensor):
            leaves[name] = BytesStorageMetadata()
            put(0, MetadataIndex(name), value)
            continue
        chunks, along = [], min(dimension, value.ndim - 1)
        parts = value.detach().tensor_split(world_size, along) if value.ndim else [value.detach()]
        offsets = [0] * value.ndim
        for rank, part in enumerate(parts):
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), part.shape))
            if part.numel():
                put(rank, MetadataIndex(name, offsets, rank), part.clone())
            if value.ndim:
                offsets[along] += part.shape[along]
        leaves[name] = TensorStorageMetadata(TensorProperties(dtype=value.dtype), value.shape, chunks)
    for rank, file in enumerate(files):
        (directory / f"__{rank}_0.distcp").write_bytes(file.getvalue())
    write_metadata(directory, Metadata(leaves, paths, storage, StorageMeta(directory)))
    return directory


def write_metadata(directory: Path, metadata: object) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def edit(directory: Path, change: Callable[[Metadata], object]) -> None:
    """Write `.metadata` again, with a change."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    change(metadata)
    write_metadata(directory, metadata)


def training(optimizer_class: Any = torch.optim.AdamW, step: int = 5, **options: Any) -> tuple[Model, Any]:
    """The tests' own module and an optimizer of its two groups, with a random state in every place."""
    module, random = Model(), torch.Generator().manual_seed(1)
    configured: Any = module.configure_optimizers()
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in configured["optimizer"].param_groups]
    optimizer = optimizer_class(groups, lr=2e-3, **options)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random)
        parameter.grad = torch.randn(parameter.shape, generator=random) if parameter.requires_grad else None
    for _ in range(step):
        optimizer.step()
    module.norm.running_mean.uniform_(generator=random)
    return module, optimizer


def optimizer_state(module: Model, optimizer: Any) -> dict[str, Any]:
    """As `get_state_dict` names it."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": [names[p] for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    return {"state": {names[p]: dict(state) for p, state in optimizer.state.items()}, "param_groups": groups}


def flattened(state: dict[str, Any]) -> dict[str, Any]:
    """The same, as `flatten_optimizer_state_dict=True` makes it."""
    states = {f"state.{name}.{key}": value for name, of in state["state"].items() for key, value in of.items()}
    settings = {
        f"param_groups.{name}.{key}": value
        for group in state["param_groups"]
        for name in group["params"]
        for key, value in group.items()
        if key != "params"
    }
    return states | settings
