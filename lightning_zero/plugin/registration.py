"""The strategies' names, registered with Lightning, which has no entry point for them.

A script that converts a checkpoint needs no Lightning (see [Note: names are imported when they are asked for]). So
where it isn't there yet, it is registered with when somebody imports it.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from typing_extensions import override

if TYPE_CHECKING:
    from lightning_zero.plugin.strategy import ZeroStrategy

_LIGHTNING = "lightning.pytorch"
_START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


def register_when_lightning_is_imported() -> None:
    """Register now, if Lightning is imported, and else just after that."""
    if hasattr(sys.modules.get(_LIGHTNING), "Trainer"):
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """An import hook that finds nothing itself, and has the strategies registered as soon as Lightning is imported."""

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _LIGHTNING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_load, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _load(exec_module: Any, module: ModuleType) -> None:
    try:
        exec_module(module)
    except BaseException:  # somebody may import it once more
        register_when_lightning_is_imported()
        raise
    _register()


def _make(**options: Any) -> ZeroStrategy:
    # Not before it is wanted: `lightning_zero.plugin.strategy` may be what has imported Lightning
    from lightning_zero.plugin.strategy import ZeroStrategy

    return ZeroStrategy(**options)


def _register() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    for stage, offloads in itertools.product((1, 2), (False, True)):
        name = f"zero_stage_{stage}_offload" if offloads else f"zero_stage_{stage}"
        what = f"ZeRO stage {stage}, the optimizer in host memory" if offloads else f"ZeRO stage {stage}"
        for suffix, start_method in _START_METHODS.items():
            StrategyRegistry.register(
                name + suffix,
                _make,
                description=f"{what}, processes started by {start_method}: see lightning_zero.ZeroStrategy",
                override=True,
                stage=stage,
                offload_optimizer=offloads,
                start_method=start_method,
            )
