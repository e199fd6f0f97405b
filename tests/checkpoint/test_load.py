"""Reading: the right tag, and from N ranks onto M."""

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.resolution import is_checkpoint, resolve
from lightning_zero.checkpoint.tensors import LazyTensor
from lightning_zero.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UntrustedContentError,
)
from lightning_zero.segments import ParameterSpec, plan_buckets
from tests.checkpoint.sample import Sample


@settings(max_examples=20, deadline=None)
@given(
    saved_on=st.integers(1, 5),
    loaded_on=st.integers(1, 5),
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=2).map(tuple), min_size=1, max_size=5),
    equal_shards=st.booleans(),
)
def test_what_n_ranks_saved_m_ranks_read_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    saved_on: int,
    loaded_on: int,
    shapes: list[tuple[int, ...]],
    equal_shards: bool,
) -> None:
    sample = Sample(world_size=saved_on, shapes={f"p{number}": shape for number, shape in enumerate(shapes)})
    checkpoint = Checkpoint(sample.save(tmp_path_factory.mktemp("saved") / "tag"), verify="full")
    state_dict, optimizer = checkpoint.state_dict(), checkpoint.lightning_checkpoint()["optimizer_states"][0]
    specs = [ParameterSpec(name, shape, 4) for name, shape in sample.shapes.items()]
    seen = dict.fromkeys(sample.shapes, 0)
    for bucket in plan_buckets(specs, loaded_on, "element", 900, equal_shards=equal_shards):
        for rank in range(loaded_on):
            for segment, _ in bucket.owned(rank):
                name, part = segment.name, slice(segment.start, segment.stop)
                state = optimizer["state"][list(sample.shapes).index(name)]
                for lazy, real in ((state_dict[name], sample.masters), (state["exp_avg"], sample.moments)):
                    assert isinstance(lazy, LazyTensor)
                    lazy.read_range(segment.start, segment.stop, read := torch.empty(segment.numel))
                    assert torch.equal(read, real[name].view(-1)[part])
                assert state["step"] == sample.step
                # As many as a parameter of shape (1, 3) has elements, they'd be taken for element-wise, of its shape
                assert torch.equal(state["factors"].flatten(), torch.arange(3.0))
                assert state["bound"] == float("inf")
                seen[name] += segment.numel
    assert seen == {spec.name: spec.numel for spec in specs}


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_state_dict_is_the_modules(tmp_path: Path, world_size: int) -> None:
    sample = Sample(world_size=world_size)
    loaded = Checkpoint(sample.save(tmp_path / "tag")).state_dict()
    assert list(loaded) == list(sample.state_dict)
    for name, tensor in sample.state_dict.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert loaded["head.weight"] is loaded["embed.weight"]


def test_torchs_own_optimizer_takes_its_state(tmp_path: Path) -> None:
    sample = Sample(shapes={"a": (3, 4), "b": (5,)})
    state = Checkpoint(sample.save(tmp_path / "tag")).lightning_checkpoint()["optimizer_states"][0]
    parameters = [torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(5))]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(optimizer.state[parameters[0]]["exp_avg"], sample.moments["a"])


def test_a_lightning_checkpoint_is_put_together(tmp_path: Path) -> None:
    checkpoint = Checkpoint(Sample(world_size=2).save(tmp_path / "tag"))
    loaded = checkpoint.lightning_checkpoint()
    assert loaded["hyper_parameters"] == {"width": 5}
    assert loaded["optimizer_states"][0]["param_groups"][0]["lr"] == 0.1
    assert loaded["optimizer_states"][0]["state"].keys() == {0, 1, 3, 4}  # the empty parameter has none
    assert [checkpoint.rank_state(rank) for rank in range(3)] == [b"rank 0", b"rank 1", None]


def test_hyper_parameters_of_any_class_are_loaded_on_request_only(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"pathlib\.(_local\.)?PosixPath"):
        tag = Sample(trainer={"hyper_parameters": {"data": Path("x")}}).save(tmp_path / "tag")
    checkpoint = Checkpoint(tag)
    with pytest.raises(UntrustedContentError, match=r"PosixPath.*weights_only=False"):
        checkpoint.lightning_checkpoint()
    assert checkpoint.lightning_checkpoint(weights_only=False)["hyper_parameters"] == {"data": Path("x")}


def test_a_path_may_name_the_save_directory_the_tag_or_a_file_in_it(tmp_path: Path) -> None:
    save_dir = tmp_path / "ckpts"
    one, two = Sample(step=1).save(save_dir / "one"), Sample(step=2).save(save_dir / "two")
    assert resolve(save_dir) == two
    assert resolve(save_dir, "one") == resolve(one) == resolve(str(one / "manifest.json")) == one
    assert resolve(two / "rank-00000-of-00001.safetensors") == two
    assert all(map(is_checkpoint, (save_dir, one, one / "trainer.pt")))
    (tmp_path / "plain.ckpt").touch()
    assert not any(map(is_checkpoint, (tmp_path, tmp_path / "plain.ckpt", tmp_path / "nowhere")))
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint 'three'.*\['two', 'one'\]"):
        resolve(save_dir, "three")
    with pytest.raises(CheckpointNotFoundError, match="is not a checkpoint"):
        resolve(tmp_path / "plain.ckpt")


@pytest.mark.parametrize("damage", ["shard missing", "shard cut", "manifest cut", "manifest missing", "tag missing"])
def test_when_latest_names_a_damaged_tag_the_newest_sound_one_is_taken_loudly(tmp_path: Path, damage: str) -> None:
    for step in (1, 3, 2):
        Sample(step=step, world_size=2).save(tmp_path / f"s{step}")
    commit.write_latest(tmp_path, "s3")
    victim = tmp_path / "s3" / ("manifest.json" if "manifest" in damage else "rank-00001-of-00002.safetensors")
    if damage == "tag missing":
        (tmp_path / "s3").rename(tmp_path.parent / f"{tmp_path.name}-moved")
    elif "missing" in damage:
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1])
    before = sorted(tmp_path.rglob("*"))
    with pytest.warns(UserWarning, match="s3"):
        assert resolve(tmp_path) == tmp_path / "s2"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_flipped_bit_is_found_by_a_full_load_and_by_a_full_resolve(tmp_path: Path) -> None:
    for step in (1, 2):
        Sample(step=step).save(tmp_path / f"s{step}")
    shard = tmp_path / "s2" / "rank-00000-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="'rank/state'"):
        Checkpoint(tmp_path / "s2", verify="full")
    with pytest.raises(CorruptCheckpointError, match="'rank/state'"):
        Checkpoint(tmp_path / "s2").rank_state(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(tmp_path) == tmp_path / "s2"
    with pytest.warns(UserWarning, match="checksum"):
        assert resolve(tmp_path, verify="full") == tmp_path / "s1"


def test_a_shard_that_goes_under_a_reader_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(Sample().save(tmp_path / "tag"))
    lazy = checkpoint.state_dict()["bias"]
    (tmp_path / "tag" / "rank-00000-of-00001.safetensors").unlink()
    with pytest.raises(IncompleteCheckpointError, match="rank-00000-of-00001"):
        lazy.contiguous()
