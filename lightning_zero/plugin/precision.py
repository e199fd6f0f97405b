"""Clipping for sharded gradients, in whatever precision plugin Lightning or the user chose.

Lightning picks precision plugins by `isinstance`, and keeps their state under the class's name: so the plugin stays
the object it is, and only its two clipping methods are given to the strategy. A plugin class that brings its own
keeps it.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch.plugins.precision import Precision


def route_clipping(plugin: Precision, by_norm: Callable[..., None], by_value: Callable[..., None]) -> None:
    """Let a precision plugin clip through the given methods, which take (optimizer, clip value)."""
    if type(plugin).clip_grad_by_norm is Precision.clip_grad_by_norm:
        plugin.clip_grad_by_norm = by_norm  # type: ignore[method-assign]
    if type(plugin).clip_grad_by_value is Precision.clip_grad_by_value:
        plugin.clip_grad_by_value = by_value  # type: ignore[method-assign]


def unroute_clipping(plugin: Precision) -> None:
    """Give a precision plugin its own clipping back: it may be used with another strategy next."""
    for name in ("clip_grad_by_norm", "clip_grad_by_value"):
        vars(plugin).pop(name, None)
