"""What all ranks have to make alike, since each counts on the others' having it: a line each, to be compared."""

from __future__ import annotations

from collections.abc import Iterable

from torch.nn import Module
from torch.optim import Optimizer


def module_lines(module: Module) -> list[str]:
    """Every parameter, and whether it is trained."""
    return [
        f"{name!r} of shape {tuple(p.shape)}, {p.dtype}, {'trained' if p.requires_grad else 'frozen'}"
        for name, p in module.named_parameters()
    ]


def optimizer_lines(optimizers: Iterable[Optimizer], module: Module) -> list[str]:
    """Every parameter of each optimizer, in its order."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [
        f"{names.get(parameter, 'a parameter that is not of the module')!r} in {type(optimizer).__name__}"
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
