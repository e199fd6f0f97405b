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

Each of them is a collective, to be called on every rank. Anything else would need the whole gradient, and is an error
with a way out, never a silent nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_zero.errors import UnsupportedModelError

aten = torch.ops.aten


class Holder(Protocol):
    """Who holds the gradients that stand-ins stand for."""

    def zero(self, name: str) -> None:
        """Set one parameter's gradient to zero."""

    def change(self, name: str, how: Callable[[Tensor], object]) -> None:
        """Apply a function to this rank's part of one parameter's gradient, in place. A collective."""

    def norm(self, name: str, norm_type: float) -> Tensor:
        """The norm of one parameter's whole gradient, 0-d. A collective."""

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
        names = [tensor._name for tensor in _flatten(args) if isinstance(tensor, cls)]
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
        self.pending = addend if self.pending is None else self.pending + addend

    def zero(self) -> None:
        """Set the gradient to zero, whatever of it is pending too."""
        self.pending, self.replaces = None, False
        self._holder.zero(self._name)

    def change(self, how: Callable[[Tensor], object]) -> None:
        """Apply a function to the gradient, in place."""
        self._holder.change(self._name, how)

    def norm_of_all(self, norm_type: float) -> Tensor:
        """The norm of the whole gradient."""
        return self._holder.norm(self._name, norm_type)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PartitionedGradient({self._name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _flatten(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flatten(value)
        else:
            yield value


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
    gradient.change(lambda part: func(part, *operands, **options))
    return gradient


def _foreach(single: Any) -> Callable[..., Any]:
    def change(func: Any, gradients: list[Tensor], operand: Any) -> Any:
        if isinstance(operand, Tensor) and operand.dim():
            return NotImplemented
        for gradient in gradients:
            single(gradient, operand)
        return None

    return change


def _norm(func: Any, gradient: PartitionedGradient, norm_type: float = 2, dim: Any = None, *rest: Any, **_: Any) -> Any:
    if dim is not None or norm_type <= 0:
        return NotImplemented
    return gradient.norm_of_all(float(norm_type))


def _foreach_norm(func: Any, gradients: list[Tensor], norm_type: float = 2, dtype: Any = None) -> list[Tensor]:
    return [torch.linalg.vector_norm(gradient, norm_type, dtype=dtype) for gradient in gradients]


def _unscale(func: Any, gradients: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    ours = [gradient for gradient in gradients if isinstance(gradient, PartitionedGradient)]
    others = [gradient for gradient in gradients if not isinstance(gradient, PartitionedGradient)]
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
    aten._foreach_mul_.Scalar: _foreach(torch.Tensor.mul_),
    aten._foreach_mul_.Tensor: _foreach(torch.Tensor.mul_),
    aten._foreach_div_.Scalar: _foreach(torch.Tensor.div_),
    aten._foreach_div_.Tensor: _foreach(torch.Tensor.div_),
    aten._foreach_clamp_min_.Scalar: _foreach(torch.Tensor.clamp_min_),
    aten._foreach_clamp_max_.Scalar: _foreach(torch.Tensor.clamp_max_),
    aten.linalg_vector_norm.default: _norm,
    aten._foreach_norm.Scalar: _foreach_norm,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
}
