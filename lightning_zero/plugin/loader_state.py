"""The state of resumable data loaders, where a checkpoint was saved at the last batch of an epoch.

Lightning stops asking a loader when it has had its number of batches, so a `torchdata` loader never learns that its
epoch is over. Resumed from that state it gives nothing more, and Lightning goes through a whole epoch without a batch.
(Measured with Lightning 2.6 and torchdata 0.11, with stock DDP too.)
"""

from __future__ import annotations

from typing import Any


def finish_epochs(loops: dict[str, Any]) -> None:
    """If the fit loop's state is that of an epoch's last batch, let its loaders begin the next epoch.

    A state without a generator says nothing but how far the epoch was, and is dropped. One with a generator, which
    the next epoch's order is drawn from, is kept and marked as finished.

    Args:
        loops: `checkpoint["loops"]`; changed in place.
    """
    fit = loops.get("fit_loop", {})
    states = fit.get("state_dict", {}).get("combined_loader", [])
    if not fit.get("epoch_loop.batch_progress", {}).get("is_last_batch"):
        return
    if not all(isinstance(state, dict) and "_iterator_finished" in state for state in states):
        return  # somebody else's loader, which knows for itself
    if any(_has_generator(state) for state in states):
        for state in states:
            state["_iterator_finished"] = True
            _rewind_samplers(state)
    else:
        fit["state_dict"].pop("combined_loader", None)


def _has_generator(state: dict[str, Any]) -> bool:
    return "generator" in state or any(_has_generator(value) for value in state.values() if isinstance(value, dict))


def _rewind_samplers(state: dict[str, Any]) -> None:
    # A finished iterator is replaced by a new one, but a sampler with a state of its own would skip as before.
    for key, value in state.items():
        if key == "sampler_state" and isinstance(value, dict) and "yielded" in value:
            value["yielded"] = 0
        elif isinstance(value, dict):
            _rewind_samplers(value)
