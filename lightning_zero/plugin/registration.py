"""Importing this registers the strategies' names with Lightning, which has no entry point for them."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_zero.plugin.strategy import ZeroStrategy

_START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}

for _stage in (1, 2):
    for _suffix, _start_method in _START_METHODS.items():
        StrategyRegistry.register(
            f"zero_stage_{_stage}{_suffix}",
            ZeroStrategy,
            description=f"ZeRO stage {_stage}, processes started by {_start_method}: see lightning_zero.ZeroStrategy",
            override=True,
            stage=_stage,
            start_method=_start_method,
        )
