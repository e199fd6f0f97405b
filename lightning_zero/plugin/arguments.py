"""What users write when they make a strategy: dtypes by name, and arguments that only other strategies have."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

_ELSEWHERE = {
    "gradient_as_bucket_view": "gradients have their buckets here in any case",
    "static_graph": "nothing here depends on the graph; leave it out",
    "bucket_cap_mb": "it is called bucket_size_mb here",
    "ddp_comm_hook": "gradients can travel in another dtype by reduce_dtype",
    "ddp_comm_state": "gradients can travel in another dtype by reduce_dtype",
    "ddp_comm_wrapper": "gradients can travel in another dtype by reduce_dtype",
    "model_averaging_period": "post-local SGD keeps a whole optimizer on every rank; use DDPStrategy for it",
    "config": "what DeepSpeed's JSON holds are arguments of the Trainer and of ZeroStrategy here",
}
"""What users of other strategies pass, and what they find here instead."""


def refuse_unknown(unknown: Mapping[str, Any], valid: Iterable[str]) -> None:
    """Say what to write instead of an argument that isn't known.

    Raises:
        TypeError: there is one.
    """
    valid = list(valid)
    hints = []
    for name in unknown:
        close = difflib.get_close_matches(name, valid, n=1)
        instead = _ELSEWHERE.get(name) or (f"did you mean {close[0]!r}?" if close else None)
        hints.append(f"{name!r}" + (f" ({instead})" if instead else ""))
    if hints:
        raise TypeError(f"ZeroStrategy has no argument {', '.join(hints)}; it takes {', '.join(valid)}")


def floating_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by its name.

    Raises:
        ValueError: it isn't a floating-point dtype.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f'reduce_dtype must be a floating-point dtype such as "float32", not {name!r}')
    return dtype
