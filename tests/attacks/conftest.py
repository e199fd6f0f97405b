"""The scene of every attack: see `entrances`."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_zero.checkpoint import commit
from tests.checkpoint.sample import Sample


@pytest.fixture(autouse=True, scope="package")
def _nothing_is_durable() -> Iterator[None]:
    """Hundreds of small files are written here, and none has to outlive a crash."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original; each test has a copy."""
    root = tmp_path_factory.mktemp("scene")
    Sample(world_size=2).save(root / "ckpts" / "tag")
    Sample(world_size=2, seed=1).save(root / "outside" / "evil")
    commit.write_latest(root / "ckpts", "tag")
    (root / "outside" / "sentinel").write_text("untouched")
    (root / "outside" / "evil" / "mine.txt").write_text("untouched")
    return root


@pytest.fixture
def tag(scene: Path, tmp_path: Path) -> Path:
    """A sound checkpoint, to be attacked."""
    shutil.copytree(scene, tmp_path / "scene")
    return tmp_path / "scene" / "ckpts" / "tag"


@pytest.fixture
def outside(tag: Path) -> Path:
    """What no attack may reach."""
    return tag.parent.parent / "outside"
