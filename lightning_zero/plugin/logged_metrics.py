"""What `self.log` has gathered on one rank: a resumed epoch's averages go on, and callbacks find what they monitor.

Lightning begins both anew. So an average over an epoch that was resumed in its middle would be one over its rest, as
would be what is decided by it: a plateau's learning rate, an early stop, the best checkpoints. And until a metric is
logged again, whoever monitors it may end the training for want of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
from torch import Tensor
from typing_extensions import override

_LATEST = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
"""Where Lightning's connector has each metric's latest value, by its name."""
_SUMS = ("value", "cumulated_batch_size")


def get_logged(trainer: Trainer) -> dict[str, Any]:
    """The latest values, and this epoch's sums so far, as plain values and tensors on the CPU."""
    connector = trainer._logger_connector
    return {
        "latest": {
            name: {key: _plain(value) for key, value in getattr(connector, name).items() if _is_plain(value)}
            for name in _LATEST
        },
        "sums": {
            key: {name: _plain(getattr(metric, name)) for name in _SUMS if hasattr(metric, name)}
            for key, metric in trainer.fit_loop.epoch_loop._results.items()
            if metric.is_tensor and metric.meta.on_epoch and not metric.has_reset
        },
    }


def set_logged(trainer: Trainer, logged: Mapping[str, Any], *, in_mid_epoch: bool) -> None:
    """Let a training that is about to go on have them; the sums, if it goes on in their epoch."""
    device = trainer.strategy.root_device
    for name in _LATEST:
        current = getattr(trainer._logger_connector, name)
        for key, value in logged.get("latest", {}).get(name, {}).items():
            current.setdefault(key, value.to(device) if isinstance(value, Tensor) else value)
    if in_mid_epoch:
        loop = trainer.fit_loop.epoch_loop
        loop._results = _GoingOn(loop._results, logged.get("sums", {}))


class _GoingOn(_ResultCollection):
    """Lets a metric begin with what was gathered before, when it is logged for the first time in the resumed epoch."""

    def __init__(self, before: _ResultCollection, sums: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(training=True)
        self.update(before)
        self._sums = dict(sums)

    @override
    def __setitem__(self, key: str, metric: _ResultMetric) -> None:
        super().__setitem__(key, metric)
        for name, value in self._sums.pop(key, {}).items():
            if metric.is_tensor and hasattr(metric, name):
                setattr(metric, name, value)

    @override
    def reset(self, metrics: bool | None = None, fx: str | None = None) -> None:
        super().reset(metrics, fx)
        if metrics is None and fx is None:  # the epoch is over
            self._sums.clear()


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor | float | int)


def _plain(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
