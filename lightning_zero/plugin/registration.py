"""Importing this registers the strategies' names with Lightning, which has no entry point for them."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_zero.plugin.strategy import ZeroStrategy

for _stage in (1, 2):
    StrategyRegistry.register(
        f"zero_stage_{_stage}",
        ZeroStrategy,
        description=f"ZeRO stage {_stage}: see lightning_zero.ZeroStrategy",
        override=True,
        stage=_stage,
    )
