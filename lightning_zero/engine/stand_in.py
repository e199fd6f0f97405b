"""What stands in `parameter.grad` for a gradient that no rank holds whole, and what can be computed with it.

The stand-in has the gradient's shape and takes no memory. Being there says that the segments hold a gradient, so that
whatever drops or zeroes gradients does what it says. What code commonly does to all gradients is done to the segments:

| done to `parameter.grad`                              | by whom                                             |
|-------------------------------------------------------|-----------------------------------------------------|
| adding, zeroing                                       | backward, `zero_grad(set_to_none=False)`            |
| the norm of all of it                                 | `torch.nn.utils.clip_grad_norm_`, Lightning's       |
|                                                       | `grad_norm`, loggers                                |
| scaling by a number, clamping, replacing non-finites  | `clip_grad_norm_`, `clip_grad_value_`, averaging    |
| unscaling, with a check for infinities                | `torch.amp.GradScaler`, which so agrees on all ranks|

Each of them is a collective, to be called on every rank: one, if it is done to many gradients at once. Anything else
would need the whole gradient, and is an error with a way out, never a silent nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_zero.errors import UnsupportedModelError

aten = torch.ops.aten


class Holder(Protocol):
    """Who holds the gradients that stand-ins stand for."""

    def zero(self, name: str) -> None:
        """Set one parameter's gradient to zero."""

    def change(self, names: Sequence[str], how: Callable[[list[Tensor]], object]) -> None:
        """Apply a function to this rank's parts of some parameters' gradients, in place. A collective."""

    def norms(self, names: Sequence[str], norm_type: float) -> list[Tensor]:
        """The norms of some parameters' whole gradients, each 0-d. A collective."""

    def unscale(self, names: Sequence[str], found_inf: Tensor, inv_scale: Tensor) -> None:
        """Multiply gradients by `inv_scale`; `found_inf` becomes 1 on all ranks if one has found an infinity."""


class PartitionedGradient(torch.Tensor):
    """The stand-in for one parameter's gradient."""

    pending: Tensor | None
    """What backward has accumulated onto the stand-in, and its bucket has not taken yet."""

    replaces: bool
    """What is pending takes the place of what the segments hold: that was dropped before it came."""

    tentative: bool
    """This rank has had no gradient; whether another has is not known yet."""

    _name: str
    _holder: Holder

    @staticmethod
    def of(name: str, parameter: Tensor, holder: Holder) -> PartitionedGradient:
        """The stand-in for the gradient of `parameter`."""
        gradient: PartitionedGradient = torch.Tensor._make_wrapper_subclass(
            PartitionedGradient,
            parameter.shape,
            dtype=parameter.dtype,
            device=parameter.device,
            strides=parameter.stride(),
        )
        gradient.pending, gradient.replaces, gradient.tentative = None, False, False
        gradient._name, gradient._holder = name, holder
        return gradient

    # What is computed with a stand-in is an ordinary tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        operation = _OPERATIONS.get(func)
        result = NotImplemented if operation is None else operation(func, *args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        names = [tensor._name for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, cls)]
        raise UnsupportedModelError(
            f"the gradient of {names[0]!r} is partitioned over the ranks; no rank holds it whole, and {func} can't "
            "be done with it. self.trainer.strategy.full_grad(parameter) puts it together, on every rank; "
            "strategy.grad_norm() is the global norm, strategy.clip_grad_norm_(max_norm) clips by it, and "
            "strategy.segments(optimizer) gives what this rank owns"
        )

    def accumulate(self, other: Tensor | float, alpha: float) -> None:
        """Add to what is pending."""
        addend = torch.as_tensor(other, dtype=self.dtype, device=self.device)
        addend = addend.to_dense() if addend.is_sparse else addend.expand(self.shape)
        if alpha != 1:
            addend = addend * alpha
        elif torch._C._current_graph_task_id() < 0:  # not backward, but somebody who may use the memory again
            addend = addend.clone()
        self.pending = addend if self.pending is None else self.pending + addend

    def zero(self) -> None:
        """Set the gradient to zero, whatever of it is pending too."""
        self.pending, self.replaces = None, False
        self._holder.zero(self._name)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PartitionedGradient({self._name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _add(func: Any, gradient: Any, other: Any, alpha: float = 1) -> Any:
    if not isinstance(gradient, PartitionedGradient):
        return NotImplemented
    gradient.accumulate(other, alpha)
    return gradient


def _zero(func: Any, gradient: PartitionedGradient) -> Any:
    gradient.zero()
    return gradient


def _foreach_zero(func: Any, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        gradient.zero() if isinstance(gradient, PartitionedGradient) else gradient.zero_()


def _itself(func: Any, gradient: PartitionedGradient) -> Any:
    return gradient


def _change(func: Any, gradient: Any, *operands: Any, **options: Any) -> Any:
    whole = [value for value in (*operands, *options.values()) if isinstance(value, Tensor) and value.dim()]
    if whole or not isinstance(gradient, PartitionedGradient):
        return NotImplemented
    gradient._holder.change([gradient._name], lambda parts: [func(part, *operands, **options) for part in parts])
    return gradient


def _norm(func: Any, gradient: PartitionedGradient, norm_type: float = 2, dim: Any = None, *rest: Any, **_: Any) -> Any:
    if dim is not None or norm_type <= 0:
        return NotImplemented
    return gradient._holder.norms([gradient._name], float(norm_type))[0]


def _divided(gradients: Sequence[Tensor]) -> tuple[list[PartitionedGradient], list[Tensor]]:
    """Stand-ins, and what is none."""
    ours = [gradient for gradient in gradients if isinstance(gradient, PartitionedGradient)]
    return ours, [gradient for gradient in gradients if not isinstance(gradient, PartitionedGradient)]


def _foreach_change(func: Any, gradients: Sequence[Tensor], operand: Any) -> Any:
    ours, others = _divided(gradients)
    if not ours or (isinstance(operand, Tensor) and operand.dim()):
        return NotImplemented
    if others:
        func(others, operand)
    ours[0]._holder.change([gradient._name for gradient in ours], lambda parts: func(parts, operand))
    return None


def _foreach_norm(func: Any, gradients: Sequence[Tensor], norm_type: float = 2, **options: Any) -> Any:
    if norm_type <= 0:
        return NotImplemented
    ours, others = _divided(gradients)
    held = iter(ours[0]._holder.norms([gradient._name for gradient in ours], float(norm_type)))
    whole = iter(func(others, norm_type, **options) if others else ())
    return [next(held if isinstance(gradient, PartitionedGradient) else whole) for gradient in gradients]


def _unscale(func: Any, gradients: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    ours, others = _divided(gradients)
    if others:
        func(others, found_inf, inv_scale)
    ours[0]._holder.unscale([gradient._name for gradient in ours], found_inf, inv_scale)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.add_.Tensor: _add,
    aten.zero_.default: _zero,
    aten._foreach_zero_.default: _foreach_zero,
    aten.detach.default: _itself,
    aten.detach_.default: _itself,
    aten.alias.default: _itself,
    aten.mul_.Tensor: _change,
    aten.mul_.Scalar: _change,
    aten.div_.Tensor: _change,
    aten.div_.Scalar: _change,
    aten.clamp_.default: _change,
    aten.clamp_min_.default: _change,
    aten.clamp_max_.default: _change,
    aten.nan_to_num_.default: _change,
    aten._foreach_mul_.Scalar: _foreach_change,
    aten._foreach_mul_.Tensor: _foreach_change,
    aten._foreach_div_.Scalar: _foreach_change,
    aten._foreach_div_.Tensor: _foreach_change,
    aten._foreach_clamp_min_.Scalar: _foreach_change,
    aten._foreach_clamp_max_.Scalar: _foreach_change,
    aten.linalg_vector_norm.default: _norm,
    aten._foreach_norm.Scalar: _foreach_norm,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
}
