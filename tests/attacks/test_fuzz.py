"""Whatever is changed at random, with the seal broken or made right again, comes out as it was or as a named error."""

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_zero.checkpoint.integrity import find_problems, read_manifest
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.manifest import Manifest
from lightning_zero.checkpoint.state_dict import get_fp32_state_dict_from_zero_checkpoint
from lightning_zero.errors import CorruptCheckpointError, ZeroError
from tests.attacks.entrances import READING, enter_all
from tests.attacks.forge import (
    Json,
    archived_pickle,
    pickled,
    read_json,
    replace,
    seal,
    seal_text,
    set_header,
    set_rank_state,
    set_trainer,
)
from tests.checkpoint.sample import Sample

TRAINER = dict(Sample(world_size=2).shared.trainer)


def fuzz(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same examples in every run: a test that fails here fails everywhere."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.fixture(scope="module")
def original(scene: Path) -> Path:
    return scene / "ckpts" / "tag"


@contextlib.contextmanager
def copied(original: Path) -> Iterator[Path]:
    """A scene for one example."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(original.parent.parent, Path(folder, "scene"))
        yield Path(folder, "scene", "ckpts", original.name)


# ---------------------------------------------------------------------------------------------- the manifest

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 10**30]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=4),
    st.sampled_from(["../x", "/etc/passwd", "\ud800", "a/b", "0" * 16, "bias", "scale", "empty", "state"]),
    st.sampled_from(["F32", "F64", "BF16", "I8", "C128", "float32", "bool", "model", "optimizer", "rank", "given"]),
    st.lists(st.integers(-1, 2**40), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in it."""
    keys: Any = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*path, key)
        yield from places(value[key], (*path, key))


@st.composite
def mutated(draw: st.DrawFn, manifest: Json) -> Json:
    """With a few of its values replaced, lost, doubled, nudged, or put in each other's place."""
    manifest = copy.deepcopy(manifest)
    for _ in range(draw(st.integers(1, 3))):
        *way, key = draw(st.sampled_from(list(places(manifest))))
        owner: Any = manifest
        for step in way:
            owner = owner[step]
        what = draw(st.sampled_from(["replace", "lose", "double", "nudge", "move"]))
        if what == "replace":
            owner[key] = draw(VALUES)
        elif what == "lose":
            del owner[key]
        elif what == "double" and isinstance(owner, list):
            owner.insert(draw(st.integers(0, len(owner))), copy.deepcopy(owner[key]))
        elif what == "nudge" and type(owner[key]) is int:
            owner[key] += draw(st.sampled_from([-1, 1, 4, 64, -64]))
        else:
            source: Any = manifest
            for step in draw(st.sampled_from(list(places(manifest)))):
                source = source[step]
            owner[key] = copy.deepcopy(source)
    return manifest


def test_a_manifest_with_any_values_exchanged_and_sealed_again_is_refused_by_name_or_good_everywhere(
    original: Path,
) -> None:
    manifest = read_json(original)
    accepted: list[str] = []

    @fuzz(250)
    @given(mutated(manifest))
    def attack(forged: Json) -> None:
        text = seal(forged)
        try:
            Manifest.from_json(text, "m")
        except ZeroError:
            return
        accepted.append(text)

    attack()
    for text in accepted[::8]:
        with copied(original) as tag:
            replace(tag / "manifest.json", text.encode())
            enter_all(tag)
    assert accepted, "every mutant was refused: the fuzzing reaches nothing behind the manifest"


EDITS = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=4)


def edited(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """With some bytes at each place taken out, and others put in."""
    for position, count, new in edits:
        position %= len(content) or 1
        content = content[:position] + new + content[position + count :]
    return content


def test_a_manifest_with_any_bytes_exchanged_is_refused_and_sealed_again_too_unless_it_is_good(original: Path) -> None:
    whole = (original / "manifest.json").read_bytes()
    body = whole[: whole.rindex(b",\n")]

    @fuzz(150)
    @given(EDITS)
    def attack(edits: list[tuple[int, int, bytes]]) -> None:
        mutant = edited(whole, edits).decode(errors="replace")
        if mutant.encode() != whole:
            with pytest.raises(CorruptCheckpointError):
                Manifest.from_json(mutant, "m")
        with contextlib.suppress(ZeroError):
            Manifest.from_json(seal_text(edited(body, edits).decode(errors="replace")), "m")

    attack()


# ------------------------------------------------------------------------------------------------- the shards


def test_any_bytes_in_a_shards_header_are_found_and_sealed_again_change_nothing(original: Path) -> None:
    """Where a tensor lies is in the manifest; nobody parses the header, so nothing in it can lead astray."""
    expected = get_fp32_state_dict_from_zero_checkpoint(original)
    size = read_json(original)["files"][0]["header_nbytes"]
    headers = st.binary(min_size=64, max_size=1024).map(lambda drawn: (drawn * size)[:size]) | st.builds(
        lambda length, text: (length.to_bytes(8, "little") + text)[:size].ljust(size),
        st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1, size]),
        st.sampled_from(
            [b"[" * size, b'{"a":' * size, b'{"__metadata__":1}', b'{"model/bias[0:19]":{"dtype":"F32","shape":[-1]}}']
        ),
    )

    @fuzz(10)
    @given(headers)
    def attack(header: bytes) -> None:
        with copied(original) as tag:
            shard = tag / read_json(tag)["files"][0]["name"]
            whole = shard.read_bytes()
            replace(shard, header + whole[size:])
            assert list(find_problems(tag, read_manifest(tag), "sizes"))
            set_header(tag, 0, header)
            assert not any(enter_all(tag).values())
            for name, tensor in get_fp32_state_dict_from_zero_checkpoint(tag).items():
                assert torch.equal(tensor, expected[name])

    attack()


def test_any_bytes_exchanged_in_any_file_come_out_as_named_errors(original: Path) -> None:
    names = [*(file["name"] for file in read_json(original)["files"]), "trainer.pt", "manifest.json", "../latest"]

    @fuzz(25)
    @given(st.sampled_from(names), EDITS)
    def attack(name: str, edits: list[tuple[int, int, bytes]]) -> None:
        with copied(original) as tag:
            whole = (tag / name).read_bytes()
            replace(tag / name, edited(whole, edits))
            outcomes = enter_all(tag)
            if edited(whole, edits) != whole and name != "../latest":
                for entrance in ("Checkpoint(verify='full')", "lightning-zero verify", "lightning-zero verify --tag"):
                    assert outcomes[entrance] is not None

    attack()


# ---------------------------------------------------------------------------------------------- trainer.pt


def test_any_bytes_exchanged_in_a_trainer_file_and_sealed_again_come_out_as_named_errors(original: Path) -> None:
    whole = (original / "trainer.pt").read_bytes()

    @fuzz(60)
    @given(EDITS)
    def attack(edits: list[tuple[int, int, bytes]]) -> None:
        with copied(original) as tag:
            set_trainer(tag, edited(whole, edits))
            _read_and_export(tag)

    attack()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_bytes_exchanged_in_the_pickle_itself_come_out_as_named_errors(original: Path) -> None:
    whole = pickled(TRAINER)

    @fuzz(100)
    @given(EDITS)
    def attack(edits: list[tuple[int, int, bytes]]) -> None:
        content = archived_pickle(edited(whole, edits))
        with copied(original) as tag:
            set_trainer(tag, content)
            set_rank_state(tag, 0, content)
            _read_and_export(tag)

    attack()


def _read_and_export(tag: Path) -> None:
    for enter in (READING["Checkpoint(verify='sizes')"], READING["convert to .ckpt"]):
        try:
            enter(tag)
        except ZeroError:
            continue


def test_a_checkpoint_that_nothing_was_done_to_is_not_an_error(original: Path) -> None:
    with copied(original) as tag:
        assert not any(enter_all(tag).values())
        assert edited(b"abc", [(1, 1, b"x")]) == b"axc"
    with pytest.raises(CorruptCheckpointError):
        Manifest.from_json(seal({}), "m")
    assert Checkpoint(original, verify="full").manifest.world_size == 2
