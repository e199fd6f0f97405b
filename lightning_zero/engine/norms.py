"""The global gradient norm, and clipping, over segments.

Each element is owned by one rank, so that the sum over the ranks counts every parameter once, tied ones included.
The coefficient is the same on every rank. As `torch.nn.utils.clip_grad_norm_`, which this follows, says it:
`max_norm / (norm + 1e-6)`, and never more than 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_zero.engine.collectives import Collectives


@torch.no_grad()
def global_norm(
    gradients: Sequence[Tensor], collectives: Collectives, device: torch.device, norm_type: float = 2.0
) -> Tensor:
    """The norm of a gradient whose segments lie on all ranks; a 0-d tensor, the same on every rank."""
    norms = [norm.to(device) for norm in torch._foreach_norm(list(gradients), norm_type)] if gradients else []
    if collectives.world_size == 1 and norms:
        whole: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)  # torch's own, bit for bit
        return whole
    local = torch.stack(norms).double() if norms else torch.zeros(1, dtype=torch.float64, device=device)
    if math.isinf(norm_type):
        total = local.max()
        collectives.all_reduce(total, dist.ReduceOp.MAX)
        return total.float()
    total = local.pow(norm_type).sum()
    collectives.all_reduce(total, dist.ReduceOp.SUM)
    return total.pow(1.0 / norm_type).float()


@torch.no_grad()
def scale_to_norm_(gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their norm, which is `norm`, is `max_norm` at most."""
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    if gradients:
        torch._foreach_mul_(list(gradients), coefficient.to(gradients[0].device))


@torch.no_grad()
def clip_values_(gradients: Iterable[Tensor], clip_value: float) -> None:
    """Clamp every element of the gradients in place to `[-clip_value, clip_value]`."""
    for gradient in gradients:
        gradient.clamp_(-clip_value, clip_value)
