"""Which tags stay, and which go."""

import os
from pathlib import Path

import pytest

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.resolution import resolve
from lightning_zero.checkpoint.retention import Retention
from tests.checkpoint.sample import Sample


def test_pruning_keeps_the_newest_the_protected_the_linked_and_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5, 6):
        Sample(step=step).save(tmp_path / f"s{step}", update_latest=step == 1)
    (tmp_path / "last").symlink_to("s2")
    assert sorted(Retention(2).apply(tmp_path, protect=["s3"])) == ["s4"]
    assert sorted(os.listdir(tmp_path)) == ["last", "latest", "s1", "s2", "s3", "s5", "s6"]
    with pytest.raises(ValueError, match="at least 1"):
        Retention(0)


def test_after_going_back_the_newer_checkpoints_are_those_of_the_new_run(tmp_path: Path) -> None:
    for step, run in ((2, "a"), (4, "a"), (6, "a"), (3, "b"), (4, "b")):
        Sample(step=step).save(tmp_path / f"{run}{step}")
    assert Retention(3).apply(tmp_path) == ["a4", "a2"]
    (tmp_path / "latest").unlink()
    (tmp_path / "b4" / "trainer.pt").unlink()
    with pytest.warns(UserWarning, match="newest sound checkpoint is taken instead"):
        assert resolve(tmp_path).name == "b3"


def test_a_tag_that_stays_for_its_step_is_looked_at_once_and_again_when_it_is_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []
    read = commit.read_manifest

    def reading(path: Path) -> object:
        looked_at.append(path.name)
        return read(path)

    monkeypatch.setattr(commit, "read_manifest", reading)
    retention = Retention(1, keep_every_n_steps=10)
    for step in (10, 20, 25, 30):
        Sample(step=step).save(tmp_path / f"s{step}")
        retention.apply(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["latest", "s10", "s20", "s30"]
    looked_at.clear()
    assert retention.apply(tmp_path) == []
    assert looked_at == ["s30"]
    Sample(step=10).save(tmp_path / "s10")  # the run went back, and s10 is the newest now
    assert retention.apply(tmp_path) == []
    assert sorted(os.listdir(tmp_path)) == ["latest", "s10", "s20", "s30"]
    Sample(step=11).save(tmp_path / "s10")  # and no multiple any more
    Sample(step=12).save(tmp_path / "s12")
    assert retention.apply(tmp_path) == ["s10"]
