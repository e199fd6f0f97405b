"""All ranks save together, in real processes: all of them, or none."""

import os
import resource
import signal
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_zero.checkpoint import commit, finish
from lightning_zero.checkpoint import save as saving
from lightning_zero.checkpoint.background import start_aside
from lightning_zero.checkpoint.content import RankContent, TensorToSave
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.report import SaveReport
from lightning_zero.checkpoint.resolution import resolve
from lightning_zero.checkpoint.save import save_checkpoint
from lightning_zero.errors import CheckpointWriteError, TagMismatchError
from tests.checkpoint.sample import Sample
from tests.launch import distributed, run_ranks


def save(directory: Path, sample: Sample, content: RankContent | None = None) -> SaveReport:
    rank = dist.get_rank()
    return save_checkpoint(
        directory,
        content or sample.rank(rank),
        sample.shared if rank == 0 else None,
        group=dist.group.WORLD,
        fsync=False,
    )


def failure(directory: Path, sample: Sample, content: RankContent | None = None) -> str:
    with pytest.raises(CheckpointWriteError) as caught:
        save(directory, sample, content)
    messages: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(messages, str(caught.value))
    assert len(set(messages)) == 1, messages
    return messages[0]


def assert_only_the_first_is_left(save_dir: Path) -> None:
    dist.barrier()
    assert sorted(os.listdir(save_dir)) == ["first", "latest"]
    assert commit.read_latest(save_dir) == "first"
    Checkpoint(save_dir / "first", verify="full")


@distributed(world_size=3)
def test_what_all_ranks_saved_is_one_checkpoint(tmp_path: Path) -> None:
    sample = Sample(world_size=3)
    report = save(tmp_path / "ckpts" / "tag", sample)
    assert report.path == tmp_path / "ckpts" / "tag"
    assert report.bytes == sum(path.stat().st_size for path in report.path.iterdir())
    loaded = Checkpoint(resolve(tmp_path / "ckpts"), verify="full").state_dict()
    for name, tensor in sample.state_dict.items():
        assert torch.equal(loaded[name], tensor)
    assert sorted(os.listdir(tmp_path / "ckpts")) == ["latest", "tag"]


@distributed(world_size=2)
def test_ranks_that_want_different_tags_or_steps_all_learn_who_wanted_what(tmp_path: Path) -> None:
    rank = dist.get_rank()
    save(tmp_path / "first", Sample(world_size=2))
    with pytest.raises(TagMismatchError, match=r"rank 0: 'tag0' at step 3; rank 1: 'tag1' at step 3"):
        save(tmp_path / f"tag{rank}", Sample(world_size=2))
    with pytest.raises(TagMismatchError, match=r"rank 0: 'tag' at step 5; rank 1: 'tag' at step 6"):
        save(tmp_path / "tag", Sample(world_size=2, step=5 + rank))
    assert_only_the_first_is_left(tmp_path)


@distributed(world_size=2)
def test_a_disk_that_is_full_for_one_rank_fails_all_with_the_same_words(tmp_path: Path) -> None:
    save(tmp_path / "first", Sample(world_size=2))
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    message = failure(tmp_path / "second", Sample(world_size=2))
    assert "rank 1 on " in message
    assert ".staging-second-" in message
    assert "File too large" in message
    assert_only_the_first_is_left(tmp_path)


@distributed(world_size=2)
def test_a_full_disk_in_the_middle_of_a_shard_fails_all(tmp_path: Path) -> None:
    def chunks(tensor: torch.Tensor) -> object:
        yield memoryview(b"1234")
        raise OSError(28, "No space left on device")

    save(tmp_path / "first", Sample(world_size=2))
    if dist.get_rank() == 0:
        saving.tensor_chunks = chunks
    message = failure(tmp_path / "second", Sample(world_size=2))
    assert "rank 0 on " in message
    assert "No space left on device" in message
    assert_only_the_first_is_left(tmp_path)


@pytest.mark.parametrize("where", ["_serialize", "_write_trainer"])
def test_what_an_interrupted_save_has_written_goes(tmp_path: Path, where: str) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        signal.raise_signal(signal.SIGINT)

    def save_alone(tag: str) -> None:
        sample = Sample(world_size=1)
        save_checkpoint(tmp_path / tag, sample.rank(0), sample.shared, group=None, fsync=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, where, interrupt)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        with pytest.raises(KeyboardInterrupt):
            save_alone("first")
    assert os.listdir(tmp_path) == []
    save_alone("first")
    assert sorted(os.listdir(tmp_path)) == ["first", "latest"]


@distributed(world_size=2)
def test_what_can_not_be_pickled_fails_all(tmp_path: Path) -> None:
    save(tmp_path / "first", Sample(world_size=2))
    message = failure(tmp_path / "second", Sample(world_size=2, trainer={"callbacks": threading.Lock()}))
    assert "rank 0 on " in message
    assert "cannot pickle" in message
    assert_only_the_first_is_left(tmp_path)


@distributed(world_size=2)
def test_a_tensor_that_no_checkpoint_holds_fails_all(tmp_path: Path) -> None:
    save(tmp_path / "first", Sample(world_size=2))
    sparse = TensorToSave("model", "bias", 0, 2, torch.ones(2).to_sparse())
    content = RankContent([sparse], [], b"", 3) if dist.get_rank() == 1 else None
    assert "'bias' is a torch.sparse_coo tensor" in failure(tmp_path / "second", Sample(world_size=2), content)
    assert_only_the_first_is_left(tmp_path)


@distributed(world_size=2)
def test_what_the_ranks_have_together_must_be_all_there_is(tmp_path: Path) -> None:
    save(tmp_path / "first", Sample(world_size=2))
    content = RankContent([], [], b"", 3) if dist.get_rank() == 1 else None
    assert "are stored nowhere" in failure(tmp_path / "second", Sample(world_size=2), content)
    assert_only_the_first_is_left(tmp_path)


@distributed(world_size=2)
def test_a_place_where_nothing_can_be_made_fails_all(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = failure(tmp_path / "file" / "tag", Sample(world_size=2))
    assert "rank 0 on " in message
    assert "NotADirectoryError" in message
    assert "hidden" in failure(tmp_path / ".tag", Sample(world_size=2))
    dist.barrier()
    assert os.listdir(tmp_path) == ["file"]


@distributed(world_size=2)
def test_the_ranks_must_see_the_same_directory(tmp_path: Path) -> None:
    own = tmp_path / str(dist.get_rank())  # as if each node had a disk of its own
    own.mkdir()
    assert "shared file system" in failure(own / "tag", Sample(world_size=2))


def die_in_the_middle(save_dir: str, victim: int) -> str:
    """Rank `victim` is killed while it writes; the other says what it got."""

    def chunks(tensor: torch.Tensor) -> object:
        yield memoryview(b"1234")
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == victim:
        saving.tensor_chunks = chunks
    else:
        time.sleep(0.2)
    with pytest.raises(CheckpointWriteError, match="died, or can't be reached"):
        save(Path(save_dir) / "second", Sample(world_size=2, step=4))
    return "told"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_in_mid_save_costs_only_that_save(tmp_path: Path, victim: int) -> None:
    Sample(world_size=2, step=3).save(tmp_path / "first")
    with pytest.raises(AssertionError, match="died with exit code -9") as caught:
        run_ranks(die_in_the_middle, 2, str(tmp_path), victim, timeout_seconds=30)
    assert str(caught.value).count("rank ") == 1, caught.value  # the other raised what it should
    assert commit.read_latest(tmp_path) == "first"
    assert not (tmp_path / "second").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Checkpoint(resolve(tmp_path), verify="full")
    Sample(step=5).save(tmp_path / "third")
    assert sorted(os.listdir(tmp_path)) == ["first", "latest", "third"]


def test_a_save_that_is_not_the_latest_leaves_latest_alone(tmp_path: Path) -> None:
    Sample(step=1).save(tmp_path / "one")
    Sample(step=2).save(tmp_path / "weights", update_latest=False)
    assert commit.read_latest(tmp_path) == "one"


def test_rank_0_has_to_say_what_the_ranks_share(tmp_path: Path) -> None:
    with pytest.raises(CheckpointWriteError, match="rank 0 has to say"):
        save_checkpoint(tmp_path / "tag", Sample().rank(0), None, group=None)
    assert os.listdir(tmp_path) == []


@distributed(world_size=2)
def test_when_the_others_hear_that_it_is_saved_or_not_nothing_of_the_save_is_left(
    tmp_path: Path,
) -> None:
    seen: list[list[str]] = []
    with pytest.MonkeyPatch.context() as watching:
        real = finish.broadcast

        def broadcast(*args: object) -> object:
            seen.append(sorted(os.listdir(tmp_path)))
            return real(*args)

        if dist.get_rank() == 0:
            watching.setattr(finish, "broadcast", broadcast)
        save(tmp_path / "one", Sample(world_size=2))
        rank, sample = dist.get_rank(), Sample(world_size=2)
        unsavable = TensorToSave("model", "p", 0, 1, torch.zeros(1).to_sparse())
        bad = replace(sample.rank(rank), tensors=[unsavable]) if rank == 1 else None
        failure(tmp_path / "two", sample, bad)
    assert seen == ([["latest", "one"]] * 2 if dist.get_rank() == 0 else [])


def test_a_thread_that_yields_does_not_hand_it_on_to_those_that_it_starts() -> None:
    found: list[int] = []

    def look() -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def start_another() -> None:
        look()
        other = start_aside(look, "other")
        assert other is not None
        other.join()

    thread = start_aside(start_another, "one")
    assert thread is not None
    thread.join()
    assert found == [os.getpriority(os.PRIO_PROCESS, os.getpid()) + 10] * 2
