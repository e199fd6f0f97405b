"""The random number generators of one process, as plain values and tensors: fast to load, and without pickled code."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def get_random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, CUDA's of this process's device included."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": (version, torch.tensor(internal, device="cpu"), gauss),
        "numpy": (kind, torch.tensor(keys.tolist(), device="cpu"), *rest),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from what `get_random_state` gave, or gave before: lists of numbers in place of tensors."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(torch.as_tensor(internal).tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(torch.as_tensor(keys).tolist(), dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
