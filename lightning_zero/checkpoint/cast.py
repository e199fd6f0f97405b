"""Elements of one dtype as those of another, in memory: what an export needs torch for."""

from __future__ import annotations

import numpy as np
import torch

from lightning_zero.checkpoint.tensors import DTYPES_BY_CODE

_ONE_THREADS_NUMEL = 24 << 10
"""What torch casts in the thread that asks for it. With more, it wakes a team of threads and waits for the
last of them: where others (a training, say) keep the processors busy, that takes ten times as long as the work."""


def cast(source: memoryview, stored: str, target: memoryview, shown: str) -> bool:
    """Cast some elements, and say whether a finite one became infinite.

    Args:
        source: their bytes.
        stored: the code of their dtype.
        target: where they are written.
        shown: the code of the dtype there.
    """
    before = torch.frombuffer(source, dtype=DTYPES_BY_CODE[stored])
    after = torch.frombuffer(target, dtype=DTYPES_BY_CODE[shown])
    parts = torch.split(before, _ONE_THREADS_NUMEL), torch.split(after, _ONE_THREADS_NUMEL)
    for part, narrow in zip(*parts, strict=True):
        narrow.copy_(part)
    if not (before.is_floating_point() and after.is_floating_point()):
        return False
    if torch.finfo(before.dtype).max <= torch.finfo(after.dtype).max or _all_finite(target, after.dtype):
        return False
    return bool((after.isinf() & before.isfinite()).any())


def _all_finite(content: memoryview, dtype: torch.dtype) -> bool:
    """By the bits: without its sign, an infinite value or a NaN is a larger integer than any other."""
    integer = {2: np.uint16, 4: np.uint32}[dtype.itemsize]
    bits = np.frombuffer(content, integer)
    infinite = torch.tensor([torch.inf], dtype=dtype).view(torch.uint8).numpy().view(integer)[0]
    parts = (bits[begin : begin + _ONE_THREADS_NUMEL] for begin in range(0, len(bits), _ONE_THREADS_NUMEL))
    return all((part << 1).max() < infinite << 1 for part in parts)
