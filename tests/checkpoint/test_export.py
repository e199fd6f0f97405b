"""The fp32 model, out of a checkpoint."""

import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file

from lightning_zero.checkpoint import kernel, read_ahead
from lightning_zero.checkpoint.content import RankContent, SharedContent, TensorToSave
from lightning_zero.checkpoint.export import (
    Wanted,
    convert_zero_checkpoint_to_fp32_state_dict,
    exported_bytes,
    parse_size,
)
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.manifest import Entry, Role
from lightning_zero.checkpoint.save import save_checkpoint
from lightning_zero.checkpoint.state_dict import (
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)
from lightning_zero.errors import CheckpointMismatchError, IncompleteCheckpointError, UnsupportedModelError
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


def test_what_killed_exports_to_the_same_place_have_left_goes_after_a_day(save_dir: Path, tmp_path: Path) -> None:
    folder, file, young, another = (
        tmp_path / f".{name}" for name in ("m.pt.0123abcd", "m.pt.4567cdef", "m.pt.89abcdef", "n.pt.0123abcd")
    )
    folder.mkdir()
    for left in (file, young, another):
        left.write_bytes(b"torn")
    for left in (folder, file, another):
        os.utime(left, (0, 0))
    convert_zero_checkpoint_to_fp32_state_dict(save_dir, tmp_path / "m.pt")
    assert sorted(tmp_path.glob(".*")) == [young, another]


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
    for something_else in (save_dir, Model):
        with pytest.raises(TypeError, match="fills a module, and takes it first"):
            load_state_dict_from_zero_checkpoint(something_else, save_dir)  # type: ignore[type-var]
    with pytest.raises(UnsupportedModelError, match=r"'scale' is on the meta device.*to_empty"):
        load_state_dict_from_zero_checkpoint(model.to("meta"), save_dir)
    filled = load_state_dict_from_zero_checkpoint(model.to_empty(device="cpu"), save_dir).state_dict()
    assert all(torch.equal(tensor, sample.state_dict[name]) for name, tensor in filled.items())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_a_bin_is_a_plain_state_dict(save_dir: Path, sample: Sample, tmp_path: Path, name: str) -> None:
    convert_zero_checkpoint_to_fp32_state_dict(save_dir, tmp_path / name)
    assert_same(torch.load(tmp_path / name, weights_only=True), sample)
    with pytest.raises(ValueError, match=r"one \.ckpt, and not into"):
        convert_zero_checkpoint_to_fp32_state_dict(save_dir, tmp_path / name, with_optimizer=True)


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
    assert torch.equal(loaded["average"], sample.average)
    assert loaded["global_step"] == sample.step
    assert "optimizer_states" not in loaded
    with zipfile.ZipFile(tmp_path / "out" / "model.ckpt") as archive:
        assert archive.testzip() is None
    stored = [*get_fp32_state_dict_from_zero_checkpoint(save_dir).values(), sample.average]
    assert sum(written) == sum({id(tensor): tensor.nbytes for tensor in stored}.values())


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
    beside = {"config.json", "source.spm", "qwen.tiktoken", "merges.txt"}
    for name in beside:
        (tmp_path / "hf" / name).touch()
    convert_zero_checkpoint_to_fp32_state_dict(save_dir, tmp_path / "hf", max_shard_size=size)
    assert beside < set(os.listdir(tmp_path / "hf"))
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


def test_a_link_leads_to_what_is_written_and_what_is_no_file_stays(tmp_path: Path) -> None:
    Sample().save(tmp_path / "tag")
    (tmp_path / "disk" / "hf").mkdir(parents=True)
    for name, size in (("hf", "1GB"), ("m.ckpt", None)):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        for _ in range(2):
            convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / name, max_shard_size=size)
        assert (tmp_path / name).is_symlink()
    assert (tmp_path / "disk" / "hf" / "model.safetensors").is_file()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a device or a pipe"):
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "pipe")
    assert sorted(os.listdir(tmp_path)) == ["disk", "hf", "latest", "m.ckpt", "pipe", "tag"]
    assert sorted(os.listdir(tmp_path / "disk")) == ["hf", "m.ckpt"]


def test_where_names_cannot_be_exchanged_what_resists_is_left_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove(path: Path, ignore_errors: bool = False) -> None:
        for name in os.listdir(path):
            os.unlink(path / name)
        if not ignore_errors:  # as over NFS, where somebody reads a file in it
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(kernel, "exchange", lambda one, other: False)
    monkeypatch.setattr(shutil, "rmtree", remove)
    Sample().save(tmp_path / "tag", update_latest=False)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    for _ in range(2):
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "tag", tmp_path / "hf", max_shard_size="1GB")
    assert sorted(os.listdir(tmp_path / "hf")) == ["config.json", "model.safetensors"]


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Sample().save(tmp_path / "tag")
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(ValueError, match="is a mount point"):
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "volume", max_shard_size="1GB")
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "volume" / "hf", max_shard_size="1GB")


def test_wide_and_complex_and_other_tensors_keep_their_dtype(tmp_path: Path) -> None:
    given = {
        str(dtype): torch.arange(4).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.complex64, torch.complex128, torch.bool, torch.uint16)
    }
    save_tensors(tmp_path / "tag", {name: ("given", tensor.view(2, 2)) for name, tensor in given.items()})
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "model.ckpt")
    loaded = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    for name, tensor in given.items():
        wanted = tensor.float() if tensor.dtype == torch.float16 else tensor
        assert torch.equal(loaded[name], wanted.view(2, 2))
        assert loaded[name].dtype == wanted.dtype


def test_a_name_that_safetensors_has_for_itself_is_refused_there_alone(tmp_path: Path) -> None:
    save_tensors(tmp_path / "tag", {"__metadata__": ("given", torch.arange(4))})
    with pytest.raises(UnsupportedModelError, match="can be named '__metadata__'"):
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "model.ckpt")
    assert "__metadata__" in torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]


def save_tensors(
    directory: Path, tensors: dict[str, tuple[Role, torch.Tensor]], trainer: Mapping[str, object] = MappingProxyType({})
) -> Path:
    """A checkpoint of one rank with just these."""
    items = [TensorToSave("model", name, 0, t.numel(), t.reshape(-1)) for name, (_, t) in tensors.items()]
    entries = [
        Entry(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), role) for name, (role, t) in tensors.items()
    ]
    shared = SharedContent(0, 1, entries, {}, [], {"epoch": 0, "global_step": 1, **trainer})
    return Path(save_checkpoint(directory, RankContent(items, [], b"", 1), shared, group=None).path)


def read_export(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".ckpt":
        loaded: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
        return loaded
    return load_file(path)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("dtype", [None, "bf16", torch.float16])
def test_parameters_get_the_dtype_that_is_asked_for_and_buffers_keep_their_own_but_for_half_ones_in_fp32(
    tmp_path: Path, name: str, dtype: str | torch.dtype | None
) -> None:
    given: dict[str, tuple[Role, torch.Tensor]] = {
        "trained": ("parameter", torch.randn(40, 40)),
        "double": ("parameter", torch.randn(3, dtype=torch.float64)),
        "frozen": ("frozen", torch.randn(5).bfloat16()),
        "averages": ("given", torch.randn(7)),
        "running_mean": ("buffer", torch.tensor([1 + 2**-20, 1e30])),
        "half": ("buffer", torch.tensor([1.5]).half()),
        "count": ("buffer", torch.tensor([2**24 + 1, 2**60 + 1])),
    }
    save_tensors(tmp_path / "tag", given)
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / name, dtype=dtype)
    loaded = read_export(tmp_path / name)
    narrow = {None: torch.float32, "bf16": torch.bfloat16}.get(dtype, torch.float16)
    for key, (role, tensor) in given.items():
        if (role != "buffer" or (key == "half" and dtype is None)) and not (key == "double" and dtype is None):
            tensor = tensor.to(narrow)
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "folder"])
def test_parameters_that_are_too_large_for_fp16_are_named(tmp_path: Path, name: str) -> None:
    inf, nan = float("inf"), float("nan")
    given: dict[str, tuple[Role, torch.Tensor]] = {
        "large": ("parameter", torch.tensor([nan, 1.0, -70000.0])),
        "infinite": ("parameter", torch.tensor([inf, nan])),
        "small": ("parameter", torch.tensor([65504.0, 1e-12])),
        "buffer": ("buffer", torch.tensor([1e30])),
    }
    save_tensors(tmp_path / "tag", given)
    size = "1GB" if name == "folder" else None
    with pytest.warns(UserWarning, match=r"too large for float16: large\. ") as warned:
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / name, dtype="fp16", max_shard_size=size)
    assert len(warned) == 1


def test_what_goes_together(save_dir: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"dtype": "int8"}, "not a dtype"),
        ({"dtype": "bf16", "with_optimizer": True}, "leave dtype"),
        ({"max_shard_size": "1GB", "with_optimizer": True}, r"into one \.ckpt"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_zero_checkpoint_to_fp32_state_dict(save_dir, tmp_path / "out", **options)  # type: ignore[arg-type]
    weights = save_tensors(tmp_path / "weights", {"w": ("given", torch.ones(2))})
    with pytest.raises(CheckpointMismatchError, match="weights alone"):
        convert_zero_checkpoint_to_fp32_state_dict(weights, tmp_path / "out", with_optimizer=True)
    assert not (tmp_path / "out").exists()


def test_with_the_optimizer_it_is_what_torch_saves(save_dir: Path, sample: Sample, tmp_path: Path) -> None:
    written: list[int] = []
    convert_zero_checkpoint_to_fp32_state_dict(
        save_dir, tmp_path / "m.ckpt", with_optimizer=True, progress=written.append
    )
    assert sum(written) == exported_bytes(Checkpoint(save_dir / "tag"), Path("x.ckpt"), Wanted(with_optimizer=True))
    loaded = torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert_same(loaded["state_dict"], sample)
    (optimizer,) = loaded["optimizer_states"]
    assert optimizer["param_groups"] == [{"lr": 0.1, "params": list(range(len(sample.shapes)))}]
    for index, (name, moment) in enumerate(sample.moments.items()):
        if moment.numel():
            state = optimizer["state"][index]
            assert torch.equal(state["exp_avg"], moment), name
            assert torch.equal(state["factors"], torch.arange(3.0))
            assert state["step"] == sample.step
            assert state["bound"] == float("inf")
    with zipfile.ZipFile(tmp_path / "m.ckpt") as archive:
        assert archive.testzip() is None


def test_a_submodule_under_the_names_that_it_has_by_itself(save_dir: Path, sample: Sample, tmp_path: Path) -> None:
    convert_zero_checkpoint_to_fp32_state_dict(save_dir, tmp_path / "m.safetensors", submodule="head")
    loaded = load_file(tmp_path / "m.safetensors")
    assert loaded.keys() == {"weight"}
    assert torch.equal(loaded["weight"], sample.state_dict["head.weight"])
    with pytest.raises(CheckpointMismatchError, match=r"no submodule 'net'.*'embed'"):
        convert_zero_checkpoint_to_fp32_state_dict(save_dir, tmp_path / "m.safetensors", submodule="net")


def test_what_is_no_tensor_in_a_state_dict_comes_under_its_name(tmp_path: Path) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4))

        def get_extra_state(self) -> object:
            return {"scale": 0}

        def set_extra_state(self, state: object) -> None:
            self.extra = state

    states = {"_extra_state": {"scale": 1}, "layer._extra_state": {"scale": 2}}
    save_dir, layer = tmp_path / "ckpts", Layer()
    save_tensors(save_dir, {"layer.weight": ("given", torch.ones(4))}, {"state_dict": states})
    convert_zero_checkpoint_to_fp32_state_dict(save_dir, tmp_path / "m.ckpt", submodule="layer")
    layer.load_state_dict(torch.load(tmp_path / "m.ckpt", weights_only=True)["state_dict"])
    assert layer.extra == {"scale": 2}
    whole = Layer()
    del whole.weight
    whole.layer = Layer()
    load_state_dict_from_zero_checkpoint(whole, save_dir)
    assert (whole.extra, whole.layer.extra) == ({"scale": 1}, {"scale": 2})


@pytest.mark.parametrize("size", ["100MB", "60KB"])
def test_transformers_loads_the_folder(tmp_path: Path, size: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=97, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    sample = Sample(world_size=2, shapes={f"model.{name}": tuple(p.shape) for name, p in model.named_parameters()})
    tied = {"model.lm_head.weight": "model.transformer.wte.weight"}
    sample.save(tmp_path / "tag", aliases=tied)
    for _ in range(2):  # the second replaces the first, and leaves the configuration where it is
        convert_zero_checkpoint_to_fp32_state_dict(
            tmp_path, tmp_path / "hf", max_shard_size=size, submodule="model", exclude_frozen_parameters=True
        )
        config.save_pretrained(tmp_path / "hf")
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, sample.masters[f"model.{name}"])


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Of a process of its own, as the kernel counts it."""
    save_tensors(tmp_path / "tag", {f"w{n}": ("parameter", torch.full((8 << 20,), float(n))) for n in range(5)})
    script = (
        "import sys\n"
        "peak = lambda: next(int(line.split()[1]) for line in open('/proc/self/status') if 'VmHWM' in line) / 1024\n"
        "base = peak()\n"
        "from lightning_zero.checkpoint.export import convert_zero_checkpoint_to_fp32_state_dict as convert\n"
        "for name in ('m.ckpt', 'm.safetensors'):\n"
        "    convert(sys.argv[1], sys.argv[1] + '/' + name)\n"
        "print(peak() - base)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, stdout=subprocess.PIPE, text=True)
    assert float(done.stdout) < 60
    loaded = torch.load(tmp_path / "m.ckpt", mmap=True, weights_only=True)["state_dict"]
    assert all(bool((loaded[f"w{n}"] == n).all()) for n in range(5))


IN_A_PROCESS = """
import sys
from lightning_zero import convert_zero_checkpoint_to_fp32_state_dict
from lightning_zero.cli import main

def by_function(*arguments, **options):
    convert_zero_checkpoint_to_fp32_state_dict(*arguments, **options)

def by_command(*arguments):
    assert main(["export", *arguments]) == 0

{call}
imported = {{"torch", "numpy", "lightning", "rich", "fsspec"}} & sys.modules.keys()
assert imported == set({expected!r}), imported
"""


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("by_function({saved!r}, {out!r} + '.ckpt')", ()),
        ("by_function({saved!r}, {out!r} + '.safetensors')", ()),
        ("by_command({saved!r}, {out!r} + '.ckpt')", ()),
        ("by_command({saved!r}, {out!r} + '.ckpt', '--unsafe')", ()),
        ("by_command({saved!r}, {out!r} + '.ckpt', '--with-optimizer')", ()),
        ("by_command({saved!r}, {out!r} + '.ckpt', '--dtype', 'fp32')", ()),
        ("by_command({saved!r}, {out!r} + '.safetensors', '--submodule', 'head')", ()),
        ("by_command({saved!r}, {out!r}, '--max-shard-size', '1KB', '--exclude-frozen')", ()),
        ("by_command({saved!r}, {out!r} + '.safetensors', '--dtype', 'bf16')", ("torch", "numpy")),
    ],
)
def test_torch_is_imported_to_cast_and_for_nothing_else(tmp_path: Path, call: str, expected: tuple[str, ...]) -> None:
    states = {"checkpoint": {"best": torch.tensor(0.5)}, "ema": {"shadow": torch.ones(3, 2).t()}}
    settings = {"callbacks": states, "hyper_parameters": {"betas": (0.9, 0.95)}}
    Sample(world_size=2, trainer=settings, frozen_dtype=torch.float32).save(tmp_path / "tag")
    call = call.format(saved=str(tmp_path), out=str(tmp_path / "out"))
    subprocess.run([sys.executable, "-c", IN_A_PROCESS.format(call=call, expected=expected)], check=True)


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_size(size) for size in (7, "7", "5GB", "5 gb", "1.5KiB", "2MB")] == [
        7, 7, 5 * 10**9, 5 * 10**9, 1536, 2 * 10**6
    ]  # fmt: skip
    for size in ("", "GB", "-1GB", 0, "1XB", "nan", "inf"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(size)
