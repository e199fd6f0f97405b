"""Bytes of tensors, and tensors that are still in a checkpoint."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from lightning_zero.checkpoint import tensors
from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.tensors import CODES, LazyTensor, code_of, tensor_bytes, tensor_chunks
from lightning_zero.errors import UnsupportedModelError


class Source:
    """Reads from a tensor, and counts the elements that were read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.elements = 0

    def require(self) -> None:
        pass

    def read(self, start: int, stop: int, target: memoryview) -> None:
        self.elements += stop - start
        target[:] = tensor_bytes(self.tensor.view(-1)[start:stop])


def lazy(tensor: Tensor, dtype: torch.dtype | None = None) -> tuple[LazyTensor, Source]:
    source = Source(tensor)
    return LazyTensor(Elements(source, tuple(tensor.shape), CODES[tensor.dtype], CODES[dtype or tensor.dtype])), source


@pytest.mark.parametrize("dtype", CODES)
def test_the_bytes_of_every_dtype(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype).view(2, 3)
    assert len(tensor_bytes(tensor)) == 6 * dtype.itemsize
    copied = torch.zeros(2, 3).to(dtype)
    tensor_bytes(copied)[:] = tensor_bytes(tensor)
    assert tensor_bytes(copied) == tensor_bytes(tensor)
    assert len(tensor_bytes(torch.ones(()).to(dtype))) == dtype.itemsize


def test_a_tensor_that_no_checkpoint_holds_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'w' is a torch\.sparse_coo tensor"):
        code_of(torch.eye(2).to_sparse(), "w")


def test_a_lazy_tensor_has_a_shape_and_reads_nothing() -> None:
    tensor, source = lazy(torch.randn(3, 4))
    assert isinstance(tensor, Tensor)
    assert (tensor.shape, tensor.dtype, tensor.numel(), len(tensor)) == ((3, 4), torch.float32, 12, 3)
    assert "unread" in repr(tensor)
    moved = move_data_to_device({"x": [tensor]}, torch.device("cpu"))
    assert moved["x"][0] is tensor
    assert source.elements == 0


def test_loading_a_module_reads_each_tensor_once_into_its_place() -> None:
    weight = torch.randn(5, 7)
    tensor, source = lazy(weight)
    module = torch.nn.Linear(7, 5, bias=False)
    place = module.weight.data_ptr()
    module.load_state_dict({"weight": tensor})
    assert torch.equal(module.weight, weight)
    assert module.weight.data_ptr() == place
    assert source.elements == 35
    with pytest.raises(RuntimeError, match="size mismatch"):
        torch.nn.Linear(3, 3, bias=False).load_state_dict({"weight": tensor})


def test_a_module_on_the_meta_device_takes_it_over_as_an_ordinary_parameter() -> None:
    weight = torch.randn(5, 7)
    tensor, _ = lazy(weight)
    with torch.device("meta"):
        module = torch.nn.Linear(7, 5, bias=False)
    module.load_state_dict({"weight": tensor}, assign=True)
    assert isinstance(module.weight, torch.nn.Parameter)
    assert not isinstance(module.weight, LazyTensor)
    module(torch.ones(2, 7)).sum().backward()
    assert torch.equal(module.weight, weight)
    assert module.weight.grad is not None


def test_ordinary_tensors_come_out_of_it() -> None:
    real = torch.randn(3, 4)
    stream = io.BytesIO()
    torch.save({"x": lazy(real)[0]}, stream)
    stream.seek(0)
    for read in (
        lazy(real)[0].contiguous(),
        lazy(real)[0].clone(),
        copy.deepcopy([lazy(real)[0]])[0],
        torch.load(stream, weights_only=True)["x"],
        torch.from_numpy(lazy(real)[0].numpy()),
        torch.tensor(lazy(real)[0].tolist()),
        torch.from_numpy(np.asarray(lazy(real)[0])),
        lazy(real)[0].to("cpu", copy=True),
        lazy(real)[0].detach(),
        lazy(real)[0].data,
    ):
        assert type(read) is Tensor
        assert torch.equal(read, real)


def test_any_operation_works_on_what_was_read() -> None:
    real = torch.randn(3, 4)
    tensor, _ = lazy(real)
    assert torch.equal(tensor, real)
    assert torch.equal(real + tensor, real + real)
    assert torch.equal(torch.cat([tensor, real]), torch.cat([real, real]))
    assert torch.equal(torch.stack(list(tensor)), real)
    assert tensor.sum().item() == real.sum().item()


def test_an_edit_is_not_lost() -> None:
    real = torch.randn(3, 4)
    tensor, _ = lazy(real)
    assert tensor.mul_(2) is tensor
    tensor[1] = 7
    tensor.view(-1)[0].zero_()
    expected = real * 2
    expected[1] = 7
    expected[0, 0] = 0
    target = torch.empty(3, 4)
    target.copy_(tensor)
    assert torch.equal(target, expected)
    tensor.read_range(2, 5, target := torch.empty(3))
    assert torch.equal(target, expected.view(-1)[2:5])


@given(
    data=st.data(),
    shape=st.lists(st.integers(0, 5), max_size=3),
    stored=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    shown=st.sampled_from([None, torch.float32, torch.float64]),
    target=st.sampled_from([torch.float32, torch.float64, torch.float16]),
)
def test_a_range_is_read_into_any_dtype_and_layout(
    data: st.DataObject, shape: list[int], stored: torch.dtype, shown: torch.dtype | None, target: torch.dtype
) -> None:
    real = torch.arange(torch.Size(shape).numel()).view(shape).to(stored)
    whole = torch.empty(shape, dtype=target)
    if data.draw(st.booleans()):
        whole = torch.empty([*reversed(shape)], dtype=target).permute([*reversed(range(len(shape)))])
    old, tensors.BUFFER_BYTES = tensors.BUFFER_BYTES, 16
    try:
        tensor, source = lazy(real, shown)
        whole.copy_(tensor)
        assert torch.equal(whole, real.to(target))
        assert source.elements == real.numel()
        start = data.draw(st.integers(0, real.numel()))
        stop = data.draw(st.integers(start, real.numel()))
        part = torch.empty(stop - start, dtype=target)
        tensor.read_range(start, stop, part)
        assert torch.equal(part, real.view(-1)[start:stop].to(target))
        chunks = b"".join(bytes(chunk) for chunk in tensor_chunks(tensor))
        assert chunks == bytes(tensor_bytes(real.to(shown)))
    finally:
        tensors.BUFFER_BYTES = old
        tensors._buffers.__dict__.clear()


def test_a_range_that_does_not_fit_is_refused() -> None:
    tensor, _ = lazy(torch.zeros(4))
    for start, stop, size in ((0, 5, 5), (-1, 2, 3), (0, 2, 3)):
        with pytest.raises(ValueError, match="don't fit"):
            tensor.read_range(start, stop, torch.empty(size))
