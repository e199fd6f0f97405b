"""DCP directories that are damaged, incomplete, or a weapon: a named error, and nothing is left behind."""

import contextlib
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from lightning_zero import import_fsdp_checkpoint
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.cli import main
from lightning_zero.errors import (
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsupportedModelError,
    UntrustedContentError,
    ZeroError,
)
from tests.attacks.forge import Bomb, flip, pickled, saved, sparse
from tests.checkpoint.fsdp.forger import edit, forge, optimizer_state, training
from tests.checkpoint.imports import assert_refused, state_of

FILE = "__1_0.distcp"
WEIGHT = "model.into.weight"


def state(**more: Any) -> dict[str, Any]:
    module, optimizer = training()
    return {"model": module.state_dict(), "optimizer": optimizer_state(module, optimizer), **more}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return forge(tmp_path / "theirs" / "step-5", state())


refuses = partial(assert_refused, import_fsdp_checkpoint)


BOMBS: dict[str, Callable[[dict[str, Any], Bomb], object]] = {
    "beside the module": lambda state, bomb: state.update(mine=bomb),
    "in the module": lambda state, bomb: state["model"].update(_extra_state=bomb),
    "in a tensor's place": lambda state, bomb: state["model"].update({"into.weight": bomb}),
    "in a setting's place": lambda state, bomb: state["optimizer"]["param_groups"][0].update(lr=bomb),
    "in the parameters' place": lambda state, bomb: state["optimizer"]["param_groups"][0].update(params=bomb),
    "in a state's place": lambda state, bomb: state["optimizer"]["state"]["into.weight"].update(exp_avg=bomb),
    "in a step's place": lambda state, bomb: state["optimizer"]["state"]["into.weight"].update(step=bomb),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_doesnt_go_off(bomb: str, weights_only: bool, tmp_path: Path) -> None:
    content = state()
    BOMBS[bomb](content, Bomb(tmp_path / "sign"))
    source = forge(tmp_path / "theirs" / "step-5", content)
    if weights_only:
        refuses(source, ZeroError, ".")
    else:  # it is carried over, or in the way of what is needed; and isn't executed
        with contextlib.suppress(CorruptCheckpointError, UnsupportedModelError, CheckpointMismatchError):
            path = import_fsdp_checkpoint(source, tmp_path / "ours", weights_only=False)
            Checkpoint(path).trainer_content(weights_only=False)
    assert not (tmp_path / "sign").exists()


@pytest.mark.parametrize("bomb", ["beside the module", "in a setting's place"])
def test_a_bomb_is_named_with_the_way_to_trust_it(bomb: str, tmp_path: Path) -> None:
    content = state()
    BOMBS[bomb](content, Bomb(tmp_path / "sign"))
    refuses(forge(tmp_path / "theirs" / "step-5", content), UntrustedContentError, r"posix\.mkdir.*weights_only=False")


def test_a_bomb_in_lightnings_dict(source: Path, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "sign")
    torch.save({"pytorch-lightning_version": "2.6.0", "epoch": 0, "global_step": 5, "x": bomb}, source / "meta.pt")
    refuses(source, UntrustedContentError, r"posix\.mkdir")
    for content in (saved(bomb), saved([1]), pickled(bomb), b""):
        (source / "meta.pt").write_bytes(content)
        refuses(source, CorruptCheckpointError, r"meta\.pt")
    assert not (tmp_path / "sign").exists()


def test_a_bomb_in_the_metadata(source: Path, tmp_path: Path) -> None:
    whole, bomb = (source / ".metadata").read_bytes(), Bomb(tmp_path / "sign")
    for protocol in (2, 4, 5):
        (source / ".metadata").write_bytes(pickle.dumps(bomb, protocol))
        refuses(source, CorruptCheckpointError, r"\.metadata is not what")
    for where in ("planner_data", "storage_data", "state_dict_metadata"):
        (source / ".metadata").write_bytes(whole)
        edit(source, lambda metadata, where=where: setattr(metadata, where, bomb))
        refuses(source, CorruptCheckpointError, where)
        (source / ".metadata").write_bytes(whole)
        edit(source, lambda metadata, where=where: getattr(metadata, where).update({WEIGHT: bomb, "x": bomb}))
        refuses(source, CorruptCheckpointError, r"\.metadata")
    (source / ".metadata").write_bytes(whole)
    edit(source, lambda metadata: setattr(metadata, "storage_meta", bomb))  # which nobody needs
    import_fsdp_checkpoint(source, tmp_path / "ours")
    assert not (tmp_path / "sign").exists()


def place(metadata: Metadata, name: str = WEIGHT, row: int | None = 8) -> Any:
    return metadata.storage_data[MetadataIndex(name, None if row is None else [row, 0])]


def chunks(metadata: Metadata) -> list[ChunkStorageMetadata]:
    found: Any = metadata.state_dict_metadata[WEIGHT]
    return found.chunks


def swap(metadata: Metadata) -> None:
    one, other = place(metadata), place(metadata, "model.frozen.weight")
    vars(one)["offset"], vars(other)["offset"] = other.offset, one.offset
    vars(one)["length"], vars(other)["length"] = other.length, one.length


def chunk(metadata: Metadata, number: int, offsets: list[int], sizes: list[int]) -> None:
    chunks(metadata)[number] = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def wide(metadata: Metadata) -> None:
    found: Any = metadata.state_dict_metadata[WEIGHT]
    found.size = torch.Size([2**62, 8])


CORRUPT, INCOMPLETE, UNSUPPORTED = CorruptCheckpointError, IncompleteCheckpointError, UnsupportedModelError
CHANGES: dict[str, tuple[type[ZeroError], str, Callable[[Metadata], object]]] = {
    "a path that leaves": (CORRUPT, "no name", lambda m: vars(place(m)).update(relative_path="../step-5/__1_0.distcp")),
    "an absolute path": (CORRUPT, "/etc/passwd", lambda m: vars(place(m)).update(relative_path="/etc/passwd")),
    "another file of it": (CORRUPT, "no name", lambda m: vars(place(m)).update(relative_path="meta.pt")),
    "a path with a line break": (CORRUPT, "no name", lambda m: vars(place(m)).update(relative_path=f"{FILE}\n")),
    "a path that is none": (CORRUPT, "relative_path", lambda m: vars(place(m)).update(relative_path=None)),
    "a file that isn't there": (INCOMPLETE, "__9_0", lambda m: vars(place(m)).update(relative_path="__9_0.distcp")),
    "a negative offset": (CORRUPT, "offset", lambda m: vars(place(m)).update(offset=-1)),
    "an offset behind the end": (INCOMPLETE, FILE, lambda m: vars(place(m)).update(offset=2**62)),
    "an offset without end": (CORRUPT, "offset", lambda m: vars(place(m)).update(offset=2**70)),
    "an offset that is half": (CORRUPT, "offset", lambda m: vars(place(m)).update(offset=1.5)),
    "no length": (CORRUPT, FILE, lambda m: vars(place(m)).update(length=0)),
    "a negative length": (CORRUPT, "length", lambda m: vars(place(m)).update(length=-5)),
    "a shorter length": (CORRUPT, FILE, lambda m: vars(place(m)).update(length=place(m).length - 100)),
    "a larger length": (CORRUPT, "overlap", lambda m: vars(place(m)).update(length=place(m).length + 1)),
    "one archive twice": (CORRUPT, "overlap", lambda m: vars(place(m)).update(vars(place(m, row=16)))),
    "another's archive": (CORRUPT, "different saves", swap),
    "compression": (UNSUPPORTED, "zstd", lambda m: vars(place(m)).update(transform_descriptors=["stream.zstd"])),
    "Hugging Face's layout": (UNSUPPORTED, "Hugging", lambda m: vars(place(m)).update(relative_path="a.safetensors")),
    "a chunk that isn't stored": (INCOMPLETE, WEIGHT, lambda m: m.storage_data.pop(MetadataIndex(WEIGHT, [8, 0]))),
    "an object that isn't stored": (
        INCOMPLETE,
        "lr",
        lambda m: m.storage_data.pop(MetadataIndex("optimizer.param_groups.0.lr")),
    ),
    "a chunk less": (INCOMPLETE, r"from 64 of 'into\.weight'", lambda m: chunks(m).pop(1)),
    "a chunk twice": (CORRUPT, r"element 64 of 'into\.weight'.*twice", lambda m: chunks(m).append(chunks(m)[1])),
    "chunks that overlap": (CORRUPT, "twice", lambda m: chunk(m, 0, [0, 0], [9, 8])),
    "a chunk that leaves": (CORRUPT, "isn't within", lambda m: chunk(m, 2, [16, 0], [9, 8])),
    "a chunk without end": (CORRUPT, "isn't within", lambda m: chunk(m, 2, [16, 0], [2**62, 8])),
    "a chunk of another shape": (CORRUPT, "isn't within", lambda m: chunk(m, 2, [16], [8])),
    "chunks that are none": (CORRUPT, "chunks", lambda m: setattr(m.state_dict_metadata[WEIGHT], "chunks", 3)),
    "a shape without end": (INCOMPLETE, r"'into\.weight' are stored nowhere", wide),
    "another dtype": (
        CORRUPT,
        "BF16",
        lambda m: setattr(m.state_dict_metadata[WEIGHT].properties, "dtype", torch.bfloat16),
    ),
    "a dtype that there isn't": (
        UNSUPPORTED,
        "dtype",
        lambda m: setattr(m.state_dict_metadata[WEIGHT].properties, "dtype", torch.quint8),
    ),
    "a name less": (CORRUPT, "paths", lambda m: m.planner_data.pop(WEIGHT)),
    "a path of another name": (CORRUPT, "is the path", lambda m: m.planner_data.update({WEIGHT: ("model", "x")})),
    "a path that is a number": (CORRUPT, "no path", lambda m: m.planner_data.update({WEIGHT: 3})),
    "no paths": (CORRUPT, "planner_data", lambda m: setattr(m, "planner_data", None)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_metadata_that_is_wrong(change: str, source: Path) -> None:
    error, match, make = CHANGES[change]
    edit(source, make)
    refuses(source, error, match)


def of_weight(state: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = state["optimizer"]["state"]["into.weight"]
    return found


CONTENTS: dict[str, tuple[type[ZeroError], str, Callable[[dict[str, Any]], object]]] = {
    "a parameter more": (
        CheckpointMismatchError,
        "'x'",
        lambda state: state["optimizer"]["param_groups"][0]["params"].append("x"),
    ),
    "a state of no parameter": (CORRUPT, "'x'", lambda state: state["optimizer"]["state"].update(x={"exp_avg": 1})),
    "a state within a state": (CORRUPT, "'b'", lambda state: of_weight(state).update(a={"b": 1})),
    "a state with a path for a name": (CORRUPT, "a/b", lambda state: of_weight(state).update({"a/b": 1})),
    "a state that is a list": (UNSUPPORTED, "list", lambda state: of_weight(state).update(exp_avg=[0.0])),
    "a state of another shape": (UNSUPPORTED, "exp_avg", lambda state: of_weight(state).update(exp_avg=torch.ones(3))),
    "a step that is none": (CORRUPT, "'step'", lambda state: of_weight(state).update(step="five")),
    "a negative step": (CORRUPT, "'step'", lambda state: of_weight(state).update(step=torch.tensor(-5.0))),
    "an infinite step": (CORRUPT, "'step'", lambda state: of_weight(state).update(step=torch.tensor(torch.inf))),
    "a step of many": (UNSUPPORTED, "'step'", lambda state: of_weight(state).update(step=torch.ones(5))),
    "parameters that are none": (
        CORRUPT,
        "param groups",
        lambda state: state["optimizer"]["param_groups"][0].update(params="all"),
    ),
    "parameters that are numbers": (
        CORRUPT,
        "param groups",
        lambda state: state["optimizer"]["param_groups"][0].update(params=[0, 1]),
    ),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_contents_that_dont_fit_together(content: str, tmp_path: Path) -> None:
    error, match, make = CONTENTS[content]
    made = state()
    make(made)
    refuses(forge(tmp_path / "theirs" / "step-5", made), error, match)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_file_that_was_cut_short(part: float, source: Path) -> None:
    os.truncate(source / FILE, int(part * (source / FILE).stat().st_size))
    refuses(source, IncompleteCheckpointError, f"{FILE} was cut short")


def test_a_file_that_is_missing_or_something_else(source: Path, tmp_path: Path) -> None:
    (source / FILE).rename(tmp_path / "elsewhere")
    refuses(source, IncompleteCheckpointError, FILE)
    (source / FILE).symlink_to(tmp_path / "elsewhere")
    refuses(source, IncompleteCheckpointError, f"{FILE}.*symbolic")
    (source / FILE).unlink()
    os.mkfifo(source / FILE)
    refuses(source, IncompleteCheckpointError, "not a plain file")


def test_a_save_that_did_not_come_to_its_end(source: Path, tmp_path: Path) -> None:
    (source / ".metadata").rename(tmp_path / "metadata")
    refuses(source, IncompleteCheckpointError, r"\.metadata.*written last")
    (source / ".metadata").symlink_to(tmp_path / "metadata")
    refuses(source, IncompleteCheckpointError, "symbolic")
    for file in source.glob("*.distcp"):
        file.unlink()
    refuses(source, CheckpointNotFoundError, "holds no checkpoint")
    refuses(source / "nowhere", CheckpointNotFoundError, "is no directory")


def test_a_flipped_byte_is_found_by_the_sources_own_checksums(source: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((source / ".metadata").read_bytes())
    at = place(metadata, "model.frozen.weight")
    flip(source / at.relative_path, at.offset + at.length // 2)
    refuses(source, CorruptCheckpointError, f"{at.relative_path}.*checksum")
    import_fsdp_checkpoint(source, tmp_path / "ours", verify=False)


def test_a_byte_that_was_changed_in_a_description(source: Path, tmp_path: Path) -> None:
    """Whatever it makes of the description is a named error, if it is one."""
    random = Random(3)
    for name, turns in ((".metadata", 150), ("__0_0.distcp", 80)):
        whole = (source / name).read_bytes()
        for turn in range(turns):
            content = bytearray(whole)
            at = random.randrange(len(content))
            content[at] = random.choice([content[at] ^ (1 << random.randrange(8)), random.randrange(256)])
            (source / name).write_bytes(content)
            with contextlib.suppress(ZeroError):
                import_fsdp_checkpoint(source, tmp_path / "ours", f"{name[1:]}-{turn}", verify=turn % 2 == 0)
        (source / name).write_bytes(whole)


def test_a_size_that_is_only_claimed_takes_no_memory(source: Path) -> None:
    def claim(metadata: Metadata) -> None:
        last = max((at for at in metadata.storage_data.values() if at.relative_path == FILE), key=lambda at: at.offset)
        vars(last).update(length=(1 << 40) - last.offset)

    sparse(source / FILE, 1 << 40)
    edit(source, claim)
    refuses(source, CorruptCheckpointError, FILE)


def test_tags_that_are_none(source: Path, tmp_path: Path) -> None:
    for tag in ("../x", "", "latest", ".hidden"):
        refuses(source, ZeroError, "can't be a tag", tag=tag)


def test_theirs_stays_as_it_is(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state_of(tmp_path)
    for name in ("theirs", "theirs/step-5", "theirs/step-5/within/it"):
        with pytest.raises(CheckpointWriteError, match="stays as it is"):
            import_fsdp_checkpoint(source, tmp_path / name, "tag")
    assert main(["import-fsdp", str(source), str(source.parent)]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert state_of(tmp_path) == before
    import_fsdp_checkpoint(source, tmp_path / "ours")
    with pytest.raises(CheckpointWriteError, match="is a checkpoint already"):
        import_fsdp_checkpoint(source, tmp_path / "ours", module_only=True)
    assert Checkpoint(tmp_path / "ours" / "step-5", verify="full").manifest.optimizers
