"""One rank's file."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from lightning_zero.checkpoint import kernel
from lightning_zero.checkpoint.integrity import find_problems, read_manifest
from lightning_zero.checkpoint.shards import Item, verify_tensors, write_shard
from lightning_zero.checkpoint.storage import WRITEBACK_BYTES, create_file, open_file
from lightning_zero.checkpoint.tensors import CODES, tensor_bytes, tensor_chunks
from lightning_zero.errors import IncompleteCheckpointError
from tests.checkpoint.sample import Sample


def item(name: str, tensor: torch.Tensor) -> Item:
    flat = tensor.view(-1)
    return Item("model", name, 0, flat.numel(), CODES[tensor.dtype], tuple(flat.shape), lambda: tensor_chunks(flat))


def test_safetensors_itself_reads_a_shard(tmp_path: Path) -> None:
    unknown = {torch.complex128, torch.complex64}
    if tuple(int(number) for number in safetensors.__version__.split(".")[:2]) < (0, 8):
        unknown |= {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
    tensors = {str(dtype): torch.arange(5).to(dtype) for dtype in CODES if dtype not in unknown}
    tensors["large"] = torch.randn(WRITEBACK_BYTES // 2)
    entry = write_shard(
        tmp_path / "s.safetensors", [item(*pair) for pair in tensors.items()], (), rank=1, step=7, save_id="x"
    )
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert file.metadata()["step"] == "7"
        for stored in entry.tensors:
            read = file.get_tensor(stored.key)
            assert bytes(tensor_bytes(read)) == bytes(tensor_bytes(tensors[stored.name]))
    assert entry.nbytes == (tmp_path / "s.safetensors").stat().st_size
    assert entry.header_nbytes % 64 == 0
    assert all(stored.offset % tensors[stored.name].dtype.itemsize == 0 for stored in entry.tensors)
    assert not list(verify_tensors(open_file(tmp_path / "s.safetensors"), entry, entry.tensors))


@pytest.mark.parametrize("refuses", ["never", "at once", "when it writes"])
@pytest.mark.parametrize("nbytes", [0, 1, 4096, 8 << 20, (8 << 20) + 4097, 20_000_001])
def test_what_is_written_past_the_page_cache_is_the_same(
    tmp_path: Path, nbytes: int, refuses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refuses == "at once":
        monkeypatch.setattr(kernel, "write_directly", lambda fd, on=True: False)
    elif refuses == "when it writes":
        pwrite, refused = os.pwrite, []

        def refuse(fd: int, data: memoryview, offset: int) -> int:
            if not refused:
                refused.append(True)
                raise OSError(errno.EINVAL, "Invalid argument")
            return pwrite(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", refuse)
    content = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8).tobytes()
    with create_file(tmp_path / "file", nbytes, direct=True) as file:
        for begin in range(0, nbytes, 3_000_001):
            file.write(memoryview(content)[begin : begin + 3_000_001])
    assert (tmp_path / "file").read_bytes() == content


def test_a_file_that_refuses_every_write_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(fd: int, data: memoryview, offset: int) -> int:
        asked.append(offset)
        assert len(asked) < 10
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "pwrite", refuse)
    monkeypatch.setattr(kernel, "write_directly", lambda fd, on=True: True)
    with pytest.raises(OSError, match="Invalid argument"), create_file(tmp_path / "file", 3, direct=True) as file:
        file.write(b"abc")


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("mine")
    with pytest.raises(FileExistsError):
        write_shard(tmp_path / "s", [], (), rank=0, step=0)
    assert (tmp_path / "s").read_text() == "mine"


def test_a_tensor_that_is_named_twice_is_refused_before_it_is_written(tmp_path: Path) -> None:
    twice = [item("a", torch.zeros(2)), item("a", torch.ones(2))]
    with pytest.raises(ValueError, match="twice"):
        write_shard(tmp_path / "s", twice, (), rank=0, step=0)


def test_reading_beyond_the_end_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"12345")
    file = open_file(tmp_path / "short")
    target = memoryview(bytearray(4))
    file.read_into(1, target)
    assert target == b"2345"
    with pytest.raises(IncompleteCheckpointError, match=r"short was cut short: it ends before byte 6"):
        file.read_into(2, target)


@pytest.mark.parametrize("make", ["missing", "directory", "fifo", "link"])
def test_what_is_no_plain_file_is_not_opened(tmp_path: Path, make: str) -> None:
    path = tmp_path / make
    if make == "directory":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "link":
        path.symlink_to("/etc/passwd")
    with pytest.raises(IncompleteCheckpointError, match=make):
        open_file(path)


@pytest.fixture(scope="module")
def tag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Sample(world_size=2).save(tmp_path_factory.mktemp("saved") / "tag")


@given(st.data())
def test_a_flipped_bit_anywhere_in_any_file_is_found_and_its_place_named(tag: Path, data: st.DataObject) -> None:
    manifest = read_manifest(tag)
    name = data.draw(st.sampled_from([*(file.name for file in manifest.files), "trainer.pt"]))
    whole = (tag / name).read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        (tag / name).write_bytes(damaged)
        problems = list(find_problems(tag, manifest, "full"))
    finally:
        (tag / name).write_bytes(whole)
    assert problems
    assert all(problem.file == name and problem.start <= position < problem.stop for problem in problems)


@given(st.data())
def test_a_file_cut_short_or_lost_is_found_without_reading_the_tensors(tag: Path, data: st.DataObject) -> None:
    manifest = read_manifest(tag)
    name = data.draw(st.sampled_from([*(file.name for file in manifest.files), "trainer.pt"]))
    whole = (tag / name).read_bytes()
    length = data.draw(st.none() | st.integers(0, len(whole) - 1))
    try:
        (tag / name).unlink()
        if length is not None:
            (tag / name).write_bytes(whole[:length])
        for depth in ("sizes", "full"):
            assert name in {problem.file for problem in find_problems(tag, manifest, depth)}
    finally:
        (tag / name).write_bytes(whole)


def test_swapped_shards_are_found_by_their_headers(tag: Path, tmp_path: Path) -> None:
    other = Sample(world_size=2, seed=1).save(tmp_path / "tag")  # the same sizes, another save
    manifest = read_manifest(other)
    name = manifest.files[1].name
    assert (other / name).stat().st_size == (tag / name).stat().st_size
    (other / name).write_bytes((tag / name).read_bytes())
    assert [problem.file for problem in find_problems(other, manifest, "sizes")] == [name]


def test_exchange_swaps_two_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not kernel.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system can't")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        kernel.exchange(tmp_path / "a", tmp_path / "missing")


def test_a_tensor_of_another_layout_gives_the_same_bytes() -> None:
    tensor = torch.randn(3000, 1100)
    for view in (tensor.T, tensor[:, 1::2], tensor.to(torch.complex64).conj()):
        chunks = b"".join(bytes(chunk) for chunk in tensor_chunks(view))
        assert np.array_equal(
            np.frombuffer(chunks, np.uint8), np.frombuffer(view.resolve_conj().contiguous().numpy().tobytes(), np.uint8)
        )
