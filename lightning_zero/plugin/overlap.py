"""When the gather of a step may go on beside the next forward, and who waits for it before then.

Between a step and the next forward, Lightning calls hooks of the user's. So what is under way is waited for before
any of those that mark the end of something (an epoch, a validation, the fit): this callback stands first among the
Trainer's. `on_train_batch_end` and `on_train_batch_start` come with every batch, and waiting there would leave nothing
of the overlap: where one of those is somebody's own, there is none, and a line in the log says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.nn import Module
from typing_extensions import override

if TYPE_CHECKING:
    from lightning_zero.plugin.strategy import ZeroStrategy

_WITH_EVERY_BATCH = ("on_train_batch_end", "on_train_batch_start")
_OF_THE_MODULE = (
    *_WITH_EVERY_BATCH,
    "optimizer_step",
    "lr_scheduler_step",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_validation_model_eval",  # comes before `on_validation_start`
)
"""What a module may have of its own between a step and the next forward."""
_LOOK_AT_NO_PARAMETERS = tuple(
    f"lightning.pytorch.callbacks.{name}"
    for name in (
        "callback",
        "device_stats_monitor",
        "early_stopping",
        "lr_monitor",
        "model_checkpoint",
        "model_summary",
        "on_exception_checkpoint",
        "progress",
        "rich_model_summary",
        "throughput_monitor",
        "timer",
    )
)
"""Where Lightning's own callbacks are that leave parameters alone, or, to save them, ask the strategy."""


class GatherOverlap(Callback):
    """Begins the overlap when training starts, if nothing is in its way."""

    @classmethod
    def install(cls, trainer: Trainer, *, wanted: bool) -> None:
        """Put one before the Trainer's other callbacks, or take away that of an earlier fit."""
        others = [callback for callback in _callbacks(trainer) if not isinstance(callback, cls)]
        trainer.callbacks = [cls(), *others] if wanted else others  # type: ignore[attr-defined]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        obstacle = _obstacle(trainer, pl_module)
        if obstacle is None:
            _strategy(trainer).begin_overlap()
        else:
            rank_zero_info(f"overlap_gather has no effect: {obstacle}")

    # What ends something, and what begins something that isn't a training step

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _strategy(trainer).wait_for_parameters()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _strategy(trainer).wait_for_parameters()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _strategy(trainer).wait_for_parameters()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _strategy(trainer).wait_for_parameters()


def _strategy(trainer: Trainer) -> ZeroStrategy:
    return cast("ZeroStrategy", trainer.strategy)


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _obstacle(trainer: Trainer, module: LightningModule) -> str | None:
    if not module.automatic_optimization:
        return "with manual optimization, anything may read parameters after a step"
    for name in _OF_THE_MODULE:
        if not _home(module, name).startswith("lightning.pytorch.core."):
            return f"{type(module).__name__}.{name} may look at parameters after each step"
    for callback in _callbacks(trainer):
        for name in _WITH_EVERY_BATCH:
            if not _home(callback, name).startswith((*_LOOK_AT_NO_PARAMETERS, "lightning_zero.")):
                return f"{type(callback).__name__}.{name} may look at parameters after each step"
    compiled = next((name for name, child in module.named_modules() if _is_compiled(child)), None)
    if compiled is not None:
        return f"{compiled or type(module).__name__!r} is compiled, and would not notice a hook"
    return None


def _home(instance: object, method: str) -> str:
    """The Python module that an instance has a method from; none, if it was set on the instance."""
    if method in vars(instance):
        return ""
    return next(kind.__module__ for kind in type(instance).__mro__ if method in vars(kind))


def _is_compiled(module: Module) -> bool:
    ways = ("_orig_mod", "_compiled_call_impl", "_compiler_ctx")  # torch's two, and Lightning's
    return any(getattr(module, way, None) is not None for way in ways)
