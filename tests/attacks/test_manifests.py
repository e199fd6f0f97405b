"""Manifests that were made up or edited, and sealed again: every one is refused, with the place named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from lightning_zero.checkpoint.manifest import Manifest
from lightning_zero.errors import CorruptCheckpointError, IncompleteCheckpointError
from tests.checkpoint.sample import Sample

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tag = Sample(world_size=2).save(tmp_path_factory.mktemp("sample") / "tag")
    parsed: dict[str, Any] = json.loads((tag / "manifest.json").read_text())
    del parsed["manifest_xxh3"]
    return parsed


def seal(content: object) -> str:
    body = json.dumps(content)[:-1]
    return f'{body},\n"manifest_xxh3": "{xxhash.xxh3_64_hexdigest(body.encode())}"\n}}\n'


def tensor(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["files"][0]["tensors"][3]
    return found


NAMES = ["../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", ".hidden", "manifest.json", "trainer.pt", "a\0b", "a\nb"]

EDITS: dict[str, Edit] = {
    "an unknown key": lambda m: m.update(extra=1),
    "a missing key": lambda m: m.pop("step"),
    "a missing key in a tensor": lambda m: tensor(m).pop("dtype"),
    "an unknown key in a file": lambda m: m["files"][0].update(path="x"),
    "a string for a number": lambda m: m.update(step="3"),
    "a bool for a number": lambda m: m.update(step=True),
    "a float for a number": lambda m: m.update(epoch=1.5),
    "a negative step": lambda m: m.update(step=-1),
    "a list for an object": lambda m: m.update(trainer=[]),
    "a tensor that is a list": lambda m: m["files"][0]["tensors"].__setitem__(0, []),
    "a negative offset": lambda m: tensor(m).update(offset=-1),
    "a huge size": lambda m: tensor(m).update(nbytes=2**70),
    "a size beyond the file": lambda m: m["files"][0].update(nbytes=100),
    "a hole between tensors": lambda m: tensor(m).update(offset=tensor(m)["offset"] + 4),
    "a huge header": lambda m: m["files"][0].update(header_nbytes=2**60),
    "a huge shape": lambda m: m["entries"][0].update(shape=[2**40] * 1000),
    "a negative shape": lambda m: m["entries"][0].update(shape=[-7, -5]),
    "a shape that is no list": lambda m: m["entries"][0].update(shape="75"),
    "another shape": lambda m: m["entries"][0].update(shape=[7, 6]),
    "a shape that is too small": lambda m: m["entries"][0].update(shape=[7, 4]),
    "an unknown dtype": lambda m: tensor(m).update(dtype="F31"),
    "another dtype": lambda m: m["entries"][-1].update(dtype="uint64"),
    "an unknown role": lambda m: m["entries"][0].update(role="king"),
    "an unknown kind": lambda m: tensor(m).update(kind="x"),
    "a digest that is none": lambda m: tensor(m).update(xxh3="../../../../etc/pa"),
    "an entry twice": lambda m: m["entries"].append(m["entries"][0]),
    "an entry that is stored nowhere": lambda m: m["entries"].append(dict(m["entries"][0], name="new")),
    "a stored tensor that is no entry": lambda m: m["entries"].pop(),
    "a shard less": lambda m: m["files"].pop(),
    "a shard twice": lambda m: m["files"].append(m["files"][0]),
    "ranks out of order": lambda m: m["files"].reverse(),
    "two shards in one file": lambda m: m["files"][1].update(name=m["files"][0]["name"]),
    "a world that is too large": lambda m: m.update(world_size=10**12),
    "a shard of another step": lambda m: m["files"][1].update(step=4),
    "a range stored twice": lambda m: m["files"][1].update(m["files"][0], rank=1, name="other"),
    "a range that is empty": lambda m: tensor(m).update(start=tensor(m)["stop"]),
    "an alias of nothing": lambda m: m["aliases"].update(x="nothing"),
    "an alias that is an entry": lambda m: m["aliases"].update(bias="scale"),
    "an alias that is no string": lambda m: m["aliases"].update(x=1),
    "state of an optimizer that isn't there": lambda m: m["optimizers"].clear(),
    "a parameter name that is none": lambda m: m["optimizers"][0]["parameters"].append([1]),
    "a value that is a list": lambda m: m["files"][0]["values"][0].update(value=[1]),
    "a value of an unknown float": lambda m: m["files"][0]["values"][0].update(value={"float": "1e999"}),
    "a future version": lambda m: m.update(format_version=2),
    **{f"a file named {name!r}": lambda m, name=name: m["files"][0].update(name=name) for name in NAMES},
}


@pytest.mark.parametrize("what", EDITS)
def test_a_manifest_is_refused_that_has(what: str, manifest: dict[str, Any]) -> None:
    edited = json.loads(json.dumps(manifest))
    EDITS[what](edited)
    with pytest.raises((CorruptCheckpointError, IncompleteCheckpointError), match=r"where/manifest\.json: ."):
        Manifest.from_json(seal(edited), "where/manifest.json")


def test_the_same_manifest_unedited_is_taken(manifest: dict[str, Any]) -> None:
    assert Manifest.from_json(seal(manifest), "x").world_size == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "\0" * 100,
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 10_000,
        "NaN",
        '{"step": NaN',
        "\ud800",
    ],
)
def test_text_that_is_no_manifest_is_refused(text: str) -> None:
    body = text[:-1] if text.endswith("}") else text
    digest = xxhash.xxh3_64_hexdigest(body.encode(errors="replace"))
    for candidate in (text, f'{body},\n"manifest_xxh3": "{digest}"\n}}\n'):
        with pytest.raises(CorruptCheckpointError, match="x: "):
            Manifest.from_json(candidate, "x")


def test_a_manifest_cut_short_anywhere_is_refused(manifest: dict[str, Any], tmp_path: Path) -> None:
    text = seal(manifest)
    for length in range(0, len(text), 97):
        with pytest.raises(CorruptCheckpointError):
            Manifest.from_json(text[:length], "x")
