"""The model out of a checkpoint, in memory or unread, as `export.Wanted` says: no process group, and no Lightning."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.export import Wanted
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.reader import Reader
from lightning_zero.checkpoint.resolution import resolve
from lightning_zero.checkpoint.storage import PathOrUrl
from lightning_zero.checkpoint.tensors import LazyTensor
from lightning_zero.errors import CheckpointMismatchError, UnsupportedModelError

_Module = TypeVar("_Module", bound=torch.nn.Module)


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: PathOrUrl,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Tensor]:
    """The model's state dict, in fp32: parameters (fp64 stays) and 16-bit buffers. Tied tensors are one.

    Args:
        checkpoint_dir: a save directory, or a tag's.
        tag: of the save directory; `latest` decides where it is None.
        exclude_frozen_parameters: leave out the parameters that were not trained.
        lazy_mode: give stand-ins with `.shape`, `.dtype` and `.contiguous()`, which reads one, and keeps nothing.

    Raises:
        ZeroError: there is no such checkpoint, or it is damaged; a lazy tensor isn't compared with its checksums.
    """
    wanted = Wanted(exclude_frozen_parameters=exclude_frozen_parameters)
    elements = wanted.of(Reader(resolve(checkpoint_dir, tag), check_reads=not lazy_mode))
    tensors: dict[Elements, Tensor] = {each: LazyTensor(each) for each in elements.values()}
    if not lazy_mode:
        tensors = {each: tensor.contiguous() for each, tensor in tensors.items()}
    return {name: tensors[each] for name, each in elements.items()}


def load_state_dict_from_zero_checkpoint(model: _Module, checkpoint_dir: PathOrUrl, tag: str | None = None) -> _Module:
    """Fill a plain module in place, each tensor read straight into the parameter's memory.

    Args:
        model: with the names and shapes of the one that was saved; of any dtype, on any device but meta.
        checkpoint_dir: a save directory, or a tag's.
        tag: of the save directory; `latest` decides where it is None.

    Returns:
        The same module.

    Raises:
        TypeError: `model` is no module.
        UnsupportedModelError: a tensor of the module is on the meta device, where there is nothing to fill.
        CheckpointMismatchError: a name or a shape differs.
        ZeroError: there is no such checkpoint, or it is damaged; the module may be filled in part.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"load_state_dict_from_zero_checkpoint fills a module, and takes it first; not {model!r:.80}")
    own = model.state_dict()
    for name, value in own.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise UnsupportedModelError(
                f"{name!r} is on the meta device, and has no memory to read into; call model.to_empty(device=...) first"
            )
    checkpoint = Checkpoint(resolve(checkpoint_dir, tag), check_reads=True)
    tensors_alone = all(isinstance(value, Tensor) for value in own.values())  # else `trainer.pt` has the rest
    state_dict = checkpoint.state_dict() if tensors_alone else checkpoint.lightning_checkpoint()["state_dict"]
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise checkpoint.damage or CheckpointMismatchError(
            f"the checkpoint {checkpoint.directory} is of another model: {error}"
        ) from error
    return model
