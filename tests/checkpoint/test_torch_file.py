"""torch's own file, to the byte, without torch."""

import io
import os
import struct
import zipfile
from collections import OrderedDict
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_zero.checkpoint.archive import NewRecord, directory
from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.tensors import CODES, tensor_bytes
from lightning_zero.checkpoint.torch_file import _ALWAYS_ALLOWED, read_torch_file, write_torch_file


class Source:
    """Elements of a tensor in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def require(self) -> None:
        pass

    def read(self, start: int, stop: int, target: memoryview) -> None:
        target[:] = tensor_bytes(self.tensor.view(-1)[start:stop])


def unread(tensor: Tensor) -> Elements:
    return Elements(Source(tensor), tuple(tensor.shape), CODES[tensor.dtype], CODES[tensor.dtype])


def write(path: Path, content: dict[str, Any]) -> bytes:
    path.unlink(missing_ok=True)
    write_torch_file(path, content, "model.ckpt", lambda nbytes: None)
    return path.read_bytes()


def saved(path: Path, content: object) -> bytes:
    torch.save(content, path / "model.ckpt")
    return (path / "model.ckpt").read_bytes()


def tensors() -> dict[str, Tensor]:
    """Of every dtype, of no dimension, of no elements, and of odd sizes."""
    every = {str(dtype): torch.arange(6).to(dtype).view(2, 3) for dtype in CODES}
    shapes: list[tuple[int, ...]] = [(), (0, 3), (3, 0, 2), (1, 3, 1), (17,), (1000, 7)]
    return every | {str(shape): torch.ones(shape) for shape in shapes}


def same(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype) and bytes(
        tensor_bytes(one)
    ) == bytes(tensor_bytes(other))


def without_id(content: bytes) -> bytes:
    """The serialization id is a hash of torch's own."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        info = archive.getinfo("model/.data/serialization_id")
        begin = content.index(archive.read(info), info.header_offset)
    checksum = struct.pack("<I", info.CRC)
    return (content[:begin] + bytes(40) + content[begin + 40 :]).replace(checksum, bytes(4))


@pytest.mark.skipif(find_spec("torch.utils.serialization") is None, reason="torch 2.6 has the records in another order")
def test_it_is_what_torch_saves_to_the_byte(tmp_path: Path) -> None:
    given: dict[str, Any] = tensors()
    given["tied"] = given["(17,)"]
    read = {name: unread(tensor) for name, tensor in given.items()}
    read["tied"] = read["(17,)"]
    settings = {
        "epoch": 3,
        "lr": 1e-3,
        "name": "é",
        "on": True,
        "none": None,
        "sizes": [1, 300, 70_000, -1, 2**40, -(2**80)],
    }
    settings |= {"pairs": ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (), [7], {"x": 1})}
    expected = saved(tmp_path, {**settings, "state_dict": given})
    assert without_id(write(tmp_path / "ours", {**settings, "state_dict": read})) == without_id(expected)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("computed", [False, True])
def test_torch_reads_it_in_every_way(tmp_path: Path, mmap: bool, computed: bool) -> None:
    given = tensors()
    read = {name: unread(tensor) for name, tensor in given.items()}
    write(tmp_path / "ours", {"state_dict": {**read, "tied": read["(17,)"]}})
    if computed:
        config = pytest.importorskip("torch.utils.serialization.config", reason="torch 2.6 has no such setting")
    with config.patch("load.calculate_storage_offsets", True) if computed else nullcontext():
        loaded = torch.load(tmp_path / "ours", weights_only=True, mmap=mmap)["state_dict"]
    tied = loaded.pop("tied")
    assert tied.data_ptr() == loaded["(17,)"].data_ptr()
    assert loaded.keys() == given.keys()
    assert all(same(loaded[name], tensor) for name, tensor in given.items())
    with zipfile.ZipFile(tmp_path / "ours") as archive:
        assert archive.testzip() is None


def sizes(content: bytes) -> list[int]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [info.file_size for info in archive.infolist() if "/data/" in info.filename]


def test_what_torch_saved_is_written_again_as_it_was(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    ordered = OrderedDict(a=1, b=base[1])
    ordered.of_its_own = 3  # type: ignore[attr-defined]
    content = {
        "transposed": base.t(),
        "part": base[1:, 2],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "sparse": torch.eye(3).to_sparse(),
        "half": torch.ones(3).bfloat16(),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "nothing": torch.empty(0, 2),
        "ordered": ordered,
        "others": [{1, 2}, torch.Size([2]), torch.device("cpu"), torch.float16, b"abc", bytearray(b"abc")],
    }
    expected = saved(tmp_path, content)
    written = write(tmp_path / "ours", read_torch_file(expected, "x", weights_only=True))
    assert [
        info.file_size for info in zipfile.ZipFile(io.BytesIO(written)).infolist() if "/data/" in info.filename
    ] == [info.file_size for info in zipfile.ZipFile(io.BytesIO(expected)).infolist() if "/data/" in info.filename]
    loaded = torch.load(tmp_path / "ours", weights_only=True)
    assert loaded.keys() == content.keys()
    for name in ("transposed", "part", "parameter", "frozen", "half", "float8", "nothing"):
        assert same(loaded[name].contiguous(), content[name].contiguous())  # type: ignore[attr-defined]
        assert type(loaded[name]) is type(content[name])
        assert loaded[name].requires_grad == content[name].requires_grad  # type: ignore[attr-defined]
    assert loaded["transposed"].stride() == (1, 4)
    loaded["transposed"][0, 1] = 100
    assert loaded["ordered"]["b"][0] == 100
    assert loaded["ordered"].of_its_own == 3
    assert torch.equal(loaded["sparse"].to_dense(), torch.eye(3))
    assert loaded["others"] == content["others"]


def test_what_lay_on_a_gpu_is_on_the_cpu_of_whoever_loads_it(tmp_path: Path) -> None:
    content = saved(tmp_path, {"x": torch.ones(3)})
    elsewhere = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x03\x00\x00\x00xpu")
    assert elsewhere != content
    write(tmp_path / "ours", read_torch_file(elsewhere, "x", weights_only=True))
    assert torch.equal(torch.load(tmp_path / "ours", weights_only=True)["x"], torch.ones(3))


class Huge:
    """Pickled, it is a tensor whose storage has a size, and no memory."""

    def __init__(self, nbytes: int) -> None:
        self._storage = torch.empty(nbytes, dtype=torch.uint8, device="meta")._typed_storage()  # type: ignore[no-untyped-call]
        self._storage._fake_device = torch.device("cpu")

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, (self._storage, 0, (len(self._storage),), (1,), False, OrderedDict())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_beyond_four_gigabytes_the_layout_is_torchs_too(tmp_path: Path) -> None:
    """Of files that are sparse, and without reading or writing the data."""
    sizes = [0, 5, 2**32 - 2, 2**32 - 1, 2**32, 7, 0, 3 * 2**31]
    with torch.serialization.skip_data():
        torch.save([Huge(size) for size in sizes], tmp_path / "model.pt")
    with open(tmp_path / "model.pt", "rb") as file, zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        records: list[NewRecord] = []
        for info in infos:
            records.append(NewRecord(info.filename.encode(), records[-1].end if records else 0, info.file_size))
        file.seek(records[-1].end)
        assert file.read() == directory(records, [info.CRC for info in infos])
        for record, info in zip(records, infos, strict=True):
            assert record.offset == info.header_offset
            file.seek(record.offset)
            head, size = bytearray(record.head), 30 + len(record.name) + 12
            if record.nbytes >= 2**32 - 1:  # the second of two, which torch fills in where it writes the data
                assert head[size : size + 8] == record.nbytes.to_bytes(8, "little")
                head[size : size + 8] = bytes(8)
            assert file.read(len(head)) == head
            file.seek(record.offset + len(record.head) + record.nbytes)
            assert file.read(len(record.tail(info.CRC))) == record.tail(info.CRC)
    assert os.stat(tmp_path / "model.pt").st_blocks < 1000


def test_there_may_be_more_records_than_sixteen_bits_count(tmp_path: Path) -> None:
    count = 66_000
    one = torch.ones(1)
    write(tmp_path / "ours", {"state_dict": {str(number): unread(one) for number in range(count)}})
    with zipfile.ZipFile(tmp_path / "ours") as archive:
        assert len(archive.infolist()) == count + 6
    loaded = torch.load(tmp_path / "ours", weights_only=True, mmap=True)["state_dict"]
    assert len(loaded) == count
    assert loaded[str(count - 1)] == 1


def test_a_name_that_is_not_ascii_is_left_out_of_the_archive_as_torch_does_it(tmp_path: Path) -> None:
    for name in ("größe.pt", "a.b.pt"):
        torch.save({"x": 1}, tmp_path / name)
        write_torch_file(tmp_path / "ours", {"x": 1}, name, lambda nbytes: None)
        assert zipfile.ZipFile(tmp_path / "ours").namelist()[0] == zipfile.ZipFile(tmp_path / name).namelist()[0]
        (tmp_path / "ours").unlink()


def test_torch_allows_what_is_always_allowed() -> None:
    from torch._weights_only_unpickler import _get_allowed_globals

    spelled = {f"{name.module}.{name.name}".replace("__builtin__", "builtins") for name in _ALWAYS_ALLOWED}
    assert spelled <= set(_get_allowed_globals())
