"""Tensors and bytes: how a tensor gives up its bytes, and a tensor whose bytes are still in the checkpoint.

Everything goes piece by piece through a buffer of bounded size, or with none at all where the memory on both sides is
contiguous and of the same dtype. Pages that are touched for the first time cost more than the disk does, so a thread
keeps its buffer.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.manifest import DTYPES
from lightning_zero.errors import UnsupportedModelError

BUFFER_BYTES = 4 << 20

CODES: Mapping[torch.dtype, str] = {
    getattr(torch, name): code for name, (code, _) in DTYPES.items() if hasattr(torch, name)
}
"""Safetensors' code of each dtype."""

DTYPES_BY_CODE: Mapping[str, torch.dtype] = {code: dtype for dtype, code in CODES.items()}

_buffers = threading.local()


def code_of(tensor: Tensor, name: str) -> str:
    """The code of a tensor's dtype.

    Raises:
        UnsupportedModelError: a checkpoint can't hold it: quantized, sparse, or of a dtype that has no code.
    """
    if tensor.layout is not torch.strided or tensor.dtype not in CODES:
        raise UnsupportedModelError(
            f"{name!r} is a {tensor.layout} tensor of {tensor.dtype}; a checkpoint holds dense tensors of "
            f"{', '.join(DTYPES)}. Convert it, or keep it out of the state dict (persistent=False)"
        )
    return CODES[tensor.dtype]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, of any dtype; writing there writes the tensor.

    Not by `numpy()`, which makes a storage of fixed size of it, for ever: a user's, if it is a parameter's.
    """
    flat = tensor.detach().view(-1)
    if not flat.nbytes:
        return memoryview(bytearray())
    memory = (ctypes.c_ubyte * flat.nbytes).from_address(flat.data_ptr())
    memory.owner = flat  # type: ignore[attr-defined]  # lives as long as there is a view of it
    return memoryview(memory).cast("B")


def tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in the order of its elements, in chunks that are each gone when the next is asked for.

    Contiguous CPU memory is given as it is. Another device's and a `LazyTensor`'s comes through one buffer of
    `BUFFER_BYTES`.
    """
    if isinstance(tensor, LazyTensor):
        read: Callable[[int, int, Tensor], object] = tensor.read_range
    else:
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
        if flat.is_cpu:
            whole = tensor_bytes(flat)
            step = 2 * BUFFER_BYTES  # still in the cache when the checksum has gone over it
            yield from (whole[begin : begin + step] for begin in range(0, len(whole), step))
            return

        def read(start: int, stop: int, out: Tensor) -> object:
            return out.copy_(flat[start:stop])

    numel, step = tensor.numel(), BUFFER_BYTES // tensor.dtype.itemsize
    for start in range(0, numel, step):
        count = min(step, numel - start)
        part = _buffer(count, tensor.dtype, "chunks", pinned=tensor.is_cuda)
        read(start, start + count, part)
        yield tensor_bytes(part)


def _buffer(numel: int, dtype: torch.dtype, purpose: str, *, pinned: bool = False) -> Tensor:
    """A tensor in this thread's buffer for one purpose; it is overwritten by the next for the same purpose."""
    name = f"{purpose}_pinned" if pinned else purpose
    memory: Tensor | None = getattr(_buffers, name, None)
    nbytes = numel * dtype.itemsize
    if nbytes > BUFFER_BYTES:
        return torch.empty(numel, dtype=dtype)
    if memory is None:
        memory = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=pinned)
        setattr(_buffers, name, memory)
    return memory[:nbytes].view(dtype)


class LazyTensor(Tensor):
    """A tensor that is still in the checkpoint: it has a shape and a dtype, and reads its bytes when they are wanted.

    `parameter.copy_(lazy)`, which is what `load_state_dict` does, reads straight into the parameter's memory where the
    dtypes agree, and else piece by piece. So loading a model needs no second copy of it. `contiguous()`, `numpy()`,
    `tolist()`, a deep copy and pickling give an ordinary tensor. Any other operation reads the tensor and is done on
    what was read.

    What was read is let go again, with two exceptions, or an edit would be lost: an operation that writes to the tensor
    or gives a view of it keeps the values, and from then on they are the tensor's; and `detach()` turns the object
    itself into an ordinary tensor, since that is how `nn.Parameter(lazy)` (so `load_state_dict(assign=True)`) takes
    a tensor over.
    """

    _elements: Elements
    _kept: Tensor | None

    @staticmethod
    def __new__(cls, elements: Elements) -> LazyTensor:
        """These elements, as torch knows tensors."""
        lazy = torch.Tensor._make_wrapper_subclass(
            cls, elements.shape, dtype=DTYPES_BY_CODE[elements.shown], device=torch.device("cpu")
        )
        lazy._elements = elements
        lazy._kept = None
        return lazy

    @property
    def is_unread(self) -> bool:
        """Whether its values are those in the checkpoint still: nobody has changed them, or taken a view of them."""
        return self._kept is None

    def read_range(self, start: int, stop: int, out: Tensor) -> None:
        """Read the flattened elements `[start, stop)` into `out`.

        Args:
            start: the first element.
            stop: one past the last.
            out: a tensor of `stop - start` elements, of any dtype, device and memory layout.
        """
        if out.numel() != stop - start or not 0 <= start <= stop <= self.numel():
            raise ValueError(f"elements {start} to {stop} of {self.numel()} don't fit a tensor of {out.numel()}")
        if out.is_meta or not out.numel():
            return
        if self._kept is not None:
            out.copy_(self._kept.view(-1)[start:stop].view(out.shape))
            return
        out, source, stored = out.detach(), self._elements.source, DTYPES_BY_CODE[self._elements.stored]
        flat = out.view(-1) if out.is_contiguous() else out
        if out.is_cpu and out.is_contiguous() and out.dtype == self.dtype == stored:
            source.read(start, stop, tensor_bytes(out))
            return
        # By rows: a row is one element of a flat tensor, and a slice along the first dimension of a strided one
        row_numel = flat.numel() // len(flat)
        rows = max(1, BUFFER_BYTES // (row_numel * stored.itemsize))
        for row in range(0, len(flat), rows):
            block = flat[row : row + rows]
            part = _buffer(block.numel(), stored, "range", pinned=out.is_cuda)
            begin = start + row * row_numel
            source.read(begin, begin + part.numel(), tensor_bytes(part))
            block.copy_(part.to(self.dtype).view(block.shape))

    @override
    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """Read it: an ordinary tensor."""
        return self._read().contiguous(memory_format=memory_format)

    def _read(self) -> Tensor:
        if self._kept is not None:
            return self._kept
        self._elements.source.require()
        read = torch.empty(self.shape, dtype=self.dtype)
        self.read_range(0, self.numel(), read.view(-1))
        return read

    def _keep(self) -> Tensor:
        self._kept = self._read()
        return self._kept

    @override
    def detach(self) -> Tensor:
        """Become an ordinary tensor, and give a detached view of it."""
        torch.utils.swap_tensors(self, self._read())  # type: ignore[no-untyped-call]
        return self.detach()

    @override
    def numpy(self, *, force: bool = False) -> npt.NDArray[Any]:
        """Read it into an array."""
        return self._read().numpy(force=force)

    @override
    def tolist(self) -> Any:
        """Read it into nested lists."""
        return self._read().tolist()

    @override
    def __array__(self, dtype: Any = None) -> npt.NDArray[Any]:
        return np.asarray(self._read(), dtype=dtype)

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = copied = self._read().clone()
        return copied

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._read().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @override
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        state = "unread" if self._kept is None else "read"
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    @override
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See the class: `copy_` from a lazy tensor reads into the target, all else works on what was read."""
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], LazyTensor):
            target, lazy = args[:2]
            if target.shape == lazy.shape and lazy._kept is None:
                lazy.read_range(0, lazy.numel(), target)
                return target
        schema = func._schema
        # An argument with alias information is written to, or the result is a view of it
        aliased = {argument.name for argument in schema.arguments if argument.alias_info is not None}
        names = [argument.name for argument in schema.arguments]

        def real(name: str, value: Any) -> Any:
            if isinstance(value, LazyTensor):
                return value._keep() if name in aliased else value._read()
            if isinstance(value, list | tuple):
                return type(value)(real(name, item) for item in value)
            return value

        result = func(
            *(real(name, value) for name, value in zip(names, args, strict=False)),
            **{name: real(name, value) for name, value in (kwargs or {}).items()},
        )
        # x.mul_(2) is x, not the tensor that it keeps
        return next((arg for arg in args if isinstance(arg, LazyTensor) and arg._kept is result), result)
