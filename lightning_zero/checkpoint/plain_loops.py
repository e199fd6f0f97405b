"""Lightning's loops in a training checkpoint, as any other strategy can resume them; and those of another's training.

The states of data loaders in them (of torchdata's `StatefulDataLoader`s) have two things of a ZeroStrategy's own, which
are taken out, by copying: a checkpoint's own dict stays as it is.
"""

from __future__ import annotations

from typing import Any

_SAMPLER_STATE = "sampler_state"
_OURS = {"epoch", "yielded"}
"""What a ZeroStrategy adds for a distributed sampler that has no state: no other strategy's sampler takes it."""


def plain_loops(loops: Any) -> Any:
    """The loops' state for another strategy.

    A sampler without a state of its own is then advanced to where it was: what Lightning injects has its order from the
    seed and the epoch. The state of a loader that was saved with an epoch's last batch is left out, since the next
    epoch begins anew, and Lightning would go through what is left of that one first: nothing, for a whole epoch.
    """
    fit = loops.get("fit_loop") if isinstance(loops, dict) else None
    data = fit.get("state_dict") if isinstance(fit, dict) else None
    if not isinstance(fit, dict) or not isinstance(data, dict) or not isinstance(data.get("combined_loader"), list):
        return loops
    loaders = data["combined_loader"]
    stateful = all(isinstance(state, dict) and "_iterator_finished" in state for state in loaders)
    batches = fit.get("epoch_loop.batch_progress")
    if stateful and isinstance(batches, dict) and batches.get("is_last_batch"):
        data = {key: value for key, value in data.items() if key != "combined_loader"}
    else:
        data = {**data, "combined_loader": [_without_ours(state) for state in loaders]}
    return {**loops, "fit_loop": {**fit, "state_dict": data}}


def loops_after(steps: int) -> dict[str, Any]:
    """The loops' state of a training of which nothing is known but how many steps it has made.

    It goes on with the next step, at the beginning of its first epoch.
    """
    none, made = {"ready": 0, "completed": 0}, {"ready": steps, "completed": steps}
    optimizer = {
        "step": {"total": made, "current": none},
        "zero_grad": {"total": {**made, "started": steps}, "current": {**none, "started": 0}},
    }
    return {
        "fit_loop": {
            "epoch_loop.state_dict": {"_batches_that_stepped": steps},
            "epoch_loop.automatic_optimization.optim_progress": {"optimizer": optimizer},
            "epoch_loop.manual_optimization.optim_step_progress": {"total": made, "current": none},
        }
    }


def _without_ours(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    return {
        key: _without_ours(value)
        for key, value in state.items()
        if not (key == _SAMPLER_STATE and isinstance(value, dict) and value.keys() >= _OURS)
    }
