"""The life of a save directory, killed at every step of it."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from lightning_zero.checkpoint import commit, kernel
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.resolution import resolve
from lightning_zero.checkpoint.save import save_checkpoint
from lightning_zero.errors import CheckpointNotFoundError, CheckpointWriteError, CorruptCheckpointError
from tests.checkpoint.sample import Sample


class Killed(BaseException):
    """Stands for kill -9: nothing that follows is done, and no `except Exception` sees it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the process die before its `step`-th change of a name in the file system."""
    count = 0

    def count_and_die(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count >= step:  # the dead do nothing more
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in ("rename", "replace", "link", "unlink", "rmdir", "mkdir", "symlink"):
        monkeypatch.setattr(os, name, count_and_die(getattr(os, name)))
    monkeypatch.setattr(kernel, "exchange", count_and_die(kernel.exchange))


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("existing", ["none", "another", "latest", "not latest"])
def test_whenever_a_save_is_killed_latest_names_a_checkpoint_that_loads(
    tmp_path: Path, existing: str, exchange: bool
) -> None:
    step = 0
    while True:
        step += 1
        save_dir = tmp_path / str(step)
        before = {"none": [], "another": ["other"], "latest": ["other", "tag"], "not latest": ["tag", "other"]}[
            existing
        ]
        for number, tag in enumerate(before):
            Sample(step=number).save(save_dir / tag)
        with pytest.MonkeyPatch.context() as monkeypatch:
            if not exchange:
                monkeypatch.setattr(kernel, "exchange", lambda one, other: False)
            kill_at(monkeypatch, step)
            try:
                Sample(step=9).save(save_dir / "tag")
                died = False
            except Killed:
                died = True
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if (save_dir / "latest").exists():
                Checkpoint(resolve(save_dir), verify="full")
            else:
                assert not before, f"latest is gone after step {step}"
        for tag in commit.list_tags(save_dir):
            assert tag.complete, tag.problem
        for tag in before:  # by one name or another
            assert any(path.name.startswith(tag) for path in save_dir.iterdir()), f"{tag} is lost after step {step}"
        if not died:
            break
        Sample(step=10).save(save_dir / "tag")
        left = {path.name for path in save_dir.iterdir() if not path.name.startswith("tag.replaced-")}
        assert left == {*before, "tag", "latest"}
    assert step > 2  # and one more each time that a Path makes a directory, which Python 3.10 hides from us
    assert Checkpoint(resolve(save_dir)).manifest.step == 9
    assert {path.name for path in save_dir.iterdir()} == {*before, "tag", "latest"}


def test_a_directory_that_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "main.py").write_text("precious")
    with pytest.raises(CheckpointWriteError, match=r"holds 'main\.py'"):
        Sample().save(tmp_path / "src")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert (tmp_path / "src" / "main.py").read_text() == "precious"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_plain_file_and_a_link_give_way_to_a_checkpoint(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(kernel, "exchange", lambda one, other: False)
    Sample(step=1).save(tmp_path / "one")
    (tmp_path / "file").write_text("an old checkpoint")
    (tmp_path / "last").symlink_to("one")
    commit.write_latest(tmp_path, "last")
    for step, tag in enumerate(("file", "last"), 2):
        Sample(step=step).save(tmp_path / tag)
        assert Checkpoint(resolve(tmp_path)).manifest.step == step
    assert Checkpoint(tmp_path / "one").manifest.step == 1
    assert {path.name for path in tmp_path.iterdir()} == {"one", "file", "last", "latest"}


def test_the_staging_directory_of_a_live_save_is_left_alone_and_that_of_a_killed_one_goes(tmp_path: Path) -> None:
    script = (
        "import sys, time; sys.argv[0] = 'lightning-zero'; from pathlib import Path\n"
        "from lightning_zero.checkpoint import commit\n"
        "lock = commit.Staging(commit.staging_directory(Path(sys.argv[1]), 'tag', 'x'), 'x'); print('up', flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        commit.clean_leftovers(tmp_path)
        assert sorted(os.listdir(tmp_path)) == [".lock-tag-x", ".staging-tag-x"]
        process.send_signal(signal.SIGKILL)
    commit.clean_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_save_whose_staging_directory_was_cleaned_away_before_its_lock_makes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = commit._lock, 3

    def lock_late(fd: int) -> bool | None:
        nonlocal left
        if left:  # another's save cleans up at this very moment
            left -= 1
            with monkeypatch.context() as cleaning:
                cleaning.setattr(commit, "_lock", real)
                commit.clean_leftovers(tmp_path)
                assert os.listdir(tmp_path) == []
        return real(fd)

    monkeypatch.setattr(commit, "_lock", lock_late)
    staging = commit.Staging(commit.staging_directory(tmp_path, "tag", "x"), "x")
    assert left == 0
    commit.clean_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock-tag-x", ".staging-tag-x"]
    staging.release()
    Sample(step=4).save(tmp_path / "tag")
    assert Checkpoint(resolve(tmp_path), verify="full").manifest.step == 4


def test_latest_is_written_whatever_another_runs_save_cleans_away_meanwhile(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from lightning_zero.checkpoint import commit\nprint('up', flush=True)\n"
        "while True: commit.clean_leftovers(Path(sys.argv[1]))"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        try:
            for number in range(1000):
                commit.write_latest(tmp_path, f"step={number}", fsync=False)
                assert commit.read_latest(tmp_path) == f"step={number}"
        finally:
            process.kill()
    assert os.listdir(tmp_path) == ["latest"]


def test_whose_latest_named_another_systems_checkpoint_is_told_that_it_names_ours_now(tmp_path: Path) -> None:
    (tmp_path / "global_step7").mkdir()
    (tmp_path / "global_step7" / "mp_rank_00_model_states.pt").touch()
    (tmp_path / "latest").write_text("global_step7")
    with pytest.warns(UserWarning, match="'global_step7', which is none of our checkpoints"):
        Sample().save(tmp_path / "tag")
    assert commit.read_latest(tmp_path) == "tag"
    assert (tmp_path / "global_step7" / "mp_rank_00_model_states.pt").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sample().save(tmp_path / "tag2")


def test_without_locks_a_staging_directory_is_stale_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_lock", lambda fd: None)
    for name, age in ((".staging-young-x", 3600), (".staging-old-x", 2 * 86400), (".staging-busy-x", 2 * 86400)):
        lock = tmp_path / name.replace("staging", "lock")
        (tmp_path / name).mkdir()
        lock.touch()
        if "busy" in name:
            (tmp_path / name / "shard").touch()
        for path in (tmp_path / name, lock):
            os.utime(path, (time.time() - age,) * 2)
    commit.clean_leftovers(tmp_path)
    assert {name for name in os.listdir(tmp_path) if "staging" in name} == {".staging-busy-x", ".staging-young-x"}
    assert len(os.listdir(tmp_path)) == 4


def test_a_live_save_that_another_machine_takes_for_dead_fails_and_commits_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Sample(step=1).save(tmp_path / "tag")
    real, removed = commit._sync_directory, []

    def clean_now(path: Any, fsync: bool) -> None:  # the manifest is written, and the commit begins
        if not removed:
            monkeypatch.setattr(commit, "_lock", lambda fd: True)  # as one that sees no lock of this machine's
            removed.append(commit.clean_leftovers(tmp_path))
        real(path, fsync)

    monkeypatch.setattr(commit, "_sync_directory", clean_now)
    with pytest.raises(CheckpointWriteError):
        Sample(step=2).save(tmp_path / "tag")
    assert sorted(os.listdir(tmp_path)) == ["latest", "tag"]
    assert Checkpoint(resolve(tmp_path), verify="full").manifest.step == 1


def test_while_it_is_removed_what_is_taken_for_dead_can_not_be_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = commit.staging_directory(tmp_path, "next", "x")
    assert isinstance(staging, Path)
    shutil.copytree(Sample(step=1).save(tmp_path / "tag"), staging)
    real = commit._remove

    def commit_meanwhile(path: Path) -> None:
        if path.is_dir():
            with pytest.raises(FileNotFoundError):
                commit.commit(staging, tmp_path, "next", fsync=False)
        real(path)

    monkeypatch.setattr(commit, "_remove", commit_meanwhile)
    commit.clean_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["latest", "tag"]


def test_of_two_that_clean_up_the_slower_leaves_what_was_made_again_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = tmp_path / ".lock-tag-x"
    dead.touch()
    real = commit._lock

    def lock_late(fd: int) -> bool | None:
        monkeypatch.setattr(commit, "_lock", real)
        dead.unlink()  # by the other, and then a save makes it again
        commit.Staging(commit.staging_directory(tmp_path, "tag", "x"), "x")
        return real(fd)

    monkeypatch.setattr(commit, "_lock", lock_late)
    commit.clean_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock-tag-x", ".staging-tag-x"]


def test_a_lock_is_let_go_of_whoever_has_been_forked_meanwhile(tmp_path: Path) -> None:
    staging = commit.Staging(commit.staging_directory(tmp_path, "tag", "x"), "x")
    fd = os.open(tmp_path / ".lock-tag-x", os.O_RDWR)
    forked = os.fork()
    if forked == 0:
        time.sleep(60)
        os._exit(0)
    try:
        assert commit._lock(fd) is False
        staging.release()
        assert commit._lock(fd) is True
    finally:
        os.close(fd)
        os.kill(forked, signal.SIGKILL)
        os.waitpid(forked, 0)


def test_a_replacement_that_loses_its_staging_directory_at_the_last_moment_puts_the_old_tag_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "exchange", lambda one, other: False)
    for tag in ("tag", "newer"):
        Sample(step=1).save(tmp_path / tag)
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(target).name == "tag" and Path(source).name.startswith(".staging-"):
            shutil.rmtree(source)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(CheckpointWriteError, match="FileNotFoundError"):
        Sample(step=2).save(tmp_path / "tag")
    assert Checkpoint(tmp_path / "tag", verify="full").manifest.step == 1
    assert commit.read_latest(tmp_path) == "newer"


def test_a_disk_that_is_full_when_latest_is_to_be_written_leaves_the_tag_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Sample(step=1).save(tmp_path / "tag")

    def full(save_dir: Path, tag: str, fsync: bool) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(commit, "_new_latest", full)
    with pytest.raises(CheckpointWriteError, match=os.strerror(errno.ENOSPC)):
        Sample(step=2).save(tmp_path / "tag")
    assert sorted(os.listdir(tmp_path)) == ["latest", "tag"]
    assert Checkpoint(resolve(tmp_path), verify="full").manifest.step == 1


@pytest.mark.parametrize("refusal", [errno.ENOSYS, errno.EXDEV, errno.EPERM])
def test_where_there_are_no_hard_links_a_tag_is_replaced_and_copied_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(refusal, os.strerror(refusal))

    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(os.fstat(fd).st_ino))
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(kernel, "exchange", lambda one, other: False)
    for step in (1, 2):
        Sample(step=step).save(tmp_path / "tag")
    commit.copy_tag(tmp_path / "tag", tmp_path / "last")
    for tag in ("tag", "last"):
        assert Checkpoint(tmp_path / tag, verify="full").manifest.step == 2
    assert synced >= {path.stat().st_ino for path in (tmp_path / "last").iterdir()}
    assert sorted(os.listdir(tmp_path)) == ["last", "latest", "tag"]


def test_a_tag_of_the_longest_name_is_replaced_without_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "exchange", lambda one, other: False)
    tag = "x" * 200
    for step in (1, 2):
        Sample(step=step).save(tmp_path / tag)
    assert sorted(os.listdir(tmp_path)) == ["latest", tag]
    assert Checkpoint(resolve(tmp_path), verify="full").manifest.step == 2


def test_latest_goes_to_a_tag_and_never_to_a_link_which_may_be_the_next_to_lead_nowhere(tmp_path: Path) -> None:
    for step in (1, 2):
        Sample(step=step).save(tmp_path / f"s{step}")
    (tmp_path / "zuletzt").symlink_to("s1")
    commit.remove_tag(tmp_path, "s2")
    assert commit.read_latest(tmp_path) == "s1"


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EIO])
def test_a_directory_that_can_not_be_synced_is_passed_over_and_one_that_fails_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(refusal, os.strerror(refusal))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if refusal == errno.EINVAL else pytest.raises(CheckpointWriteError):
        save_checkpoint(tmp_path / "tag", Sample().rank(0), Sample().shared, group=None)


def test_a_staging_directory_is_never_taken_for_a_slurm_checkpoint(tmp_path: Path) -> None:
    staging = commit.staging_directory(tmp_path, "hpc_ckpt_3.ckpt", "x")
    assert "hpc_ckpt_" not in staging.name
    assert staging.name.startswith(".")


def test_removing_what_latest_names_points_latest_at_the_newest_other(tmp_path: Path) -> None:
    for step in (1, 3, 2):
        Sample(step=step).save(tmp_path / f"s{step}")
    (tmp_path / "s3" / "manifest.json").write_text("torn")
    commit.remove_tag(tmp_path, "s2")
    assert commit.read_latest(tmp_path) == "s1"
    commit.remove_tag(tmp_path, "missing")
    commit.remove_tag(tmp_path, "s1")
    assert commit.read_latest(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["s3"]


def test_nothing_is_removed_while_the_disk_does_not_tell_what_latest_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        Sample(step=step).save(tmp_path / f"s{step}")
    with monkeypatch.context() as failing:
        fail_to_read(failing, "/latest")
        with pytest.raises(CorruptCheckpointError, match="Stale file handle"):
            commit.remove_tag(tmp_path, "s2")
    assert commit.read_latest(tmp_path) == "s2"
    assert Checkpoint(resolve(tmp_path)).manifest.step == 2


@pytest.mark.parametrize("name", ["manifest.json", "rank-00001-of-00002.safetensors", "trainer.pt"])
def test_what_the_disk_refuses_to_read_is_damage_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for step in (1, 2):
        Sample(step=step, world_size=2).save(tmp_path / f"s{step}")
    fail_to_read(monkeypatch, f"/s2/{name}")
    with pytest.warns(UserWarning, match=f"{name}.*Stale file handle"):
        assert resolve(tmp_path).name == "s1"
    assert {tag.name: tag.complete for tag in commit.list_tags(tmp_path)} == {"s1": True, "s2": False}


def fail_to_read(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    real = os.preadv

    def preadv(fd: int, *args: Any) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(where):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(fd, *args)

    monkeypatch.setattr(os, "preadv", preadv)


def test_tags_are_listed_newest_first_with_what_is_wrong(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        Sample(step=step, world_size=2).save(tmp_path / f"s{step}")
    (tmp_path / "s2" / "rank-00001-of-00002.safetensors").unlink()
    (tmp_path / "notes").mkdir()
    tags = commit.list_tags(tmp_path)
    assert [(tag.name, tag.complete) for tag in tags] == [("s10", True), ("s2", False), ("s1", True)]
    assert "rank-00001-of-00002.safetensors" in tags[1].problem
    assert commit.list_tags(tmp_path / "nowhere") == []


def test_copies_that_killed_replacements_left_go_when_the_tag_is_saved_again(tmp_path: Path) -> None:
    for name in ("tag", "tag.replaced-0123abcd", "tag.replaced-mine", "other.replaced-0123abcd"):
        Sample(step=1).save(tmp_path / name)
    Sample(step=2).save(tmp_path / "tag")
    assert sorted(os.listdir(tmp_path)) == ["latest", "other.replaced-0123abcd", "tag", "tag.replaced-mine"]
    assert commit.read_latest(tmp_path) == "tag"


@pytest.mark.parametrize("make", [os.mkdir, lambda path: os.symlink("run", path)])
def test_somebody_elses_latest_is_left_as_it_is(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "latest")
    with pytest.raises(CheckpointWriteError, match="none of our files"):
        Sample().save(tmp_path / "tag")
    assert os.listdir(tmp_path) == ["latest"]


@pytest.mark.parametrize(
    "tag",
    [
        "",
        ".",
        "..",
        ".hidden",
        "latest",
        "a/b",
        "/a",
        "a\\b",
        "a\0",
        "a\nb",
        "\x7f",
        "x" * 201,
        "\u00e9" * 101,
        "x" * 201 + ".replaced-01234567",
    ],
)
def test_what_can_be_no_tag_is_refused_everywhere(tmp_path: Path, tag: str) -> None:
    for use in (commit.validate_tag, lambda tag: resolve(tmp_path, tag), lambda tag: commit.remove_tag(tmp_path, tag)):
        if tag != ".hidden" or use is commit.validate_tag:  # one that was saved can be loaded and removed by its path
            with pytest.raises(commit.InvalidTagError):
                use(tag)


@pytest.mark.parametrize(
    "tag", ["step=500.ckpt", "global_step3", "epoch=1-val_loss=0.25.ckpt", "déjà vu", "latest.ckpt", " a blank "]
)
def test_what_lightning_and_people_call_their_checkpoints_is_a_tag(tmp_path: Path, tag: str) -> None:
    Sample().save(tmp_path / tag)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(tmp_path).name == tag


CONTENTS = [b"", b"\n", b"../../etc", b"/etc/passwd", b"a\0b", b"\xff\xfe", b"x" * 10_000, b"latest", b".", b"gone"]


@pytest.mark.parametrize("content", CONTENTS)
def test_a_hostile_latest_is_warned_of_and_the_newest_sound_tag_taken(tmp_path: Path, content: bytes) -> None:
    Sample(step=1).save(tmp_path / "one")
    (tmp_path / "latest").write_bytes(content)
    with pytest.warns(UserWarning, match="newest sound checkpoint is taken instead"):
        assert resolve(tmp_path) == tmp_path / "one"
    assert (tmp_path / "latest").read_bytes() == content


def test_what_is_wrong_with_a_tag_and_with_latest_is_told_in_sentences(tmp_path: Path) -> None:
    for tag, reason in (("../x", "separators"), (".x", "hidden"), ("", "empty")):
        with pytest.raises(commit.InvalidTagError, match=reason):
            commit.validate_tag(tag)
    Sample().save(tmp_path / "one")
    (tmp_path / "latest").unlink()
    with pytest.warns(UserWarning, match=r"latest is missing\.\sThe newest sound checkpoint is taken instead"):
        resolve(tmp_path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/etc/passwd", path)])
def test_a_latest_that_is_no_plain_file_is_damaged(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "latest")
    with pytest.raises(CorruptCheckpointError):
        commit.read_latest(tmp_path)


def test_a_link_to_a_sibling_is_followed_and_one_that_leaves_is_not(tmp_path: Path) -> None:
    outside = Sample(step=2).save(tmp_path / "elsewhere" / "tag")
    save_dir = tmp_path / "ckpts"
    Sample(step=1).save(save_dir / "one")
    (save_dir / "last").symlink_to("one")
    (save_dir / "evil").symlink_to(outside)
    assert Checkpoint(resolve(save_dir, "last")).manifest.step == 1
    with pytest.raises(CorruptCheckpointError, match="leaves the save directory"):
        resolve(save_dir, "evil")
    commit.write_latest(save_dir, "evil")
    with pytest.warns(UserWarning, match="leaves the save directory"):
        assert resolve(save_dir).name in ("one", "last")
    assert [tag.name for tag in commit.list_tags(save_dir) if not tag.complete] == ["evil"]


def test_nothing_sound_is_an_error_that_says_what_is_wrong_with_each(tmp_path: Path) -> None:
    Sample(step=1).save(tmp_path / "one")
    (tmp_path / "one" / "trainer.pt").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"(?s)no sound checkpoint.*one: .*trainer\.pt"):
        resolve(tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        resolve(tmp_path / "nowhere")


@pytest.mark.parametrize("how", ["a second tag", "a link", "a tag that is replaced"])
def test_what_is_copied_is_whole_though_another_runs_save_cleans_up_meanwhile(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Sample(step=1).save(tmp_path / "tag")

    def cleaned_up_after(real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            real(*args, **kwargs)
            commit.clean_leftovers(tmp_path)

        return call

    for name in ("link", "symlink"):
        monkeypatch.setattr(os, name, cleaned_up_after(getattr(os, name)))
    if how == "a second tag":
        commit.copy_tag(tmp_path / "tag", tmp_path / "last")
    elif how == "a link":
        commit.link_tag(tmp_path / "tag", tmp_path / "last")
    else:
        monkeypatch.setattr(kernel, "exchange", lambda one, other: False)
        Sample(step=2).save(tmp_path / "tag")
    assert all(tag.complete for tag in commit.list_tags(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["latest", "tag"] if "replaced" in how else ["last", "latest", "tag"]
