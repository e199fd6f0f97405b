"""Manifests that were made up or edited, and sealed again: every one is refused, with the place named."""

import json
from pathlib import Path

import pytest

from lightning_zero.checkpoint.manifest import Manifest
from lightning_zero.errors import CorruptCheckpointError, IncompleteCheckpointError
from tests.attacks.entrances import enter_all, refused_everywhere
from tests.attacks.forge import Edit, Json, edit_manifest, read_json, replace, seal, seal_text


def tensor(manifest: Json) -> Json:
    found: Json = manifest["files"][0]["tensors"][3]
    return found


def state(manifest: Json, name: str) -> Json:
    """The first tensor of an optimizer's state of that name."""
    return next(item for item in manifest["files"][0]["tensors"] if item.get("state") == name)


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
    "a model's tensor that is an optimizer's": lambda m: tensor(m).update(optimizer=0),
    "a state of no name": lambda m: state(m, "step").pop("state"),
    "an unknown dtype": lambda m: tensor(m).update(dtype="F31"),
    "another dtype": lambda m: m["entries"][-1].update(dtype="uint64"),
    "an unknown role": lambda m: m["entries"][0].update(role="king"),
    "an unknown kind": lambda m: tensor(m).update(kind="x"),
    "a digest that is none": lambda m: tensor(m).update(xxh3="../../../../etc/pa"),
    "an entry twice": lambda m: m["entries"].append(m["entries"][0]),
    "an entry that is stored nowhere": lambda m: m["entries"].append(dict(m["entries"][0], name="new")),
    "a stored tensor that is no entry": lambda m: m["entries"].pop(),
    "a shard less": lambda m: m["files"].pop(1),
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
    "a rank's shard that is said to be frozen": lambda m: m["files"][0].update(frozen=True),
    "a rank's shard that is said to be frozen, twice": lambda m: m["files"].append(m["files"][0] | {"frozen": True}),
    "a frozen file that isn't said to be": lambda m: m["files"][2].update(frozen=False),
    "a frozen file that is 1": lambda m: m["files"][2].update(frozen=1),
    "a frozen file of no rank": lambda m: m["files"][2].update(rank=7),
    "two frozen files of one rank": lambda m: m["files"][2].update(rank=1),
    "a frozen file with a buffer in it": lambda m: next(
        entry for entry in m["entries"] if entry["name"] == "frozen"
    ).update(role="buffer"),
    "a frozen file with a value in it": lambda m: m["files"][2]["values"].append(m["files"][0]["values"].pop()),
    "a frozen file less": lambda m: m["files"].pop(),
    "a trainer file of no name": lambda m: m["trainer"].pop("name"),
    **{
        f"a trainer file named {name!r}": lambda m, name=name: m["trainer"].update(name=name)
        for name in ("../outside/evil/trainer.pt", "/etc/passwd", "", "manifest.json", "trainer-0.pt", "trainer.pt\n")
    },
    "a future version": lambda m: m.update(format_version=2),
    **{f"a file named {name!r}": lambda m, name=name: m["files"][0].update(name=name) for name in NAMES},
}


ODDITIES: dict[str, Edit] = {
    "half a surrogate pair for a name": lambda m: (
        m["entries"][5].update(name="\ud800"),
        [item.update(name="\ud800") for file in m["files"] for item in file["tensors"] if item["name"] == "frozen"],
    ),
    "a terminal's control codes in a name": lambda m: tensor(m).update(name="\x1b[2J\x1b]0;x\x07"),
    "control codes in what is for the record": lambda m: m.update(
        created="\x1b[2J", save_id="\x1b[2J", versions={"\x1b": "\n"}
    ),
    "a name of a million letters": lambda m: tensor(m).update(name="x" * 10**6),
    "a number of 4000 digits for a value": lambda m: m["files"][0]["values"][0].update(value=10**4000),
    "a step that is the largest": lambda m: (
        m.update(step=2**63 - 1),
        [file.update(step=2**63 - 1) for file in m["files"]],
    ),
    "an empty entry with a huge dimension": lambda m: m["entries"][2].update(shape=[2**62, 0]),
    "an entry with a thousand dimensions": lambda m: m["entries"][4].update(shape=[1] * 999 + [19]),
    "a whole state with a thousand dimensions": lambda m: [
        item.update(shape=[1] * 999 + [3])
        for file in m["files"]
        for item in file["tensors"]
        if item.get("state") == "factors"
    ],
    "a whole state of no elements and a huge dimension": lambda m: m["files"][0]["tensors"].append(
        state(m, "step")
        | {"state": "new", "shape": [2**61, 0], "nbytes": 0, "offset": m["files"][0]["nbytes"], "dtype": "C128"}
    ),
    "no optimizer's parameters": lambda m: m["optimizers"][0].update(parameters=[]),
    "more parameters than there are": lambda m: m["optimizers"][0]["parameters"].append(["x"] * 100),
    "a parameter a hundred times": lambda m: m["optimizers"][0].update(parameters=[["bias"] * 100]),
    "optimizers that the trainer doesn't know": lambda m: m["optimizers"].extend(m["optimizers"] * 3),
    "a thousand other names for a tensor": lambda m: m["aliases"].update({f"a{i}": "bias" for i in range(1000)}),
    "an entry's name that is the empty string": lambda m: m["aliases"].update({"": "bias"}),
    "names that are attributes of a module": lambda m: m["aliases"].update({"__class__": "bias", "_modules": "bias"}),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_manifest_is_refused_through_every_entrance_that_has(what: str, tag: Path) -> None:
    edit_manifest(tag, EDITS[what])
    text = (tag / "manifest.json").read_text()
    with pytest.raises((CorruptCheckpointError, IncompleteCheckpointError), match=r"where/manifest\.json: ."):
        Manifest.from_json(text, "where/manifest.json")
    refused_everywhere(tag)


@pytest.mark.parametrize("what", ODDITIES)
def test_nothing_but_a_named_error_comes_of_a_manifest_that_has(what: str, tag: Path) -> None:
    edit_manifest(tag, ODDITIES[what])
    enter_all(tag)


def test_the_same_manifest_sealed_again_is_let_in_everywhere(tag: Path) -> None:
    edit_manifest(tag, lambda manifest: None)
    assert not any(enter_all(tag).values())


TEXTS = {
    "nothing": "",
    "an empty object": "{}",
    "an empty list": "[]",
    "null": "null",
    "zeros": "\0" * 100,
    "lists without an end": "[" * 100_000,
    "objects without an end": '{"a":' * 100_000,
    "a number of 10000 digits": "1" * 10_000,
    "a constant that is no JSON": "NaN",
    "another": '{"step": NaN',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_that_is_no_manifest_is_refused(text: str, tag: Path) -> None:
    for candidate in (text, seal_text(text.removesuffix("}"))):
        replace(tag / "manifest.json", candidate.encode())
        with pytest.raises(CorruptCheckpointError, match="x: "):
            Manifest.from_json(candidate, "x")
        refused_everywhere(tag)


@pytest.mark.parametrize("field", ["trainer", "entries", "aliases", "stage", "files"])
def test_lists_in_lists_are_refused_however_deep(field: str, tag: Path) -> None:
    """The parser's own limit of depth, and that of whatever shows the value in a message, are two."""
    content = read_json(tag) | {field: "DEEP"}
    for depth in (10, 100, *range(800, 1010, 3), 2000, 20_000):
        nested = "[" * depth + "]" * depth
        for deep in (nested, f'{{"x": {nested}}}', f"[{nested}]"):
            text = seal_text(json.dumps(content)[:-1].replace('"DEEP"', deep))
            with pytest.raises(CorruptCheckpointError, match="x: "):
                Manifest.from_json(text, "x")


def test_half_a_surrogate_pair_in_the_text_is_refused() -> None:
    for text in ("\ud800", seal_text('{"step": "\ud800"')):
        with pytest.raises(CorruptCheckpointError, match="x: "):
            Manifest.from_json(text, "x")


def test_a_manifest_cut_short_anywhere_is_refused(tag: Path) -> None:
    text = seal(read_json(tag))
    for length in range(0, len(text), 97):
        with pytest.raises(CorruptCheckpointError):
            Manifest.from_json(text[:length], "x")
