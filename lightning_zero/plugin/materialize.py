"""Modules that were made on the meta device: they get memory, and their layers' own initialisation.

Only what has no memory gets some: weights that are there, as a pretrained backbone's, stay; tied tensors stay tied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module, Parameter


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
