"""Damage without an attacker: bits that flip, files that are cut, lost, swapped or grown. Nothing of it loads silently.

| damage | `verify` (command) | load, `full` | load, `sizes` | load, `none` | an export |
|---|---|---|---|---|---|
| a flipped bit in a manifest, a header, `trainer.pt` | found | found | found | manifest, `trainer.pt` | found |
| a flipped bit in a tensor | found | found | only in a rank's own state, when read | as `sizes` | found, if read |
| a file cut short, lost, swapped | found | found | found | when it is read | found |
| a flipped bit in `latest` | found | another tag is taken, loudly | the same | the same | the same |
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.damage.__main__ import DAMAGES, damage, train
from lightning_zero.checkpoint import read_ahead, reader
from lightning_zero.checkpoint.export import convert_zero_checkpoint_to_fp32_state_dict as convert
from lightning_zero.checkpoint.integrity import Depth
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.resolution import resolve
from lightning_zero.checkpoint.state_dict import (
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)
from lightning_zero.errors import CorruptCheckpointError, IncompleteCheckpointError, ZeroError
from tests.attacks.entrances import command, module, read_all
from tests.attacks.forge import flip, read_json, replace
from tests.checkpoint.sample import Sample
from tests.launch import run_ranks

SHARDS = ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
FILES = ["manifest.json", "trainer.pt", *SHARDS, "frozen-00000-of-00002.safetensors"]
FLIPS = 60


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: each damage is mended again."""
    return Sample(world_size=2, trainer={"run": 0}).save(tmp_path_factory.mktemp("damage") / "ckpts" / "tag")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another save, of the same step and the same sizes."""
    return Sample(world_size=2, seed=1, trainer={"run": 1}).save(tmp_path_factory.mktemp("other") / "tag")


@pytest.fixture(autouse=True)
def _mended(sound: Path, tmp_path: Path) -> Iterator[None]:
    shutil.copytree(sound.parent, tmp_path / "kept")
    yield
    shutil.rmtree(sound.parent)
    shutil.copytree(tmp_path / "kept", sound.parent)


def found_by_verify(tag: Path, name: str) -> bool:
    status, out, err = command("verify", tag if name != "latest" else tag.parent)
    return status == 1 and name in out + err


def load(tag: Path, verify: Depth) -> None:
    checkpoint = Checkpoint(tag, verify=verify)
    read_all(checkpoint.lightning_checkpoint()["state_dict"].values())
    for rank in range(2):
        checkpoint.rank_state(rank)


def refuses(tag: Path, verify: Depth) -> bool:
    try:
        load(tag, verify)
    except (IncompleteCheckpointError, CorruptCheckpointError):
        return True
    return False


@pytest.mark.parametrize("name", FILES)
def test_a_bit_that_flips_anywhere_in_any_file_is_found(name: str, sound: Path) -> None:
    whole, at_random = (sound / name).read_bytes(), random.Random(name)
    entry = next((file for file in read_json(sound)["files"] if file["name"] == name), None)
    # The edges are where a comparison would be off by one
    positions = {0, 1, len(whole) - 1, *(at_random.randrange(len(whole)) for _ in range(FLIPS))}
    positions |= {entry["header_nbytes"] - 1, entry["header_nbytes"]} if entry else set()
    for position in sorted(positions):
        flip(sound / name, position, at_random.randrange(8))
        assert found_by_verify(sound, name), position
        assert refuses(sound, "full"), position
        if entry is None or position < entry["header_nbytes"]:
            assert refuses(sound, "sizes"), position
        replace(sound / name, whole)
    assert not refuses(sound, "full")


EXPORTS: dict[str, tuple[set[str], Callable[[Path, Path], object]]] = {
    "m.ckpt": ({"model"}, convert),
    "whole.ckpt": ({"model", "optimizer"}, lambda tag, output: convert(tag, output, with_optimizer=True)),
    "narrow.ckpt": ({"model"}, lambda tag, output: convert(tag, output, dtype="bf16")),
    "m.safetensors": ({"model"}, convert),
    "folder": ({"model"}, lambda tag, output: convert(tag, output, max_shard_size="1KB")),
    "in memory": ({"model"}, lambda tag, output: get_fp32_state_dict_from_zero_checkpoint(tag)),
    "into a module": ({"model"}, lambda tag, output: load_state_dict_from_zero_checkpoint(module(), tag)),
}
"""The kinds of tensors that each reads, and how it is done."""


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_finds_a_bit_that_flips_in_what_it_reads_and_leaves_nothing(
    name: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(reader, "_CHECKED_BYTES", 300)
    kinds, export = EXPORTS[name]
    output = tmp_path / "out" / name
    found: set[str] = set()
    for file in read_json(sound)["files"]:
        whole = (sound / file["name"]).read_bytes()
        for tensor in file["tensors"]:
            of_callbacks = tensor["name"] == "<average>" and output.suffix != ".ckpt"
            of_another_copy = tensor.get("state") in ("step", "factors")  # which the first piece's stands for
            if tensor["kind"] not in kinds or of_callbacks or of_another_copy:
                continue
            for position in (tensor["offset"], tensor["offset"] + tensor["nbytes"] - 1):
                flip(sound / file["name"], position)
                with pytest.raises(CorruptCheckpointError) as raised:
                    export(sound, output)
                assert f"{file['name']}: '" in str(raised.value)
                assert f"/{tensor['name']}[{tensor['start']}:{tensor['stop']}]'" in str(raised.value)
                assert not output.parent.exists() or not os.listdir(output.parent)
                replace(sound / file["name"], whole)
            found.add(tensor["kind"])
    assert found == kinds
    export(sound, output)


def test_a_bit_that_flips_in_latest_is_found(sound: Path) -> None:
    latest = sound.parent / "latest"
    whole = latest.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            flip(latest, position, bit)
            assert found_by_verify(sound, "latest"), (position, bit)
            with pytest.warns(UserWarning, match="newest sound checkpoint"):
                assert resolve(sound.parent) == sound
    replace(latest, whole)


def cut(position: Callable[[int], int]) -> Callable[[Path, Path], object]:
    return lambda path, other: os.truncate(path, position(path.stat().st_size))


LOSSES: dict[str, Callable[[Path, Path], object]] = {
    "lost": lambda path, other: path.unlink(),
    "cut to nothing": cut(lambda size: 0),
    "cut to 7 bytes": cut(lambda size: 7),
    "cut in the middle": cut(lambda size: size // 2),
    "cut by a byte": cut(lambda size: size - 1),
    "filled up with zeros after a cut": lambda path, other: (
        replace(path, path.read_bytes()[: path.stat().st_size // 4].ljust(path.stat().st_size, b"\0")),
    ),
    "one byte longer": lambda path, other: os.truncate(path, path.stat().st_size + 1),
    "of another save": lambda path, other: replace(path, (other / path.name).read_bytes()),
}


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_missed_that_is(how: str, name: str, sound: Path, other: Path) -> None:
    LOSSES[how](sound / name, other)
    if name == "manifest.json" and how in ("lost", "of another save"):
        # `verify` of a directory without a manifest, or with another's, blames what it can
        assert command("verify", sound)[0] == 1
    else:
        assert found_by_verify(sound, name)
    assert refuses(sound, "full")
    if how != "filled up with zeros after a cut" or not name.endswith(".safetensors"):
        assert refuses(sound, "sizes")
    with pytest.raises(ZeroError):
        resolve(sound.parent, verify="full")


def test_shards_that_were_swapped_are_found_without_reading_the_tensors(sound: Path) -> None:
    one, two = (sound / name for name in SHARDS)
    content = one.read_bytes()
    replace(one, two.read_bytes())
    replace(two, content)
    assert found_by_verify(sound, one.name)
    assert found_by_verify(sound, two.name)
    assert refuses(sound, "full")
    assert refuses(sound, "sizes")


def test_shards_of_one_size_that_were_swapped_are_found_by_their_headers(tmp_path: Path) -> None:
    tag = Sample(world_size=2, shapes={"p": (64,)}).save(tmp_path / "tag")
    one, two = (tag / name for name in SHARDS)
    before, after = one.read_bytes(), two.read_bytes()
    size = min(len(before), len(after))
    replace(one, after[:size].ljust(len(before), b"\0"))
    replace(two, before[:size].ljust(len(after), b"\0"))
    assert refuses(tag, "sizes")
    assert found_by_verify(tag, one.name)


def test_every_file_of_a_checkpoint_is_damaged_here(sound: Path) -> None:
    assert {path.name for path in sound.iterdir()} == {*FILES, "frozen-00001-of-00002.safetensors"}


def test_a_sound_checkpoint_is_loaded_by_all(sound: Path, other: Path) -> None:
    """Otherwise every damage would seem to be found."""
    for tag in (sound, other):
        assert command("verify", tag)[0] == 0
        for verify in ("none", "sizes", "full"):
            load(tag, verify)


def test_no_damage_to_a_checkpoint_of_a_training_is_missed(tmp_path: Path) -> None:
    """The short form of `python -m benchmarks.damage`."""
    run_ranks(train, 2, tmp_path, process_group=False)
    missed, counts = damage(tmp_path, 60, seed=0)
    assert not missed
    assert all(counts[how, "all"] for how in DAMAGES)
    assert counts["a bit flipped", "sizes"] < counts["a bit flipped", "full"]  # so a damage can be missed at all
