"""Modules that were made on the meta device: they get memory, and their layers' own initialisation.

Only what has no memory gets some: weights that are there, as a pretrained backbone's, stay; tied tensors stay tied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy

from lightning_zero.errors import UnsupportedModelError


def materialize(module: Module, device: torch.device) -> set[str]:
    """Give every tensor on the meta device memory, and call `reset_parameters` on the layers that had none at all.

    Returns:
        The names of the tensors that nobody has initialised: a checkpoint must fill them.
    """
    made: dict[int, Tensor] = {}
    keep: list[Tensor] = []  # a meta tensor's id must not be given to another
    uninitialized: set[str] = set()
    blank: list[Callable[[], object]] = []
    for prefix, child in module.named_modules():
        own = dict(itertools.chain(child._parameters.items(), child._buffers.items()))
        without_memory = [name for name, tensor in own.items() if tensor is not None and tensor.is_meta]
        for name in without_memory:
            tensor = own[name]
            assert tensor is not None
            keep.append(tensor)
            if id(tensor) not in made:
                memory: Tensor = torch.empty_like(tensor, device=device)
                if isinstance(tensor, Parameter):
                    memory = Parameter(memory, requires_grad=tensor.requires_grad)
                made[id(tensor)] = memory
            if name in child._parameters:
                child._parameters[name] = made[id(tensor)]
            else:
                child._buffers[name] = made[id(tensor)]
        if without_memory:
            whole = len(without_memory) == sum(tensor is not None for tensor in own.values())
            reset = getattr(child, "reset_parameters", None)
            if whole and callable(reset):
                blank.append(reset)
            else:
                uninitialized |= {f"{prefix}.{name}".lstrip(".") for name in without_memory}
    for reset in blank:
        reset()
    return uninitialized


def require_values(module: Module, uninitialized: Collection[str]) -> None:
    """Make sure that every tensor has memory and values.

    Raises:
        UnsupportedModelError: one hasn't; `uninitialized` names those that have no values.
    """
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor):
            raise UnsupportedModelError(
                f"the tensor {name!r} has no shape yet; run a batch through its lazy module in `configure_model`, "
                "or before fit"
            )
    if uninitialized:
        raise UnsupportedModelError(
            f"{sorted(uninitialized)} were made on the meta device, and nothing gives them values: "
            "give their layer a method reset_parameters() that sets all of its tensors, make them on a real device, or "
            "load a checkpoint that holds them"
        )
