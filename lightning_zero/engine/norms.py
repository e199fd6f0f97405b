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
def norms(
    gradients: Sequence[Sequence[Tensor]], collectives: Collectives, device: torch.device, norm_type: float = 2.0
) -> Tensor:
    """The norm of each of several gradients, given this rank's parts of each. A collective.

    Returns:
        A 1-D fp64 tensor with one norm for each, the same on every rank.
    """
    if norm_type <= 0:
        raise ValueError(f"the type of a norm must be positive (inf included), not {norm_type}")
    most = math.isinf(norm_type)
    totals = torch.zeros(len(gradients), dtype=torch.float64, device=device)
    for index, parts in enumerate(gradients):
        if parts:
            local = torch.stack([norm.to(device) for norm in torch._foreach_norm(list(parts), norm_type)]).double()
            totals[index] = local.max() if most else local.pow(norm_type).sum()
    collectives.all_reduce(totals, dist.ReduceOp.MAX if most else dist.ReduceOp.SUM)
    return totals if most else totals.pow(1.0 / norm_type)


@torch.no_grad()
def global_norm(
    gradients: Sequence[Tensor],
    collectives: Collectives,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    norm_type: float = 2.0,
) -> Tensor:
    """The norm of a gradient whose segments lie on all ranks; a 0-d tensor, the same on every rank. A collective."""
    if collectives.world_size == 1 and gradients:
        local = [norm.to(device) for norm in torch._foreach_norm(list(gradients), norm_type)]
        whole: Tensor = torch.linalg.vector_norm(torch.stack(local), norm_type)  # torch's own, bit for bit
        return whole
    return norms([gradients], collectives, device, norm_type)[0].to(dtype)


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
