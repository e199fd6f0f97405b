"""Large tensors elsewhere in Lightning's dict: out of the pickle, and back where they were."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_zero.checkpoint.content import RankContent, SharedContent, TensorToSave
from lightning_zero.checkpoint.export import convert_zero_checkpoint_to_fp32_state_dict
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.manifest import Entry
from lightning_zero.checkpoint.placeholders import put_back, take_out
from lightning_zero.checkpoint.save import save_checkpoint
from lightning_zero.errors import CorruptCheckpointError, UnsupportedModelError


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def test_tensors_come_back_where_they_were_and_nothing_else_changes() -> None:
    one, two = torch.ones(3), torch.zeros(2)
    ordered = OrderedDict(weight=one, bias=two)
    ordered._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    content: dict[str, Any] = {"averages": ordered, "pair": (one, "text"), 3: [{"deep": [two]}], "plain": {"a": 1}}
    content["circle"] = content["plain"]
    trainer, taken = take_out(content, is_tensor, ["<averages.weight>"])
    assert list(taken) == ["<averages.weight>'", "<averages.bias>"]
    assert content["averages"]["weight"] is one
    assert trainer["plain"] is content["plain"]
    assert trainer["averages"]._metadata == ordered._metadata
    assert trainer["pair"] == ({"lightning_zero_tensor": "<averages.weight>'"}, "text")
    asked = []
    back = put_back(trainer, taken, lambda tensor: asked.append(tensor) or tensor.clone(), "here")  # type: ignore[func-returns-value]
    assert len(asked) == 2
    assert type(back["averages"]) is OrderedDict
    assert back["pair"][0] is back["averages"]["weight"]
    assert torch.equal(back[3][0]["deep"][0], two)


def test_what_holds_itself_or_is_deep_or_shared_without_end_is_walked_through_once() -> None:
    circle: dict[str, Any] = {"tensor": torch.ones(1)}
    circle["itself"] = circle
    trainer, taken = take_out(circle, is_tensor, ())
    assert len(taken) == 1
    assert put_back(trainer, taken, lambda tensor: tensor, "here")["tensor"] is circle["tensor"]
    shared: list[Any] = [torch.ones(1)]
    for _ in range(7):
        shared = [shared] * 1000
    assert len(take_out({"shared": shared}, is_tensor, ())[1]) == 0  # too deep
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert take_out({"deep": deep}, is_tensor, ())[0]["deep"] is deep


def test_what_looks_like_a_placeholder_is_not_saved() -> None:
    with pytest.raises(UnsupportedModelError, match="a name of our own"):
        take_out({"callbacks": [{"lightning_zero_tensor": "mine"}]}, is_tensor, ())


@pytest.mark.parametrize("name", ["<gone>", "weight", 3, ["<there>"]])
def test_a_placeholder_for_nothing_is_refused(name: object) -> None:
    with pytest.raises(CorruptCheckpointError, match="there is none"):
        put_back({"a": [{"lightning_zero_tensor": name}]}, {"<there>": 1}, lambda tensor: tensor, "here")


def test_a_checkpoint_and_its_export_hold_them_and_the_model_doesnt(tmp_path: Path) -> None:
    average, empty = torch.arange(12, dtype=torch.bfloat16).view(3, 4), torch.empty(0, 2)
    weight = torch.arange(6.0)
    trainer, taken = take_out({"callbacks": {"Average": {"average": average, "empty": empty}}}, is_tensor, ())
    entries = [Entry("weight", (6,), "float32", "given")]
    entries += [Entry(n, tuple(t.shape), str(t.dtype).removeprefix("torch."), "elsewhere") for n, t in taken.items()]
    tensors = [TensorToSave("model", "weight", 0, 6, weight)]
    tensors += [TensorToSave("model", n, 0, t.numel(), t.view(-1)) for n, t in taken.items() if t.numel()]
    content = {"epoch": 0, "global_step": 1, "state_dict": {}, **trainer}
    save_checkpoint(
        tmp_path / "tag", RankContent(tensors, [], b"", 1), SharedContent(0, 2, entries, {}, [], content), group=None
    )
    checkpoint = Checkpoint(tmp_path / "tag")
    assert list(checkpoint.state_dict()) == ["weight"]
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "model.ckpt")
    exported = torch.load(tmp_path / "model.ckpt", weights_only=True)
    for loaded in (checkpoint.lightning_checkpoint(), exported):
        assert list(loaded["state_dict"]) == ["weight"]
        state = loaded["callbacks"]["Average"]
        for name, expected in (("average", average), ("empty", empty)):
            assert type(state[name]) is Tensor
            assert state[name].dtype == expected.dtype
            assert torch.equal(state[name], expected)
