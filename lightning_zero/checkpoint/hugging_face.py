"""Files that any reader of safetensors opens, and the folder of them that `transformers.from_pretrained` loads.

Safetensors has no ties: each tensor is stored once, under its first name, as `safetensors.torch.save_model` does it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from lightning_zero.checkpoint.elements import NAMES, Elements
from lightning_zero.checkpoint.manifest import ITEM_BYTES
from lightning_zero.checkpoint.read_ahead import read_ahead
from lightning_zero.checkpoint.shards import safetensors_header
from lightning_zero.checkpoint.storage import Location, create_file
from lightning_zero.errors import UnsupportedModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_ALIGNMENT = 64


def write_safetensors(
    path: Location, tensors: Mapping[str, Elements], progress: Callable[[int], object], overflows: set[Elements]
) -> None:
    """Write one file, which is durable when this returns.

    Raises:
        UnsupportedModelError: the format has no name for a tensor's dtype, or one of its own for what a tensor has.
    """
    # The widest elements first: then each tensor is aligned to its elements
    ordered = sorted(_untie(tensors).items(), key=lambda item: -ITEM_BYTES[item[1].shown])
    for name, tensor in ordered:
        if name == "__metadata__":
            raise UnsupportedModelError(f"no tensor in a .safetensors can be named {name!r}; export to a .ckpt")
        if tensor.shown == "C128":
            raise UnsupportedModelError(
                f"{name!r} is torch.{NAMES[tensor.shown]}, which a .safetensors can't hold; export to a .ckpt"
            )
    rows = ((name, tensor.shown, tensor.shape, tensor.nbytes) for name, tensor in ordered)
    header = safetensors_header({"format": "pt"}, rows, _HEADER_ALIGNMENT)
    with create_file(path, len(header) + sum(tensor.nbytes for _, tensor in ordered)) as file:
        file.write(header)
        for _, chunk in read_ahead([tensor for _, tensor in ordered], overflows=overflows):
            file.write(chunk)
            progress(len(chunk))


def write_folder(
    folder: Location,
    tensors: Mapping[str, Elements],
    max_shard_bytes: int,
    progress: Callable[[int], object],
    overflows: set[Elements],
) -> None:
    """Write `model.safetensors`, or numbered files with an index that says where each tensor is."""
    shards: list[dict[str, Elements]] = [{}]
    filled = 0
    for name, tensor in _untie(tensors).items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, shards[0], progress, overflows)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file_name, shard, progress, overflows)
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode() + b"\n"
    with create_file(folder / INDEX, len(index)) as file:
        file.write(index)


def _untie(tensors: Mapping[str, Elements]) -> dict[str, Elements]:
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: tensors[name] for name in first.values()}
