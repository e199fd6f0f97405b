"""The fp32 model, out of a checkpoint."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_zero.checkpoint import read_ahead
from lightning_zero.checkpoint.export import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
    parse_size,
)
from lightning_zero.errors import CheckpointMismatchError, IncompleteCheckpointError
from tests.checkpoint.sample import Sample


def expected(sample: Sample) -> dict[str, torch.Tensor]:
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in sample.state_dict.items()
    }


def assert_same(loaded: dict[str, torch.Tensor], sample: Sample, *without: str) -> None:
    wanted = {name: tensor for name, tensor in expected(sample).items() if name not in without}
    assert loaded.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


@pytest.fixture(params=[1, 3])
def sample(request: pytest.FixtureRequest) -> Sample:
    return Sample(world_size=request.param)


@pytest.fixture
def save_dir(tmp_path: Path, sample: Sample) -> Path:
    sample.save(tmp_path / "ckpts" / "tag")
    return tmp_path / "ckpts"


def test_in_memory(save_dir: Path, sample: Sample) -> None:
    loaded = get_fp32_state_dict_from_zero_checkpoint(save_dir)
    assert_same(loaded, sample)
    assert loaded["head.weight"] is loaded["embed.weight"]
    assert all(type(tensor) is torch.Tensor for tensor in loaded.values())
    assert_same(get_fp32_state_dict_from_zero_checkpoint(save_dir, "tag", True), sample, "frozen")


def test_unread(save_dir: Path, sample: Sample) -> None:
    loaded = get_fp32_state_dict_from_zero_checkpoint(save_dir / "tag", lazy_mode=True)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
        name: tuple(tensor.shape) for name, tensor in sample.state_dict.items()
    }
    assert_same({name: tensor.contiguous() for name, tensor in loaded.items()}, sample)


def test_into_a_module(save_dir: Path, sample: Sample) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in sample.state_dict.items():
                home: torch.nn.Module = self
                *parents, last = name.split(".")
                for parent in parents:
                    if not hasattr(home, parent):
                        home.add_module(parent, torch.nn.Module())
                    home = getattr(home, parent)
                home.register_buffer(last, torch.zeros_like(tensor))

    model = Model()
    assert load_state_dict_from_zero_checkpoint(model, save_dir) is model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, sample.state_dict[name])
    with pytest.raises(CheckpointMismatchError, match="another model"):
        load_state_dict_from_zero_checkpoint(torch.nn.Linear(2, 2), save_dir)


def test_a_torch_file_is_a_whole_lightning_checkpoint(
    save_dir: Path, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "CHUNK_BYTES", 1024)
    written: list[int] = []
    convert_zero_checkpoint_to_fp32_state_dict(save_dir, tmp_path / "out" / "model.ckpt", progress=written.append)
    assert os.listdir(tmp_path / "out") == ["model.ckpt"]
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "out" / "model.ckpt", weights_only=True, mmap=mmap)
        assert_same(loaded["state_dict"], sample)
        ties = loaded["state_dict"]["head.weight"], loaded["state_dict"]["embed.weight"]
        assert ties[0].data_ptr() == ties[1].data_ptr()
    assert loaded["hyper_parameters"] == {"width": 5}
    assert loaded["global_step"] == sample.step
    assert "optimizer_states" not in loaded
    with zipfile.ZipFile(tmp_path / "out" / "model.ckpt") as archive:
        assert archive.testzip() is None
    stored = get_fp32_state_dict_from_zero_checkpoint(save_dir)
    assert sum(written) == sum({id(tensor): tensor.nbytes for tensor in stored.values()}.values())


def test_tensors_in_a_callbacks_state_are_kept(tmp_path: Path) -> None:
    states = {"ema": {"decay": torch.tensor(0.5), "shadow": torch.arange(7), "again": None}}
    states["ema"]["again"] = states["ema"]["shadow"]
    sample = Sample(trainer={"callbacks": states})
    sample.save(tmp_path / "tag")
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "model.ckpt")
    loaded = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert_same(loaded["state_dict"], sample)
    assert torch.equal(loaded["callbacks"]["ema"]["shadow"], torch.arange(7))
    assert loaded["callbacks"]["ema"]["decay"] == 0.5
    assert loaded["callbacks"]["ema"]["again"].data_ptr() == loaded["callbacks"]["ema"]["shadow"].data_ptr()


def test_the_torch_file_is_read_without_lightning_zero(tmp_path: Path) -> None:
    Sample().save(tmp_path / "tag")
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "model.ckpt")
    script = (
        "import sys; sys.modules['lightning_zero'] = None; import torch; torch.load(sys.argv[1], weights_only=True)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.ckpt")], check=True, cwd="/")


def test_a_safetensors_file_has_each_tensor_once(save_dir: Path, sample: Sample, tmp_path: Path) -> None:
    convert_zero_checkpoint_to_fp32_state_dict(save_dir, tmp_path / "m.safetensors", exclude_frozen_parameters=True)
    assert_same(load_file(tmp_path / "m.safetensors"), sample, "frozen", "head.weight")


def test_a_folder_in_the_hugging_face_layout(save_dir: Path, sample: Sample, tmp_path: Path) -> None:
    for size, count in (("1KB", 3), ("1GB", 1), (150, 4)):
        convert_zero_checkpoint_to_fp32_state_dict(save_dir, tmp_path / "hf", max_shard_size=size)
        files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
        assert len(files) == count
        loaded = {name: tensor for file in files for name, tensor in load_file(tmp_path / "hf" / file).items()}
        assert_same(loaded, sample, "head.weight")
        if count > 1:
            index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in loaded.values())
            for name, file in index["weight_map"].items():
                assert name in load_file(tmp_path / "hf" / file)
    (tmp_path / "hf" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        convert_zero_checkpoint_to_fp32_state_dict(save_dir, tmp_path / "hf", max_shard_size=size)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "folder"])
def test_an_export_that_fails_leaves_what_was_there(
    save_dir: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / name
    size = "1KB" if name == "folder" else None
    convert_zero_checkpoint_to_fp32_state_dict(save_dir, output, max_shard_size=size)
    before = {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()}

    def fail(nbytes: int) -> None:
        raise IncompleteCheckpointError("in the middle")

    with pytest.raises(IncompleteCheckpointError):
        convert_zero_checkpoint_to_fp32_state_dict(save_dir, output, max_shard_size=size, progress=fail)
    assert {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()} == before


def test_wide_and_complex_and_other_tensors_keep_their_dtype(tmp_path: Path) -> None:
    from lightning_zero.checkpoint.content import RankContent, SharedContent, TensorToSave
    from lightning_zero.checkpoint.manifest import Entry
    from lightning_zero.checkpoint.save import save_checkpoint

    given = {
        str(dtype): torch.arange(4).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.complex64, torch.complex128, torch.bool, torch.uint16)
    }
    content = RankContent([TensorToSave("model", name, 0, 4, tensor) for name, tensor in given.items()], [], b"", 1)
    entries = [Entry(name, (2, 2), name.removeprefix("torch."), "given") for name in given]
    save_checkpoint(tmp_path / "tag", content, SharedContent(0, 1, entries, {}, [], {}), group=None)
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "model.ckpt")
    loaded = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    for name, tensor in given.items():
        wanted = tensor.float() if tensor.dtype == torch.float16 else tensor
        assert torch.equal(loaded[name], wanted.view(2, 2))
        assert loaded[name].dtype == wanted.dtype


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_size(size) for size in (7, "7", "5GB", "5 gb", "1.5KiB", "2MB")] == [
        7, 7, 5 * 10**9, 5 * 10**9, 1536, 2 * 10**6
    ]  # fmt: skip
    for size in ("", "GB", "-1GB", 0, "1XB", "nan", "inf"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(size)
