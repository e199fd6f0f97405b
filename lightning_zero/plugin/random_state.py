"""The random number generators of one process, as plain values and tensors: fast to load, and without pickled code."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def get_random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, CUDA's of this process's device included."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": (version, _stored(internal), gauss),
        "numpy": (kind, _stored(keys), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from what `get_random_state` gave, or gave before: lists of numbers in place of tensors."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(_words(internal).tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, _words(keys), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _stored(words: Any) -> Tensor:
    """Numbers of 32 bits as a tensor; torch's own unsigned ones aren't loaded by every torch."""
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


def _words(stored: Any) -> Any:
    """The numbers again, or what was a list of them before."""
    return stored.numpy().view(np.uint32) if isinstance(stored, Tensor) else np.array(stored, dtype=np.uint32)
