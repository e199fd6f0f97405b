"""What has to be alike on all ranks: what each counts on the others' having, and what training begins with."""

from __future__ import annotations

from collections.abc import Container, Iterable
from itertools import chain

import xxhash
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_zero.checkpoint.tensors import tensor_bytes
from lightning_zero.plugin.ranks import Ranks


def module_lines(module: Module) -> list[str]:
    """Every parameter, and whether it is trained, and every buffer that isn't a rank's own: a line each."""
    lines, ignored = [], ignored_names(module)
    for prefix, part in module.named_modules():
        for name, parameter in part.named_parameters(prefix, recurse=False):
            lines.append(_line(name, parameter, "trained" if parameter.requires_grad else "frozen"))
        for name, buffer in part.named_buffers(prefix, recurse=False):
            if name not in ignored:
                lines.append(_line(name, buffer, "a buffer"))
    return lines


def _line(name: str, tensor: Tensor, kind: str) -> str:
    return f"{name!r} of shape {tuple(tensor.shape)}, {tensor.dtype}, {kind}"


def ignored_names(module: Module) -> Container[str]:
    """Of the parameters and buffers that a user has told DDP to leave alone."""
    ignored: Container[str] = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    return ignored


def give_first_ranks_values(module: Module, ranks: Ranks) -> None:
    """Give every rank the first rank's parameters and buffers, as DDP does it. Called on every rank.

    Of those on the host only what differs is sent: where all ranks have the same seed, or have read one checkpoint,
    nothing. And it goes tensor by tensor, where DDP makes a second copy of 250 MiB at a time.
    """
    named, ignored = chain(module.named_parameters(), module.named_buffers()), ignored_names(module)
    tensors = [tensor.detach() for name, tensor in named if name not in ignored]
    digests = [_digest(tensor) for tensor in tensors]
    everyones = zip(tensors, *ranks.everyones(lambda: [digests]), strict=True)
    ranks.give([tensor for tensor, *theirs in everyones if None in theirs or len(set(theirs)) > 1], 0)


def _digest(tensor: Tensor) -> bytes | None:
    """Of a tensor's bytes; None where they are on a device, from which sending them is faster."""
    if type(tensor) is not Tensor or not tensor.is_cpu or not tensor.is_contiguous():
        return None
    return xxhash.xxh3_128_digest(tensor_bytes(tensor))


def optimizer_lines(optimizers: Iterable[Optimizer], module: Module) -> list[str]:
    """Every parameter of each optimizer, in its order."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [
        f"{names.get(parameter, 'a parameter that is not of the module')!r} in {type(optimizer).__name__}"
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
