"""What torchmetrics have accumulated on one rank, so that an epoch's result is whole after a resume in its middle.

A metric's state is a rank's own, and no parameter or buffer: a stock checkpoint holds rank 0's at best. Here each rank
saves its own, and finds it again. On another number of ranks, states are merged as the metric itself merges them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum

from lightning_zero.plugin.loader_state import is_at_epochs_end

MetricState = dict[str, Any]
"""The metric's states by their names, and under `_UPDATES` how many updates are in them."""

_UPDATES = "update_count"

_PLAIN = "plain"
_WRAPPERS_OWN = ("_num_vals_seen", "min_val", "max_val")
"""What `Running` and `MinMaxMetric` keep in plain attributes."""

_MERGED = {dim_zero_sum, dim_zero_max, dim_zero_min, dim_zero_cat}
"""Reductions over ranks that give the same in any grouping."""


def get_metric_states(module: Module, *, without: Sequence[Metric] = ()) -> dict[str, MetricState]:
    """The states of a module's metrics, by the metrics' names.

    Args:
        module: the module.
        without: metrics that are about to be reset, and so have nothing to go on from.
    """
    skipped = {id(metric) for metric in without}
    return {
        name: {
            _UPDATES: metric.update_count,
            "states": {key: _copied(getattr(metric, key)) for key in metric._defaults},
            _PLAIN: {key: _copied(vars(metric)[key]) for key in _WRAPPERS_OWN if key in vars(metric)},
        }
        for name, metric in _metrics(module)
        if id(metric) not in skipped and _is_loadable([getattr(metric, key) for key in metric._defaults], name)
    }


def set_metric_states(
    module: Module,
    of_ranks: Sequence[dict[str, MetricState]],
    of_first: Mapping[str, MetricState],
    *,
    on_more_ranks: bool = False,
) -> None:
    """Let a module's metrics go on from what one or several ranks have saved.

    Args:
        module: the module.
        of_ranks: what each of these ranks had; none where there were fewer ranks then than there are now.
        of_first: what the first rank had; metrics that aren't in it are left as they are.
        on_more_ranks: there were fewer.
    """
    named = [(name, metric) for name, metric in _metrics(module) if name in of_first]
    if lost := of_first.keys() - {name for name, _ in named}:
        rank_zero_warn(f"the module has no metrics {sorted(lost)} any more, of which the checkpoint has states")
    for _, metric in named:
        metric.reset()  # all of them first: a metric that wraps another resets that too
    for name, metric in named:
        filled = False
        for state in (states[name] for states in of_ranks):
            if not (state[_UPDATES] or state[_PLAIN]):
                continue  # this rank had seen nothing
            values = _copied(state["states"], metric.device)
            if not _fits(values, metric):
                rank_zero_warn(
                    f"{type(metric).__name__} {name!r} has states of other shapes in the checkpoint: it starts anew"
                )
                break
            if not filled:
                filled = True
                vars(metric).update(_copied(state[_PLAIN], metric.device))
                for key, value in values.items():
                    setattr(metric, key, value)
            elif not state[_PLAIN] and set(metric._reductions.values()) <= _MERGED:
                metric._reduce_states(values)
            else:
                rank_zero_warn(
                    f"{type(metric).__name__} {name!r} can't be merged: what the checkpoint's other ranks had of this "
                    "epoch is lost. Resume on the same number of ranks to keep it"
                )
                break
            metric._update_count += state[_UPDATES]
        if on_more_ranks:
            _let_lists_be_gathered(metric, of_first[name]["states"])


def finished_metrics(module: LightningModule, loops: Mapping[str, Any]) -> list[Metric]:
    """Metrics whose epoch is over, and which are about to be reset: Lightning resets those that were logged.

    A save with an epoch's last batch comes before whatever the module does with its metrics when the epoch ends,
    which a resumed run doesn't do: it begins the next one. Only those that are to persist are then kept.

    Args:
        module: of a fit.
        loops: `checkpoint["loops"]`.
    """
    at_epochs_end = is_at_epochs_end(loops)
    if at_epochs_end:
        epoch = loops["fit_loop"]["epoch_progress"]["current"]
        if epoch["processed"] == epoch["completed"]:
            return [metric for _, metric in _metrics(module) if not any(metric._persistent.values())]
    loop = module.trainer.fit_loop.epoch_loop
    results = [loop.val_loop._results, *([loop._results] if at_epochs_end else ())]
    return [metric.value for result in results for metric in result.values() if not metric.is_tensor]


def _metrics(module: Module) -> Iterator[tuple[str, Metric]]:
    # `isinstance` asks every class of torchmetrics, for each new class of module: 2 ms of the first save
    return ((name, child) for name, child in module.named_modules() if Metric in type(child).__mro__)


def _let_lists_be_gathered(metric: Metric, of_first: Mapping[str, Any]) -> None:
    """Have a rank's lists be joined with others', though it had nothing, and may see no batch of this epoch.

    torchmetrics gathers an empty list as one of fp32 numbers, and a single number by another collective than several.
    """
    for key, values in of_first.items():
        is_joined = metric._reductions.get(key) is dim_zero_cat and isinstance(getattr(metric, key), list)
        if not is_joined or not isinstance(values, list) or not all(isinstance(value, Tensor) for value in values):
            continue
        own = getattr(metric, key) or [value.new_empty((0, *value.shape[1:])) for value in values[:1]]
        setattr(metric, key, [value.to(metric.device).reshape(value.shape or 1) for value in own])


def _fits(values: Mapping[str, Any], metric: Metric) -> bool:
    def alike(value: Any, default: Any) -> bool:
        whole = isinstance(value, Tensor) and isinstance(default, Tensor) and default.numel() > 1
        return not whole or value.shape == default.shape

    defaults = metric._defaults
    return values.keys() == defaults.keys() and all(alike(value, defaults[key]) for key, value in values.items())


def _is_loadable(value: Any, name: str) -> bool:
    """Whether a metric's states can be read again without running code."""
    if isinstance(value, (list, tuple)):
        return all(_is_loadable(item, name) for item in value)
    if isinstance(value, dict):
        return all(_is_loadable(item, name) for item in value.values())
    loadable = isinstance(value, (Tensor, bool, int, float, str, bytes, type(None)))
    if not loadable:
        rank_zero_warn(f"the metric {name!r} has a {type(value).__name__} in its states: a checkpoint leaves it out")
    return loadable


def _copied(value: Any, device: torch.device | None = None) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device or "cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, device) for item in value)
    return value
