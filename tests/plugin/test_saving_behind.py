"""Saving behind training: the same checkpoint, deletions that wait, and errors that nobody loses."""

import csv
import os
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_zero import ZeroCheckpoint, ZeroCheckpointIO, ZeroStrategy
from lightning_zero.checkpoint import save as saving
from lightning_zero.checkpoint.integrity import find_problems, read_manifest
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.resolution import resolve
from lightning_zero.checkpoint.retention import Retention
from lightning_zero.errors import CheckpointWriteError, UnsupportedModelError
from lightning_zero.plugin.savers import OTHER
from tests.launch import distributed
from tests.models import fit


def tags(directory):
    return sorted(path.name for path in Path(directory).iterdir() if (path / "manifest.json").exists())


class Gate:
    """Holds the writing of a rank's files up until it is opened."""

    def __init__(self, monkeypatch):
        self.opened = threading.Event()
        self.reached = threading.Event()
        write = saving.write

        def held(*args, **kwargs):
            self.reached.set()
            assert self.opened.wait(60)
            return write(*args, **kwargs)

        monkeypatch.setattr(saving, "write", held)


@pytest.fixture
def monkeypatch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


class SaveBothWays(Callback):
    """At some steps, the same state synchronously and behind training."""

    def __init__(self, directory):
        self.directory = directory

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step in (2, 3, 5):
            for behind in (False, True):
                with trainer.strategy.saves.asked_by(OTHER, behind=behind):
                    trainer.save_checkpoint(self.directory / f"{'behind' if behind else 'sync'}{trainer.global_step}")


@distributed(world_size=2, process_group=False)
def test_what_is_saved_behind_training_is_bit_for_bit_what_a_synchronous_save_writes(tmp_path):
    for precision in ("32-true", "bf16-true"):
        directory = tmp_path / precision
        fit(
            strategy=ZeroStrategy(),
            world_size=2,
            max_steps=7,
            callbacks=[SaveBothWays(directory)],
            precision=precision,
        )
        for step in (2, 3, 5):
            digests = []
            for name in ("sync", "behind"):
                manifest = read_manifest(directory / f"{name}{step}")
                assert not list(find_problems(directory / f"{name}{step}", manifest, "full"))
                digests.append([(t.key, t.xxh3) for file in manifest.files for t in file.tensors])
            assert digests[0] == digests[1]
        assert (directory / "latest").read_text() == "behind5"


@distributed(world_size=2, process_group=False)
def test_training_goes_on_while_a_checkpoint_is_written_and_fits_end_waits_for_it(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)

        class Look(Callback):
            def on_train_batch_end(self, trainer, module, *args):
                if trainer.global_step == 4:  # two steps after the save was begun
                    assert gate.reached.wait(60)
                    assert tags(tmp_path) == []
                    gate.opened.set()

        callback = ZeroCheckpoint(tmp_path, every_n_train_steps=2, async_save=True, save_top_k=-1)
        fit(strategy=ZeroStrategy(), world_size=2, max_steps=5, callbacks=[Look(), callback])
    assert tags(tmp_path) == ["step=2.ckpt", "step=4.ckpt"]
    assert Checkpoint(resolve(tmp_path), verify="full").manifest.step == 4
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("kind", ["top_k", "keep_last", "link"])
def test_nothing_is_deleted_before_the_newer_checkpoint_is_there(tmp_path, kind):
    deletions(tmp_path, kind)


@distributed(world_size=1, process_group=False)
def deletions(directory, kind):
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        gate.opened.set()
        seen = {}

        class Look(Callback):
            def on_train_batch_end(self, trainer, module, *args):
                if trainer.global_step == 3:
                    trainer.strategy.saves.join()
                    gate.opened.clear()
                    gate.reached.clear()
                if trainer.global_step == 5:
                    assert gate.reached.wait(60)
                    seen["meanwhile"] = tags(directory)
                    seen["latest"] = (directory / "latest").read_text()
                    gate.opened.set()

        options = {"top_k": {"save_top_k": 1}, "keep_last": {"keep_last": 1}, "link": {"save_last": "link"}}[kind]
        if kind == "top_k":
            strategy = ZeroStrategy(checkpoint_io=ZeroCheckpointIO(async_save=True))
            callback = ModelCheckpoint(directory, "{step}", every_n_train_steps=2, **options)
        else:
            strategy = ZeroStrategy()
            callback = ZeroCheckpoint(directory, every_n_train_steps=2, async_save=True, **options)
        fit(strategy=strategy, world_size=1, max_steps=5, callbacks=[Look(), callback])
        last = ["last.ckpt"] if kind == "link" else []
        assert seen == {"meanwhile": [*last, "step=2.ckpt"], "latest": "step=2.ckpt"}
        assert tags(directory) == [*last, "step=4.ckpt"]
        if kind == "link":
            assert os.readlink(directory / "last.ckpt") == "step=4.ckpt"


class Fail:
    """Writing fails on one rank, as often as is said."""

    def __init__(self, patch, rank, times):
        write_shard = saving.write_shard
        self.left = times

        def failing(path, *args, **kwargs):
            if kwargs["rank"] == rank and self.left:
                self.left -= 1
                raise OSError(28, "No space left on device")
            return write_shard(path, *args, **kwargs)

        patch.setattr(saving, "write_shard", failing)


@distributed(world_size=2, process_group=False)
def test_what_fails_behind_training_is_raised_on_all_ranks_at_fits_end_and_deletes_nothing(tmp_path):
    callback = lambda: ZeroCheckpoint(tmp_path, every_n_train_steps=2, async_save=True, keep_last=1)  # noqa: E731
    fit(strategy=ZeroStrategy(), world_size=2, max_steps=3, callbacks=[callback()])
    with pytest.MonkeyPatch.context() as patch:
        Fail(patch, rank=1, times=100)
        with pytest.raises(CheckpointWriteError, match=r"rank 1 .*No space left on device"):
            fit(strategy=ZeroStrategy(), world_size=2, max_steps=5, callbacks=[callback()], ckpt_path="last")
    assert tags(tmp_path) == ["step=2.ckpt"]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step=2.ckpt"]
    fit(strategy=ZeroStrategy(), world_size=2, max_steps=5, callbacks=[callback()], ckpt_path="last")
    assert tags(tmp_path) == ["step=4.ckpt"]


class GoOn(Callback):
    """Saves at every step, and goes on where that fails."""

    def __init__(self, directory):
        self.directory, self.errors = directory, {}

    def on_train_batch_end(self, trainer, module, *args):
        try:
            trainer.save_checkpoint(self.directory / f"tag{trainer.global_step}")
        except CheckpointWriteError as error:
            self.errors[trainer.global_step] = str(error)


@distributed(world_size=2, process_group=False)
def test_what_fails_behind_training_is_raised_at_the_next_save_and_training_can_go_on(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        Fail(patch, rank=0, times=1)
        callback = GoOn(tmp_path)
        strategy = ZeroStrategy(checkpoint_io=ZeroCheckpointIO(async_save=True))
        fit(strategy=strategy, world_size=2, max_steps=4, callbacks=[callback])
    assert list(callback.errors) == [2]
    assert "'tag1'" in callback.errors[2]
    assert tags(tmp_path) == ["tag2", "tag3", "tag4"]  # the failure of one costs no other


class Break(Callback):
    def on_train_batch_start(self, trainer, module, *args):
        if trainer.global_step == 4:
            raise RuntimeError("broken")


@distributed(world_size=2, process_group=False)
def test_an_exception_waits_for_the_save_that_is_under_way(tmp_path):
    callback = ZeroCheckpoint(tmp_path, every_n_train_steps=4, async_save=True)
    with pytest.raises(RuntimeError, match="broken"):
        fit(strategy=ZeroStrategy(), world_size=2, max_steps=9, callbacks=[Break(), callback])
    assert (tmp_path / "latest").read_text() == "step=4.ckpt"
    Checkpoint(tmp_path / "step=4.ckpt", verify="full")


@distributed(world_size=2, process_group=False)
def test_every_save_is_told_of_in_the_users_logger(tmp_path):
    for behind in (False, True):
        logger = CSVLogger(tmp_path / str(behind), version=0)
        callback = ZeroCheckpoint(tmp_path / f"c{behind}", every_n_train_steps=2, async_save=behind, save_top_k=-1)
        _, trainer = fit(strategy=ZeroStrategy(), world_size=2, max_steps=6, callbacks=[callback], logger=logger)
        if trainer.is_global_zero:
            with open(Path(logger.log_dir) / "metrics.csv") as file:
                rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
            rows = [row for row in rows if "checkpoint/bytes" in row]
            assert [row["step"] for row in rows] == [2, 4, 6]
            for row in rows:
                assert 0 < row["checkpoint/stall_seconds"] <= row["checkpoint/seconds"] < 60
                assert row["checkpoint/bytes"] > row["checkpoint/written_bytes"] or row["step"] == 2
                assert row["checkpoint/slowest_rank"] in (0, 1)
            stalls = sum(row["checkpoint/stall_seconds"] for row in rows)
            assert rows[-1]["checkpoint/total_stall_seconds"] == pytest.approx(stalls)


@distributed(world_size=1, process_group=False)
def test_after_fit_a_save_is_there_when_it_returns(tmp_path):
    strategy = ZeroStrategy(checkpoint_io=ZeroCheckpointIO(async_save=True))
    _, trainer = fit(strategy=strategy, world_size=1, max_steps=2)
    trainer.save_checkpoint(tmp_path / "tag")
    assert tags(tmp_path) == ["tag"]
    with pytest.raises(UnsupportedModelError, match="async_save"):
        fit(strategy="ddp", world_size=1, max_steps=2, callbacks=[ZeroCheckpoint(tmp_path, async_save=True)])


def test_the_memory_of_a_snapshot_is_used_again():
    from lightning_zero.checkpoint.content import RankContent, TensorToSave
    from lightning_zero.checkpoint.snapshot import Snapshot

    tensors = [torch.randn(1000), torch.tensor(3.0), torch.randn(7, 5).bfloat16()]
    items = [TensorToSave("model", str(n), 0, t.numel(), t) for n, t in enumerate(tensors)]
    snapshot = Snapshot()
    before = [item.tensor for item in snapshot.take(RankContent(items, [], b"", 1)).tensors]
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(before, tensors, strict=True))
    tensors[0].zero_()
    assert not torch.equal(before[0], tensors[0])
    after = [item.tensor for item in snapshot.take(RankContent(items, [], b"", 2)).tensors]
    assert [copy.data_ptr() for copy in before] == [copy.data_ptr() for copy in after]


def test_the_memory_of_a_snapshot_is_kept_until_the_device_has_written_it():
    from lightning_zero.checkpoint.content import RankContent, TensorToSave
    from lightning_zero.checkpoint.snapshot import Snapshot

    held = []

    class Event:
        def synchronize(self):
            held.append(len(snapshot._memory))

    small, large = (RankContent([TensorToSave("model", "w", 0, n, torch.ones(n))], [], b"", 1) for n in (10, 10**6))
    snapshot = Snapshot()
    snapshot.take(small)
    before = len(snapshot._memory)
    snapshot._events = [Event()]
    snapshot.take(large)
    assert held == [before]
    snapshot._events = [Event()]
    snapshot.release()
    assert held[1:] == [held[1]]
    assert held[1] > 4 * 10**6


@pytest.mark.filterwarnings("error")  # what a thread raises
def test_memory_that_could_not_be_got_ahead_of_a_snapshot_is_got_with_it(monkeypatch):
    from lightning_zero.checkpoint import snapshot
    from lightning_zero.checkpoint.content import RankContent, TensorToSave

    def fail(nbytes, *, pinned):
        raise RuntimeError("can't allocate memory")

    taken, tensor = snapshot.Snapshot(), torch.randn(1000)
    with monkeypatch.context() as scarce:
        scarce.setattr(snapshot, "_allocate", fail)
        taken.reserve(10**6, pinned=False)
        taken._reserved()
    copied = taken.take(RankContent([TensorToSave("model", "w", 0, 1000, tensor)], [], b"", 1))
    assert torch.equal(copied.tensors[0].tensor, tensor)


@pytest.mark.parametrize("stock", [False, True])
def test_a_save_that_fails_at_once_deletes_nothing(tmp_path, stock):
    fails_at_once(tmp_path, stock)


@distributed(world_size=1, process_group=False)
def fails_at_once(directory, stock):
    class Wait(CSVLogger):
        def after_save_checkpoint(self, checkpoint_callback):
            time.sleep(0.3)  # by now the save has failed, and its deletion comes after this

    def train(max_steps, resume):
        strategy = ZeroStrategy(checkpoint_io=ZeroCheckpointIO(async_save=True))
        kind = ModelCheckpoint if stock else ZeroCheckpoint
        callback = kind(directory / "c", "{step}", every_n_train_steps=2, save_top_k=1)
        fit(
            strategy=strategy,
            world_size=1,
            max_steps=max_steps,
            callbacks=[callback],
            logger=Wait(directory / "logs"),
            ckpt_path=directory / "c" if resume else None,
        )

    train(3, False)
    with pytest.MonkeyPatch.context() as patch:
        Fail(patch, rank=0, times=100)
        with pytest.raises(CheckpointWriteError, match="No space left"):
            train(5, True)
    assert tags(directory / "c") == ["step=2.ckpt"]
    assert (directory / "c" / "latest").read_text() == "step=2.ckpt"


@distributed(world_size=2, process_group=False)
def test_what_comes_after_a_commit_never_leaves_one_rank_alone_with_an_error(tmp_path):
    for behind in (False, True):
        with pytest.MonkeyPatch.context() as patch:

            def refuse(*args, **kwargs):
                raise OSError(5, "Input/output error")

            patch.setattr(Retention, "apply", refuse)
            directory = tmp_path / str(behind)
            callback = ZeroCheckpoint(directory, every_n_train_steps=1, keep_last=1, async_save=behind)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fit(strategy=ZeroStrategy(), world_size=2, max_steps=3, callbacks=[callback])
        assert tags(directory) == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]


class Terminate(Callback):
    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)


@distributed(world_size=2, process_group=False)
def test_sigterm_saves_even_if_the_save_before_has_failed(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        Fail(patch, rank=1, times=1)
        callback = ZeroCheckpoint(tmp_path, every_n_train_steps=4, async_save=True)
        with pytest.raises(SIGTERMException):
            fit(strategy=ZeroStrategy(), world_size=2, max_steps=12, callbacks=[Terminate(), callback])
    (tag,) = tags(tmp_path)
    assert int(tag.removeprefix("step=").removesuffix(".ckpt")) in (5, 6, 7)
    assert (tmp_path / "latest").read_text() == tag


@distributed(world_size=2, process_group=False)
def test_weights_alone_never_take_the_place_of_what_training_resumes_from(tmp_path):
    _, trainer = fit(strategy=ZeroStrategy(), world_size=2, max_steps=2)
    trainer.save_checkpoint(tmp_path / "full")
    with pytest.raises(CheckpointWriteError, match="weights alone"):
        trainer.save_checkpoint(tmp_path / "full", weights_only=True)
    trainer.save_checkpoint(tmp_path / "older")
    trainer.save_checkpoint(tmp_path / "weights", weights_only=True)
    trainer.strategy.barrier()
    trainer.strategy.remove_checkpoint(tmp_path / "older")
    trainer.strategy.barrier()
    assert (tmp_path / "latest").read_text() == "full"
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        (tmp_path / "latest").unlink()
        with pytest.warns(UserWarning, match="is missing"):
            assert resolve(tmp_path).name == "full"


@distributed(world_size=2, process_group=False)
def test_callbacks_in_one_directory_leave_each_others_tags(tmp_path):
    best = ZeroCheckpoint(tmp_path, monitor="val_loss", save_top_k=1, every_n_epochs=1)
    last = ZeroCheckpoint(tmp_path, every_n_train_steps=3, keep_last=1)
    every = ZeroCheckpoint(tmp_path, "{step}-{epoch}", every_n_epochs=1, save_top_k=-1)
    fit(strategy=ZeroStrategy(), world_size=2, max_epochs=4, callbacks=[best, last, every])
    assert Path(best.best_model_path).is_dir()
    assert len(list(tmp_path.glob("step=*-epoch=?.ckpt"))) == 4


def test_what_a_filename_is_filled_with_is_recognised_and_nothing_else_is():
    def recognises(filename, tag):
        return ZeroCheckpoint("ckpts", filename)._tag_pattern().fullmatch(f"{tag}.ckpt") is not None

    assert recognises("{epoch}-{step:06d}-{loss:.2f}", "epoch=0-step=000005-loss=-0.31")
    assert recognises("{loss}", "loss=1e-05-v1")
    assert recognises("{loss:.2f}", "loss=nan")
    assert recognises("{step:,}", "step=1,000")
    assert not recognises("{step}", "step=5-mine")
    assert not recognises("{loss:.2f}", "loss=0.31-best")


def test_what_would_make_directories_in_directories_is_refused():
    for name in ("{val/loss:.2f}", "a/{step}"):
        with pytest.raises(ValueError, match="a tag is one plain name"):
            ZeroCheckpoint("ckpts", name)
    ZeroCheckpoint("ckpts", "loss={val/loss:.2f}", auto_insert_metric_name=False)
