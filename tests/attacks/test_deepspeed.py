"""DeepSpeed directories that are damaged, incomplete, or a weapon: a named error, and nothing is left behind."""

import contextlib
import os
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from lightning_zero import import_deepspeed_checkpoint
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
from tests.attacks.forge import Bomb, archived_pickle, flip, pickled, saved, sparse
from tests.checkpoint.deepspeed.forger import edit
from tests.checkpoint.deepspeed.training import assert_holds, trained
from tests.checkpoint.imports import assert_refused, state_of

MODEL = "mp_rank_00_model_states.pt"
OPTIMIZER = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL_3 = "zero_pp_rank_1_mp_rank_00_model_states.pt"


@pytest.fixture
def tag(tmp_path: Path) -> Path:
    return trained(stage=2).save(tmp_path / "theirs")


refuses = partial(assert_refused, import_deepspeed_checkpoint)


def legacy(content: object) -> bytes:
    path = Path("legacy")
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


BOMBS: dict[str, tuple[str, Callable[[dict[str, Any], Bomb], object]]] = {
    "in the client state": (MODEL, lambda model, bomb: model.update(mine=bomb)),
    "in a place that nobody needs": (MODEL, lambda model, bomb: model["ds_config"].update(mine=bomb)),
    "in a tensor's place": (MODEL, lambda model, bomb: model["module"].update({"into.weight": bomb})),
    "in a shape's place": (MODEL, lambda model, bomb: model["param_shapes"][0].update({"into.weight": bomb})),
    "in the scheduler": (MODEL, lambda model, bomb: model.update(lr_scheduler=bomb)),
    "in the optimizer's place": (OPTIMIZER, lambda saved, bomb: saved.update(optimizer_state_dict=bomb)),
    "beside the optimizer": (OPTIMIZER, lambda saved, bomb: saved.update(mine=bomb)),
    "in a master's place": (
        OPTIMIZER,
        lambda saved, bomb: saved["optimizer_state_dict"].update(single_partition_of_fp32_groups=[bomb, bomb]),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_doesnt_go_off(bomb: str, weights_only: bool, tag: Path, tmp_path: Path) -> None:
    name, place = BOMBS[bomb]
    edit(tag / name, lambda content: place(content, Bomb(tmp_path / "sign")))
    if weights_only:
        refuses(tag, UntrustedContentError, r"posix\.mkdir")
    else:  # it is carried over, left out, or in the way of what is needed; and isn't executed
        with contextlib.suppress(CorruptCheckpointError):
            import_deepspeed_checkpoint(tag, tmp_path / "ours", weights_only=False)
            Checkpoint(tmp_path / "ours" / tag.name).trainer_content(weights_only=False)
    assert not (tmp_path / "sign").exists()


@pytest.mark.parametrize(
    "content",
    [
        lambda bomb: saved(bomb),
        lambda bomb: archived_pickle(pickled(bomb)),
        lambda bomb: pickled(bomb),
        lambda bomb: legacy(bomb),
        lambda bomb: b"",
        lambda bomb: saved([1]),
        lambda bomb: saved({}),
    ],
    ids=["a bomb", "bare", "no archive", "legacy", "empty", "a list", "an empty dict"],
)
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_another_file_in_its_place(name: str, content: Any, tag: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tag / name).write_bytes(content(Bomb(tmp_path / "sign")))
    refuses(tag, ZeroError, name)
    assert not (tmp_path / "sign").exists()


def test_what_is_of_another_class_is_carried_over_only_on_request(tag: Path, tmp_path: Path) -> None:
    edit(tag / MODEL, lambda model: model.update(where=Path("/data")))
    refuses(tag, UntrustedContentError, r"pathlib(\._local)?\.PosixPath")
    with pytest.warns(UserWarning, match="weights_only=False"):
        import_deepspeed_checkpoint(tag, tmp_path / "ours", weights_only=False)
    trainer = Checkpoint(tmp_path / "ours" / tag.name).trainer(weights_only=False)
    assert trainer["lightning_zero_client_state"] == {"where": Path("/data")}


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_file_that_was_cut_short(name: str, part: float, tag: Path) -> None:
    os.truncate(tag / name, int(part * (tag / name).stat().st_size))
    refuses(tag, CorruptCheckpointError, name)


def test_a_flipped_byte_is_found_by_the_sources_own_checksums(tag: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tag / OPTIMIZER) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size if "/data/" in info.filename else 0)
    flip(tag / OPTIMIZER, largest.header_offset + 500)
    refuses(tag, CorruptCheckpointError, f"{OPTIMIZER}.*checksum")
    import_deepspeed_checkpoint(tag, tmp_path / "ours", verify=False)


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_a_byte_that_was_changed_in_a_description(name: str, tag: Path, tmp_path: Path) -> None:
    """Found by its checksum; and without that, whatever it makes of the description is a named error, if it is one."""
    whole = (tag / name).read_bytes()
    with zipfile.ZipFile(tag / name) as archive:
        described = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
    random = Random(3)
    for turn in range(300):
        content = bytearray(whole)
        place = described.header_offset + 200 + random.randrange(described.file_size - 200)
        content[place] = random.choice([content[place] ^ (1 << random.randrange(8)), random.randrange(256)])
        if content == whole:
            continue
        (tag / name).write_bytes(content)
        if turn < 20:
            refuses(tag, CorruptCheckpointError, "checksum|is not what torch.save writes")
        with contextlib.suppress(ZeroError):
            import_deepspeed_checkpoint(tag, tmp_path / f"ours{turn}", verify=False, weights_only=turn % 2 == 0)


def test_a_size_that_is_only_claimed_takes_no_memory(tag: Path) -> None:
    sparse(tag / OPTIMIZER, 1 << 40)
    refuses(tag, CorruptCheckpointError, OPTIMIZER)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_ranks_file_is_missing(stage: int, rank: int, tmp_path: Path) -> None:
    tag = trained(stage=stage).save(tmp_path / "theirs")
    (tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()
    refuses(tag, IncompleteCheckpointError, f"the optimizer of rank {rank}")
    for file in tag.glob("*optim_states.pt"):
        file.unlink()
    refuses(tag, IncompleteCheckpointError, "lacks")


def test_the_models_file_is_missing(tmp_path: Path) -> None:
    tag = trained(stage=2).save(tmp_path / "theirs")
    (tag / MODEL).unlink()
    refuses(tag, IncompleteCheckpointError, "the model of rank 0")
    tag = trained(stage=3).save(tmp_path / "theirs3")
    (tag / MODEL_3).unlink()
    refuses(tag, IncompleteCheckpointError, "the model of rank 1")


CHANGES: dict[str, tuple[int, str, Callable[[dict[str, Any]], object]]] = {
    "a larger shape": (2, MODEL, lambda model: model["param_shapes"][0].update({"into.weight": torch.Size([24, 9])})),
    "a smaller shape": (3, MODEL_3.replace("1", "0", 1), lambda model: model["param_shapes"][0].popitem()),
    "a shape that is none": (2, MODEL, lambda model: model["param_shapes"][0].update({"into.weight": -1})),
    "a shape without end": (2, MODEL, lambda model: model["param_shapes"][0].update(x=(2**62,) * 1000)),
    "a parameter more": (2, MODEL, lambda model: model["param_shapes"][0].update(x=torch.Size([3]))),
    "a group less": (2, MODEL, lambda model: model["param_shapes"].pop()),
    "a shorter master": (2, OPTIMIZER, lambda saved: masters(saved).insert(0, masters(saved).pop(0)[:-1].clone())),
    "no masters": (2, OPTIMIZER, lambda saved: masters(saved).clear()),
    "a shorter state": (2, OPTIMIZER, lambda saved: states(saved)[0].update(exp_avg=torch.zeros(3))),
    "a state that is a list": (2, OPTIMIZER, lambda saved: states(saved)[0].update(exp_avg=[0.0])),
    "another step": (2, OPTIMIZER, lambda saved: states(saved)[0].update(step=torch.tensor(4.0))),
    "a step that is none": (2, OPTIMIZER, lambda saved: states(saved)[0].update(step="five")),
    "a negative step": (2, OPTIMIZER, lambda saved: [state.update(step=-5) for state in states(saved).values()]),
    "a step without end": (2, OPTIMIZER, lambda saved: states(saved)[0].update(step=10**400)),
    "an infinite step": (2, OPTIMIZER, lambda saved: states(saved)[0].update(step=torch.tensor(float("inf")))),
    "a count without end": (2, MODEL, lambda model: model.update(global_steps=2**63)),
    "a state with a path for a name": (2, OPTIMIZER, lambda saved: states(saved)[0].update({"a/b": 1})),
    "no count": (2, MODEL, lambda model: model.update(global_steps=-1)),
    "more ranks than there can be": (
        2,
        OPTIMIZER.replace("1", "0", 1),
        lambda saved: saved["optimizer_state_dict"].update(partition_count=[2**40]),
    ),
    "a stage that there isn't": (
        2,
        OPTIMIZER.replace("1", "0", 1),
        lambda saved: saved["optimizer_state_dict"].update(zero_stage=7),
    ),
    "a shorter fragment": (
        3,
        MODEL_3,
        lambda model: model["frozen_param_fragments"].update({"frozen.bias": torch.zeros(2)}),
    ),
}


def masters(saved: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = saved["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    return found


def states(saved: dict[str, Any]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = saved["optimizer_state_dict"]["base_optimizer_state"]["state"]
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_dont_fit_together(change: str, tmp_path: Path) -> None:
    stage, name, make = CHANGES[change]
    tag = trained(stage=stage).save(tmp_path / "theirs")
    edit(tag / name, make)
    refuses(tag, (CorruptCheckpointError, IncompleteCheckpointError), ".")


def test_models_that_are_cut_over_ranks_are_named(tag: Path) -> None:
    for name, match in (
        ("mp_rank_01_model_states.pt", "tensor parallelism"),
        ("layer_3_expert_0_mp_rank_00_model_states.pt", "experts"),
        ("layer_00-model_00-model_states.pt", "layer"),
    ):
        shutil.copy(tag / MODEL, tag / name)
        refuses(tag, UnsupportedModelError, match)
        (tag / name).unlink()
    shutil.copy(tag / OPTIMIZER, tag / f"bf16_{OPTIMIZER}")
    refuses(tag, CorruptCheckpointError, "both")


def test_universal_checkpoints_are_named(tmp_path: Path) -> None:
    tag = trained(stage=2).save(tmp_path / "theirs")
    for file in tag.glob("zero_pp*"):
        file.unlink()
    (tag / "zero").mkdir()
    refuses(tag, UnsupportedModelError, "universal")


def test_experts_among_the_param_groups_are_named(tag: Path) -> None:
    edit(
        tag / OPTIMIZER,
        lambda saved: saved["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0].update(moe=True),
    )
    refuses(tag, UnsupportedModelError, "experts")


def test_without_zero_nothing_says_whose_a_state_is(tmp_path: Path) -> None:
    tag = trained(stage=0, world_size=1).save(tmp_path / "theirs")
    refuses(tag, CheckpointMismatchError, "module_only")
    edit(tag / MODEL, lambda model: model.update(optimizer={"fp32_groups_flat": [], "optimizer_state_dict": {}}))
    refuses(tag, UnsupportedModelError, "FP16_Optimizer")


def test_which_one_is_meant(tmp_path: Path) -> None:
    run, theirs, ours = trained(stage=2), tmp_path / "theirs", tmp_path / "ours"
    with pytest.raises(CheckpointNotFoundError, match="no directory"):
        import_deepspeed_checkpoint(theirs, ours)
    theirs.mkdir()
    with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint"):
        import_deepspeed_checkpoint(theirs, ours)
    run.save(theirs, "a", latest=False)
    assert import_deepspeed_checkpoint(theirs, ours).name == "a"
    run.save(theirs, "b", latest=False)
    with pytest.raises(CheckpointNotFoundError, match=r"\['a', 'b'\]"):
        import_deepspeed_checkpoint(theirs, ours)
    (theirs / "latest").write_text("b")
    assert import_deepspeed_checkpoint(theirs / "latest", ours).name == "b"
    with pytest.raises(CheckpointNotFoundError, match="'c'"):
        import_deepspeed_checkpoint(theirs, ours, "c")
    for hostile in ("../theirs/a", "/etc", ""):
        (theirs / "latest").write_text(hostile)
        with pytest.raises(CorruptCheckpointError, match="latest"):
            import_deepspeed_checkpoint(theirs, ours)


def test_deepspeeds_own_files_stay_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(stage=2)
    run.save(tmp_path / "theirs", "a")
    run.save(tmp_path / "lightnings" / "last.ckpt", "checkpoint")
    before = state_of(tmp_path)
    for name in ("theirs", "theirs/a", "lightnings"):
        with pytest.raises(CheckpointWriteError, match="another directory"):
            import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / name)
    assert main(["import-deepspeed", str(tmp_path / "theirs"), str(tmp_path / "theirs")]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert state_of(tmp_path) == before


def test_a_write_that_fails_leaves_what_was_there(tag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(stage=2)
    import_deepspeed_checkpoint(tag, tmp_path / "ours")
    other = run.save(tmp_path / "others", "global_step6")
    before = sorted(os.listdir(tmp_path / "ours"))
    from lightning_zero.checkpoint import save

    def full(path: Path, *args: Any, rank: int, **options: Any) -> None:
        raise OSError(28, f"No space left on device, at rank {rank}")

    monkeypatch.setattr(save, "write_shard", full)
    with pytest.raises(CheckpointWriteError, match="No space left"):
        import_deepspeed_checkpoint(other, tmp_path / "ours")
    assert sorted(os.listdir(tmp_path / "ours")) == before
    assert_holds(tmp_path / "ours", run)
