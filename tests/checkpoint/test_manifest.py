"""The manifest: JSON both ways."""

import json
import pickle

import msgspec
import numpy as np
import pytest

from lightning_zero.checkpoint.manifest import (
    Entry,
    FileEntry,
    Manifest,
    OptimizerEntry,
    StoredTensor,
    StoredValue,
    TrainerFile,
)
from lightning_zero.errors import CorruptCheckpointError
from tests.attacks.forge import seal

DIGEST = "0123456789abcdef"


def manifest_of(count: int) -> Manifest:
    tensors = []
    for number in range(count):
        name = f"layer.{number}.weight"
        base = {"name": name, "start": 0, "stop": 2, "dtype": "F32", "xxh3": DIGEST}
        tensors += [
            StoredTensor("model", shape=(2,), offset=64 + 12 * number, nbytes=8, **base),
            StoredTensor("optimizer", shape=(), offset=72 + 12 * number, nbytes=4, optimizer=0, state="step", **base),
        ]
    names = tuple(f"layer.{number}.weight" for number in range(count))
    values = (StoredValue(0, names[0], 0, 2, "inf", float("inf")), StoredValue(0, names[0], 0, 2, "none", None))
    file = FileEntry("rank-0.safetensors", 0, 7, False, 64 + 12 * count, 64, DIGEST, tuple(tensors), values)
    return Manifest(
        format_version=1,
        save_id="x",
        step=7,
        epoch=1,
        world_size=1,
        stage=2,
        created="2026-01-01T00:00:00+00:00",
        versions={"torch": "2.6"},
        entries=tuple(Entry(name, (2,), "bfloat16", "parameter") for name in names),
        aliases={"tied": names[0]},
        optimizers=(OptimizerEntry("AdamW", (names,)),),
        files=(file,),
        trainer=TrainerFile("trainer.pt", 3, DIGEST),
    )


def test_what_is_written_is_what_is_read() -> None:
    manifest = manifest_of(5)
    assert Manifest.from_json(manifest.to_json(), "m") == manifest


def backwards(item: object) -> object:
    """The same JSON with the members of every object in the opposite order."""
    if isinstance(item, dict):
        return {name: backwards(item[name]) for name in reversed(item)}
    return [backwards(element) for element in item] if isinstance(item, list) else item


def test_the_order_of_members_means_nothing() -> None:
    parsed = json.loads(manifest_of(5).to_json())
    del parsed["manifest_xxh3"]
    assert Manifest.from_json(seal(backwards(parsed)), "m") == manifest_of(5)


def test_a_report_travels_as_it_is() -> None:
    file = manifest_of(5).files[0]
    assert pickle.loads(pickle.dumps(file)) == file


def test_the_text_is_strict_json_with_a_line_for_each_tensor() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = manifest_of(5).to_json()
    json.loads(text, parse_constant=refuse)
    assert sum('"kind"' in line for line in text.splitlines()) == 10


def test_numbers_of_numpys_and_what_json_has_no_number_for_are_values_too() -> None:
    manifest = manifest_of(1)
    given = (np.float64(0.1), float("-inf"), 2**80, "text", True, None)
    values = tuple(StoredValue(0, "layer.0.weight", 0, 2, f"state{i}", value) for i, value in enumerate(given))
    file = msgspec.structs.replace(manifest.files[0], values=values)
    read = Manifest.from_json(msgspec.structs.replace(manifest, files=(file,)).to_json(), "m")
    assert [value.value for value in read.files[0].values] == [0.1, float("-inf"), 2**80, "text", True, None]


def test_a_later_format_says_that_it_is_one() -> None:
    parsed = json.loads(manifest_of(1).to_json()) | {"format_version": 2, "compression": "zstd"}
    del parsed["manifest_xxh3"]
    with pytest.raises(CorruptCheckpointError, match=r"m: .* format version 2, .* upgrade"):
        Manifest.from_json(seal(parsed), "m")


def test_a_field_of_another_type_is_named() -> None:
    parsed = json.loads(manifest_of(1).to_json())
    del parsed["manifest_xxh3"]
    parsed["files"][0]["tensors"][1]["offset"] = -1
    with pytest.raises(CorruptCheckpointError, match=r"m: .*files\[0\].tensors\[1\].offset"):
        Manifest.from_json(seal(parsed), "m")


def test_the_key_of_a_tensor_says_what_it_is() -> None:
    tensors = manifest_of(1).files[0].tensors
    assert [tensor.key for tensor in tensors] == ["model/layer.0.weight[0:2]", "optimizer/0/step/layer.0.weight[0:2]"]
    assert [tensor.elementwise for tensor in tensors] == [True, False]


def test_a_step_of_one_element_is_still_whole() -> None:
    assert not StoredTensor("optimizer", "p", 0, 1, "F32", (), 0, 4, DIGEST, 0, "step").elementwise


@pytest.mark.parametrize("position", range(0, 1400, 7))
def test_a_flipped_bit_anywhere_in_the_manifest_is_found(position: int) -> None:
    content = bytearray(manifest_of(2).to_json().encode())
    position %= len(content)
    content[position] ^= 1
    with pytest.raises(CorruptCheckpointError, match="m: "):
        Manifest.from_json(content.decode(), "m")
