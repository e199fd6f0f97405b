"""`lightning-zero prune`: what goes, what stays, and what that frees."""

import json
import os
from pathlib import Path

import pytest

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.retention import Retention
from lightning_zero.cli import main
from tests.checkpoint.sample import Sample


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    for step in range(1, 6):
        Sample(step=step).save(tmp_path / f"step={step}.ckpt")
    return tmp_path


def tags(save_dir: Path) -> set[int]:
    return {tag.step for tag in commit.list_tags(save_dir)}


def free_bytes(save_dir: Path) -> int:
    """What the files take, each once."""
    status = {path.stat().st_ino: path.stat().st_size for path in save_dir.glob("*/*")}
    return sum(status.values())


def test_the_newest_stay_and_what_is_freed_is_told(save_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = free_bytes(save_dir)
    assert main(["prune", str(save_dir), "--keep-last", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["tag"] for row in found["removed"]] == ["step=3.ckpt", "step=2.ckpt", "step=1.ckpt"]
    assert found["kept"] == ["step=5.ckpt", "step=4.ckpt"]
    assert tags(save_dir) == {4, 5}
    assert found["freed_bytes"] == before - free_bytes(save_dir)
    assert main(["prune", str(save_dir), "--keep-last", "2"]) == 0
    assert capsys.readouterr().out == "removed 0, keeps 2; 0 B freed\n"


def test_what_latest_names_stays_and_so_does_every_nth_step(save_dir: Path) -> None:
    commit.write_latest(save_dir, "step=1.ckpt")
    assert main(["prune", str(save_dir), "--keep-last", "1", "--keep-every-n-steps", "2"]) == 0
    assert tags(save_dir) == {1, 2, 4, 5}
    assert commit.read_latest(save_dir) == "step=1.ckpt"


def test_a_dry_run_says_the_same_and_removes_nothing(save_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(save_dir), "--keep-last", "4", "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert tags(save_dir) == {1, 2, 3, 4, 5}
    assert main(["prune", str(save_dir), "--keep-last", "4"]) == 0
    assert dry.replace("would remove", "removed").replace("would be freed", "freed") == capsys.readouterr().out


def test_a_file_that_another_tag_links_to_is_not_freed(save_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = next((save_dir / "step=1.ckpt").glob("frozen-*"))
    for step in (2, 5):
        (save_dir / f"step={step}.ckpt" / shared.name).unlink()
        os.link(shared, save_dir / f"step={step}.ckpt" / shared.name)
    commit.write_latest(save_dir, "step=5.ckpt")
    before = free_bytes(save_dir)
    for keep in ("4", "3", "1"):
        assert main(["prune", str(save_dir), "--keep-last", keep, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["freed_bytes"] == before - free_bytes(save_dir)
        before = free_bytes(save_dir)


def test_a_damaged_latest_is_an_error_and_nothing_goes(save_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (save_dir / "latest").write_text("../x")
    assert main(["prune", str(save_dir), "--keep-last", "1"]) == 1
    assert "latest" in capsys.readouterr().err
    assert tags(save_dir) == {1, 2, 3, 4, 5}


def test_a_torn_directory_is_left_alone(save_dir: Path) -> None:
    next((save_dir / "step=1.ckpt").glob("rank-*")).unlink()
    assert main(["prune", str(save_dir), "--keep-last", "1"]) == 0
    assert tags(save_dir) == {1, 5}


def test_a_tag_that_another_prune_removes_meanwhile_is_no_error(
    save_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def superseded(retention: Retention, directory: Path) -> list[commit.TagInfo]:
        old = found(retention, directory)
        commit.remove_tag(directory, old[0].name)
        return old

    found = Retention.superseded
    monkeypatch.setattr(Retention, "superseded", superseded)
    assert main(["prune", str(save_dir), "--keep-last", "2"]) == 0
    assert tags(save_dir) == {4, 5}
    assert capsys.readouterr().err == ""
