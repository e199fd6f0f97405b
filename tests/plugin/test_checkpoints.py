"""Checkpoints through Lightning: exact resume, other world sizes, what is restored, what is exported."""

import json
import os
import random
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_zero import Fp32Export, ZeroCheckpoint, ZeroCheckpointIO, ZeroStrategy
from lightning_zero.checkpoint.resolution import resolve
from lightning_zero.errors import (
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    CorruptCheckpointError,
    TagMismatchError,
    UnreachableRankError,
    UnsupportedModelError,
)
from lightning_zero.plugin.random_state import get_random_state, set_random_state
from tests.engine.long_rounds import cut_in_long_rounds_of_small_buckets
from tests.launch import distributed, run_ranks
from tests.models import Data, Model, fit, quiet_trainer


def train(directory, world_size, *, max_steps=None, max_epochs=-1, resume=False, stage=2, every=5, **options):
    every_n = {"every_n_epochs": 1} if every == "epoch" else {"every_n_train_steps": every}
    """One run; what a rank has seen and holds at the end."""
    snapshot = Snapshot()
    model, trainer = fit(
        strategy=ZeroStrategy(stage=stage),
        world_size=world_size,
        max_steps=max_steps or -1,
        max_epochs=max_epochs,
        callbacks=[ZeroCheckpoint(directory, keep_last=10, **every_n), snapshot],
        ckpt_path="last" if resume else None,
        **options,
    )
    return {
        "losses": model.losses,
        "state_dict": {name: value.clone() for name, value in model.state_dict().items()},
        "at_start": snapshot.at_start,
        "at_end": snapshot.at_end,
        "step": trainer.global_step,
    }


class Snapshot(Callback):
    """Every parameter's whole master and optimizer state."""

    def _take(self, trainer, module):
        full = {
            name: trainer.strategy.full_state(parameter)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        return {name: {key: torch.as_tensor(v).clone() for key, v in state.items()} for name, state in full.items()}

    def on_train_start(self, trainer, module):
        self.at_start = self._take(trainer, module)

    def on_train_end(self, trainer, module):
        self.at_end = self._take(trainer, module)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            assert_same(a[key], b[key])
        else:
            assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize(("world_size", "precision"), [(1, "32-true"), (2, "32-true"), (2, "64-true")])
def test_a_resumed_run_goes_on_bit_for_bit_in_the_middle_of_an_epoch(tmp_path, world_size, precision):
    options = {"process_group": False, "precision": precision}
    whole = run_ranks(train, world_size, tmp_path / "whole", world_size, max_steps=23, **options)
    run_ranks(train, world_size, tmp_path / "cut", world_size, max_steps=10, **options)
    assert (tmp_path / "cut" / "latest").read_text() == "step=10.ckpt"
    resumed = run_ranks(train, world_size, tmp_path / "cut", world_size, max_steps=23, resume=True, **options)
    for a, b in zip(whole, resumed, strict=True):
        assert a["losses"][10:] == b["losses"]
        assert_same(a["state_dict"], b["state_dict"])
        assert_same(a["at_end"], b["at_end"])


def test_a_resumed_run_goes_on_bit_for_bit_at_the_border_of_an_epoch_and_in_bf16(tmp_path):
    for every, more in (("epoch", {}), (8, {"limit_val_batches": 0})):
        options = {"process_group": False, "precision": "bf16-true", "every": every, **more}
        whole = run_ranks(train, 2, tmp_path / f"whole{every}", 2, max_epochs=3, **options)
        run_ranks(train, 2, tmp_path / f"cut{every}", 2, max_epochs=1, **options)
        resumed = run_ranks(train, 2, tmp_path / f"cut{every}", 2, max_epochs=3, resume=True, **options)
        for a, b in zip(whole, resumed, strict=True):
            assert a["losses"][8:] == b["losses"]
            assert_same(a["state_dict"], b["state_dict"])
            assert_same(a["at_end"], b["at_end"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_what_four_ranks_saved_any_number_resumes_bit_for_bit(tmp_path, precision):
    options = {"process_group": False, "precision": precision, "every": 4}
    saved = run_ranks(train, 4, tmp_path, 4, max_steps=4, **options)[0]
    for world_size, stage in ((1, 2), (2, 1), (3, 2)):
        resumed = run_ranks(
            train, world_size, tmp_path, world_size, max_steps=6, resume=True, stage=stage, **(options | {"every": 100})
        )
        for rank in resumed:
            assert_same(rank["at_start"], saved["at_end"])
            assert rank["step"] == 6


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_what_was_saved_in_long_rounds_resumes_bit_for_bit_on_any_number_of_ranks_cut_in_any_way(tmp_path, precision):
    options = {"process_group": False, "precision": precision}
    saved = run_ranks(train_in_long_rounds, 3, tmp_path, 3, max_steps=4, every=4, **options)[0]
    for resume, world_size in ((train, 2), (train_in_long_rounds, 2), (train_in_long_rounds, 3)):
        for rank in run_ranks(resume, world_size, tmp_path, world_size, max_steps=6, resume=True, every=100, **options):
            assert_same(rank["at_start"], saved["at_end"])
            assert rank["step"] == 6


def train_in_long_rounds(*args, **options):
    cut_in_long_rounds_of_small_buckets(most_cuts=3)
    return train(*args, **options)


def test_a_checkpoint_of_ddp_is_resumed_and_cut(tmp_path):
    path = tmp_path / "ddp.ckpt"
    saved = run_ranks(save_with_ddp, 1, path, process_group=False)[0]
    for rank in run_ranks(resume_from_ddp, 2, path, process_group=False):
        for name, state in saved.items():
            assert torch.equal(rank[name]["exp_avg"], state)


def save_with_ddp(path):
    model, trainer = fit(strategy="ddp", world_size=1, max_steps=3)
    trainer.save_checkpoint(path)
    optimizer = trainer.optimizers[0]
    return {
        name: optimizer.state[parameter]["exp_avg"]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def resume_from_ddp(path):
    snapshot = Snapshot()
    fit(strategy=ZeroStrategy(), world_size=2, max_steps=4, callbacks=[snapshot], ckpt_path=path)
    return snapshot.at_start


@distributed(world_size=2, process_group=False)
def test_buffers_frozen_and_tied_parameters_are_restored_and_stay_tied(tmp_path):
    model, trainer = fit(strategy=ZeroStrategy(), world_size=2, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "tag")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = Model()
    with torch.no_grad():
        for value in fresh.state_dict().values():
            value.zero_()
    trainer = quiet_trainer(world_size=2)
    trainer.validate(fresh, datamodule=Data(), ckpt_path=tmp_path / "tag", verbose=False)
    assert_same(dict(fresh.state_dict()), expected)
    assert fresh.out.weight is fresh.tied.weight
    assert fresh.big.tolist() == [20000007, 2**60 + 1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_checkpoint_takes_twelve_bytes_a_parameter(tmp_path, precision):
    run_ranks(save_wide, 2, tmp_path, precision, process_group=False)
    manifest = json.loads((tmp_path / "tag" / "manifest.json").read_text())
    trained = sum(torch.Size(e["shape"]).numel() for e in manifest["entries"] if e["role"] == "parameter")
    others = sum(torch.Size(e["shape"]).numel() for e in manifest["entries"] if e["role"] != "parameter")
    on_disk = sum(path.stat().st_size for path in (tmp_path / "tag").iterdir())
    assert on_disk <= 12 * trained * 1.01 + 4 * others + 40_000  # the random states of two ranks, and two headers


def save_wide(directory, precision):
    model = Model(width=6000)
    model.frozen = torch.nn.Identity()
    _, trainer = fit(model, ZeroStrategy(), world_size=2, max_steps=2, precision=precision)
    trainer.save_checkpoint(directory / "tag")


def test_the_export_opens_where_lightning_zero_is_not_installed(tmp_path):
    ours = run_ranks(fit_and_export, 2, tmp_path, process_group=False)[0]
    script = tmp_path / "read.py"
    script.write_text(
        "import sys; sys.modules['lightning_zero'] = None\n"
        "import torch\n"
        "from model import Model\n"
        "model = Model.load_from_checkpoint(sys.argv[1], weights_only=True)\n"
        "assert model.out.weight is model.tied.weight\n"
        "checkpoint = torch.load(sys.argv[1], weights_only=True, mmap=True)\n"
        "assert checkpoint['global_step'] == 4 and checkpoint['hyper_parameters']['width'] == 24\n"
        "torch.save(model.state_dict(), sys.argv[2])\n"
    )
    source = (Path(__file__).parent.parent / "models.py").read_text()
    source = source.replace("from lightning_zero import ZeroStrategy\n", "ZeroStrategy = None\n")
    (tmp_path / "model.py").write_text(source)
    command = [sys.executable, str(script), str(tmp_path / "model.ckpt"), str(tmp_path / "out.pt")]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    read = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_same(read, ours)


def fit_and_export(directory):
    model, _ = fit(strategy=ZeroStrategy(), world_size=2, max_steps=4, callbacks=[Fp32Export(directory / "model.ckpt")])
    return dict(model.state_dict())


def test_the_export_of_a_bf16_run_holds_the_masters(tmp_path):
    masters, live = run_ranks(fit_and_export_bf16, 2, tmp_path, process_group=False)[0]
    exported = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    for name, state in masters.items():
        assert torch.equal(exported[name], state["param"])
        assert torch.equal(exported[name].bfloat16(), live[name])
    assert not list(tmp_path.glob(".*"))


def fit_and_export_bf16(directory):
    snapshot = Snapshot()
    model, _ = fit(
        strategy=ZeroStrategy(),
        world_size=2,
        max_steps=4,
        precision="bf16-true",
        callbacks=[snapshot, Fp32Export(directory / "model.ckpt")],
    )
    return snapshot.at_end, dict(model.state_dict())


def fit_with_retention(directory):
    callback = ZeroCheckpoint(directory, every_n_train_steps=2, keep_last=2, keep_every_n_steps=6)
    fit(strategy=ZeroStrategy(), world_size=2, max_steps=12, callbacks=[callback])


def test_retention_keeps_the_last_and_every_nth(tmp_path):
    run_ranks(fit_with_retention, 2, tmp_path, process_group=False)
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["step=10.ckpt", "step=12.ckpt", "step=6.ckpt"]
    assert (tmp_path / "latest").read_text() == "step=12.ckpt"


@distributed(world_size=2, process_group=False)
def test_model_checkpoints_top_k_and_save_last_work_on_directories(tmp_path):
    callback = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2, save_last=True, filename="{epoch}")
    _, trainer = fit(strategy=ZeroStrategy(), world_size=2, max_epochs=4, callbacks=[callback])
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == sorted([*(Path(path).name for path in callback.best_k_models), "last.ckpt"])
    assert len(names) == 3
    metrics = trainer.validate(datamodule=Data(), ckpt_path="best", verbose=False)
    assert metrics[0]["val_loss"] == pytest.approx(float(callback.best_model_score))


@distributed(world_size=2, process_group=False)
def test_a_checkpoint_of_weights_alone_does_not_become_latest(tmp_path):
    _, trainer = fit(strategy=ZeroStrategy(), world_size=2, max_steps=2)
    trainer.save_checkpoint(tmp_path / "full")
    trainer.save_checkpoint(tmp_path / "weights", weights_only=True)
    assert (tmp_path / "latest").read_text() == "full"
    assert (tmp_path / "weights" / "manifest.json").exists()


@distributed(world_size=2, process_group=False)
def test_a_tag_that_is_there_is_replaced(tmp_path):
    model, trainer = fit(strategy=ZeroStrategy(), world_size=2, max_steps=2)
    trainer.save_checkpoint(tmp_path / "tag")
    with torch.no_grad():
        model.into.weight.fill_(3)
    trainer.save_checkpoint(tmp_path / "tag")
    fresh = Model()
    quiet_trainer(world_size=2).validate(fresh, datamodule=Data(), ckpt_path=tmp_path, verbose=False)
    assert torch.all(fresh.into.weight == 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "tag"]


@distributed(world_size=1, process_group=False)
def test_last_starts_afresh_where_there_is_nothing(tmp_path):
    torn = tmp_path / "checkpoints" / ".staging-step=1.ckpt-0123abcd"  # of a run that was killed in its first save
    torn.mkdir(parents=True)
    (torn / "manifest.json").touch()
    _model, trainer = fit(
        strategy=ZeroStrategy(),
        world_size=1,
        max_steps=2,
        callbacks=[ZeroCheckpoint(every_n_train_steps=1)],
        ckpt_path="last",
        default_root_dir=tmp_path,
    )
    assert trainer.global_step == 2
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step=2.ckpt"


@distributed(world_size=1, process_group=False)
def test_of_two_callbacks_directories_last_takes_the_one_that_was_committed_last(tmp_path):
    saved = ((tmp_path / "a", 3), (tmp_path / "b", 2))
    callbacks = [ZeroCheckpoint(directory, every_n_train_steps=every) for directory, every in saved]
    fit(strategy=ZeroStrategy(), world_size=1, max_steps=3, callbacks=callbacks)
    (tmp_path / "b" / ".staging-of-a-dead-save").mkdir()
    _model, trainer = fit(strategy=ZeroStrategy(), world_size=1, max_steps=3, callbacks=callbacks, ckpt_path="last")
    assert resolve(trainer.ckpt_path).name == "step=3.ckpt"


@distributed(world_size=2, process_group=False)
def test_hooks_see_an_ordinary_dict_and_what_they_change_is_loaded(tmp_path):
    _, trainer = fit(strategy=ZeroStrategy(), world_size=2, max_steps=2)
    trainer.save_checkpoint(tmp_path / "tag")

    class Edited(Model):
        def on_load_checkpoint(self, checkpoint):
            weights = checkpoint["state_dict"]
            assert all(isinstance(value, torch.Tensor) for value in weights.values())
            weights["into.weight"] = torch.full_like(weights["into.weight"], 2.0)
            weights["frozen.bias"] = weights["frozen.bias"] * 0

    class Look(Callback):
        def on_train_start(self, trainer, module):
            self.seen = module.into.weight.clone(), module.frozen.bias.clone()

    look = Look()
    for precision in ("32-true", "bf16-true"):
        fit(
            Edited(),
            ZeroStrategy(),
            world_size=2,
            max_steps=3,
            ckpt_path=tmp_path / "tag",
            callbacks=[look],
            precision=precision,
        )
        assert torch.all(look.seen[0] == 2)
        assert torch.all(look.seen[1] == 0)


@distributed(world_size=2, process_group=False)
def test_averaged_weights_that_a_hook_puts_in_a_parameters_place_are_saved_as_given(tmp_path):
    class Averaged(Model):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"]["into.weight"] = torch.full((24, 8), 7.0)

    _, trainer = fit(Averaged(), ZeroStrategy(), world_size=2, max_steps=2)
    trainer.save_checkpoint(tmp_path / "tag")
    fresh = Model()
    quiet_trainer(world_size=2).validate(fresh, datamodule=Data(), ckpt_path=tmp_path / "tag", verbose=False)
    assert torch.all(fresh.into.weight == 7)


def test_a_torn_latest_falls_back_to_the_newest_sound_tag(tmp_path):
    run_ranks(train, 2, tmp_path, 2, max_steps=10, process_group=False)
    (tmp_path / "step=10.ckpt" / "rank-00001-of-00002.safetensors").unlink()
    resumed = run_ranks(train, 2, tmp_path, 2, max_steps=12, resume=True, every=100, process_group=False)
    assert all(len(rank["losses"]) == 7 for rank in resumed)
    assert (tmp_path / "step=10.ckpt").exists()


class DeepSpeedStyle(Callback):
    """Saves and loads by tags in the middle of a fit."""

    def __init__(self, directory):
        self.directory = directory

    def on_train_batch_end(self, trainer, module, *args):
        strategy, step = trainer.strategy, trainer.global_step
        if step == 1:
            assert strategy.load_zero_checkpoint(self.directory) == (None, {})
        if step == 2:
            self.saved = take_state(trainer, module)
            strategy.save_zero_checkpoint(self.directory, client_state={"epoch": 7, "global_step": "mine"})
            strategy.save_zero_checkpoint(
                self.directory, "light", save_latest=False, exclude_frozen_parameters=True, client_state=None
            )
        if step == 4:
            assert not torch.equal(
                take_state(trainer, module)["into.weight"]["param"], self.saved["into.weight"]["param"]
            )
            mine = f"tag{trainer.global_rank}"
            for arguments in ({"tag": mine}, {"load_optimizer_states": trainer.is_global_zero}):
                with pytest.raises(TagMismatchError, match=r"rank 0 .* rank 1 .*same arguments"):
                    strategy.load_zero_checkpoint(self.directory, **arguments)
            trained = take_state(trainer, module)
            strategy.load_zero_checkpoint(self.directory, custom_load_fn=lambda src, dst: None, load_module_only=True)
            assert_same(take_state(trainer, module), trained)
            strategy.load_zero_checkpoint(self.directory, custom_load_fn=load_some, load_module_only=True)
            some = take_state(trainer, module)
            for name in some:
                expected = self.saved if name == "into.weight" else trained
                assert torch.equal(some[name]["param"], expected[name]["param"]), name
            strategy.load_zero_checkpoint(self.directory, custom_load_fn=load_halves, load_module_only=True)
            assert bool((take_state(trainer, module)["into.weight"]["param"] == 0.5).all())
            path, client_state = strategy.load_zero_checkpoint(self.directory)
            assert Path(path).name == "global_step2"
            assert client_state == {"epoch": 7, "global_step": "mine"}
            assert trainer.global_step == 4
            assert_same(take_state(trainer, module), self.saved)
            with pytest.raises(CheckpointNotFoundError, match="global_step3"):
                strategy.load_zero_checkpoint(self.directory, "global_step3")
            with pytest.raises(CheckpointMismatchError, match="frozen"):
                strategy.load_zero_checkpoint(self.directory, "light")
            warned = pytest.warns(UserWarning, match=r"missing .*frozen") if trainer.is_global_zero else nullcontext()
            with warned:
                strategy.load_zero_checkpoint(self.directory, "light", load_module_strict=False)
            with pytest.raises(TagMismatchError, match="rank 1: 'mine1'"):
                strategy.save_zero_checkpoint(self.directory, f"mine{trainer.global_rank}")


def load_some(state_dict, module):
    with torch.no_grad():
        module.into.weight.copy_(state_dict["into.weight"])


def load_halves(state_dict, module):
    with torch.no_grad():
        module.into.weight.fill_(0.5)


def take_state(trainer, module):
    return Snapshot()._take(trainer, module)


@distributed(world_size=2, process_group=False)
def test_checkpoints_are_saved_and_loaded_by_tags_as_deepspeed_users_know_it(tmp_path):
    for precision in ("32-true", "bf16-true"):
        directory = tmp_path / precision
        fit(
            strategy=ZeroStrategy(),
            world_size=2,
            max_steps=5,
            callbacks=[DeepSpeedStyle(directory)],
            precision=precision,
        )
        assert (directory / "latest").read_text() == "global_step2"


class LoadsWeights(Callback):
    """Loads when there is no fit."""

    def __init__(self, directory):
        self.directory = directory

    def on_validation_start(self, trainer, module):
        before = module.into.weight.clone()
        with pytest.raises(UnsupportedModelError, match="nothing is partitioned"):
            trainer.strategy.load_zero_checkpoint(self.directory)
        assert torch.equal(module.into.weight, before)
        trainer.strategy.load_zero_checkpoint(self.directory, load_module_only=True)


@distributed(world_size=2, process_group=False)
def test_weights_alone_are_loaded_without_a_fit_too_and_nothing_else(tmp_path):
    trained, trainer = fit(strategy=ZeroStrategy(), world_size=2, max_steps=2)
    trainer.strategy.save_zero_checkpoint(tmp_path)
    loaded = Model()
    quiet_trainer(ZeroStrategy(), world_size=2, callbacks=[LoadsWeights(tmp_path)]).validate(loaded, datamodule=Data())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trained.parameters(), strict=True))


@distributed(world_size=2, process_group=False)
def test_the_learning_rate_finder_leaves_the_run_as_it_was(tmp_path):
    from lightning.pytorch.tuner import Tuner

    for precision in ("32-true", "bf16-true"):
        model = Model()
        trainer = quiet_trainer(world_size=2, max_steps=3, default_root_dir=tmp_path, precision=precision)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        finder = Tuner(trainer).lr_find(model, datamodule=Data(), num_training=5, update_attr=False)
        assert len(finder.results["lr"]) == 5
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value.to(before[name].dtype), before[name], rtol=1e-2, atol=1e-2)
        assert not any(tmp_path.iterdir())
        trainer.fit(model, datamodule=Data())
        assert trainer.global_step == 3


def fit_with_save_last(directory):
    callback = ZeroCheckpoint(directory, every_n_train_steps=1, keep_last=3, save_last=True)
    fit(strategy=ZeroStrategy(), world_size=1, max_steps=6, callbacks=[callback])
    weights = ZeroCheckpoint(directory / "weights", every_n_train_steps=1, save_weights_only=True)
    fit(strategy=ZeroStrategy(), world_size=1, max_steps=2, callbacks=[weights])
    with pytest.warns(UserWarning, match="holds weights alone"):
        fit(strategy=ZeroStrategy(), world_size=1, max_steps=2, callbacks=[weights], ckpt_path="last")


def test_save_last_takes_no_place_of_keep_last_and_weights_alone_are_not_resumed(tmp_path):
    run_ranks(fit_with_save_last, 1, tmp_path, process_group=False)
    names = sorted(path.name for path in tmp_path.iterdir() if (path / "manifest.json").exists())
    assert names == ["last.ckpt", "step=4.ckpt", "step=5.ckpt", "step=6.ckpt"]


@distributed(world_size=2, process_group=False)
def test_what_is_saved_before_there_is_anything_to_resume_is_never_latest(tmp_path):
    trainer = quiet_trainer(world_size=2, max_steps=1)
    trainer.validate(Model(), datamodule=Data(), verbose=False)
    trainer.strategy.save_zero_checkpoint(tmp_path, "weights")
    assert os.listdir(tmp_path) == ["weights"]
    trainer.fit(Model(), datamodule=Data())
    trainer.strategy.save_zero_checkpoint(tmp_path, "all")
    assert (tmp_path / "latest").read_text() == "all"


@distributed(world_size=2, process_group=False)
def test_a_checkpoint_that_was_validated_leaves_the_next_fits_random_numbers_alone(tmp_path):
    _, trainer = fit(strategy=ZeroStrategy(), world_size=2, max_steps=3)
    trainer.save_checkpoint(tmp_path / "tag")
    plain, _ = fit(strategy=ZeroStrategy(), world_size=2, max_steps=3)
    trainer = quiet_trainer(world_size=2, max_steps=3)
    trainer.validate(Model(), datamodule=Data(), ckpt_path=tmp_path / "tag", verbose=False)
    seed_everything(3, verbose=False)
    model = Model()
    trainer.fit(model, datamodule=Data())
    assert model.losses == plain.losses


class OwnMetric(Model):
    def training_step(self, batch, batch_idx):
        self.log("mine", float(self.global_rank))
        return super().training_step(batch, batch_idx)


def test_one_ranks_state_that_is_damaged_is_an_error_on_all_and_keeps_nobody_from_validating(tmp_path):
    run_ranks(fit_with_retention, 2, tmp_path, process_group=False)
    shard = tmp_path / "step=12.ckpt" / "rank-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[content.index(b"PK")] ^= 1
    shard.write_bytes(content)
    run_ranks(use_damaged, 2, tmp_path, process_group=False)


def use_damaged(directory):
    with pytest.raises(CorruptCheckpointError, match=r"rank 1: .*rank/state"):
        fit(strategy=ZeroStrategy(), world_size=2, max_steps=14, ckpt_path=directory)
    quiet_trainer(ZeroStrategy(), world_size=2).validate(Model(), datamodule=Data(), ckpt_path=directory)


@distributed(world_size=2, process_group=False)
def test_of_file_names_with_a_ranks_own_metric_the_first_ones_is_taken(tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}-{mine:.0f}", monitor="mine", every_n_train_steps=2)
    with pytest.warns(UserWarning, match=r"rank 1: 'step=2-mine=1.ckpt'.*sync_dist=True"):
        fit(OwnMetric(), world_size=2, max_steps=2, callbacks=[saving])
    assert os.listdir(tmp_path / "step=2-mine=0.ckpt")
    assert (tmp_path / "latest").read_text() == "step=2-mine=0.ckpt"


class DifferentTags(Callback):
    def __init__(self, directory):
        self.directory = directory

    def on_train_batch_end(self, trainer, module, *args):
        strategy, mine = trainer.strategy, f"mine{trainer.global_rank}"
        with pytest.raises(TagMismatchError):
            strategy.save_zero_checkpoint(self.directory, mine)
        with pytest.warns(UserWarning, match=r"rank 0's tag is saved.*rank 1: 'mine1'"):
            strategy.save_zero_checkpoint(self.directory / "warn", mine, tag_validation="warn")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            strategy.save_zero_checkpoint(self.directory / "ignore", mine, tag_validation="ignore")
        with pytest.raises(ValueError, match="tag_validation"):
            strategy.save_zero_checkpoint(self.directory, "tag", tag_validation="Fail")
        for tag in ("", "../out", "a/b", "latest"):
            with pytest.raises(CheckpointWriteError, match="can't be a tag"):
                strategy.save_zero_checkpoint(self.directory, tag)
        with pytest.raises(CheckpointWriteError, match=r"a tag is a string, not 1\.5"):
            strategy.save_zero_checkpoint(self.directory, 1.5)
        with pytest.raises(CheckpointWriteError, match=r"client_state must be a dict, not \['note'\]"):
            strategy.save_zero_checkpoint(self.directory, client_state=["note"])
        with pytest.raises(CheckpointWriteError, match=r"rank 1 .*can't be a tag"):
            strategy.save_zero_checkpoint(self.directory, "a/b" if trainer.global_rank else "good")


@distributed(world_size=2, process_group=False)
def test_different_tags_are_an_error_or_the_first_ranks_is_taken(tmp_path):
    fit(strategy=ZeroStrategy(), world_size=2, max_steps=1, callbacks=[DifferentTags(tmp_path)])
    assert sorted(os.listdir(tmp_path)) == ["ignore", "warn"]
    for name in ("ignore", "warn"):
        assert sorted(os.listdir(tmp_path / name)) == ["latest", "mine0"]
    with pytest.raises(ValueError, match="tag_validation"):
        ZeroStrategy(tag_validation="strict")


class SaveAlone(Callback):
    def __init__(self, directory, rank, method):
        self.directory, self.rank, self.method, self.seconds = directory, rank, method, None

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 2 and trainer.global_rank == self.rank:
            began = time.monotonic()
            try:
                if self.method == "trainer":
                    trainer.save_checkpoint(self.directory / "tag")
                else:
                    getattr(trainer.strategy, f"{self.method}_zero_checkpoint")(self.directory)
            finally:
                self.seconds = time.monotonic() - began


@pytest.mark.parametrize(("rank", "method"), [(0, "save"), (1, "load"), (0, "trainer")])
def test_a_rank_that_saves_or_loads_alone_gets_an_error_within_the_time_out(tmp_path, rank, method):
    run_ranks(alone, 2, tmp_path, rank, method, process_group=False)
    assert (tmp_path / "latest").read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["before", "latest"]


def alone(directory, rank, method):
    _, trainer = fit(strategy=ZeroStrategy(), world_size=2, max_steps=1)
    trainer.save_checkpoint(directory / "before")
    callback = SaveAlone(directory, rank, method)
    strategy = ZeroStrategy(timeout=timedelta(seconds=3))
    error = UnreachableRankError if method == "load" else CheckpointWriteError
    with pytest.raises((error, RuntimeError), match=r"waited in vain|imed out|timeout|closed") as caught:
        fit(strategy=strategy, world_size=2, max_steps=3, callbacks=[callback])
    if trainer.global_rank == rank:
        assert isinstance(caught.value, error)
        assert "has to be called on every rank" in str(caught.value)
        assert callback.seconds < 10


class AskAlone(Callback):
    def __init__(self, method):
        self.method = method

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_rank == 1:
            parameter = () if self.method == "grad_norm" else (next(module.parameters()),)
            getattr(trainer.strategy, self.method)(*parameter)


@pytest.mark.parametrize("method", ["grad_norm", "full_grad", "full_state"])
def test_a_rank_that_asks_alone_is_told_that_all_have_to(method):
    run_ranks(asks_alone, 2, method, process_group=False)


def asks_alone(method):
    with pytest.raises(RuntimeError if os.environ["RANK"] == "0" else UnreachableRankError) as caught:
        fit(
            strategy=ZeroStrategy(timeout=timedelta(seconds=3)), world_size=2, max_steps=2, callbacks=[AskAlone(method)]
        )
    assert "has to be called on every rank" in str(caught.value) or not isinstance(caught.value, UnreachableRankError)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "notes.ckpt").write_text("hello")
    with pytest.raises(CorruptCheckpointError, match=r"notes\.ckpt isn't a checkpoint"):
        ZeroCheckpointIO().load_checkpoint(tmp_path / "notes.ckpt")


@distributed(world_size=1, process_group=False)
def test_a_path_where_nothing_is_tells_of_the_checkpoints_beside_it(tmp_path):
    def resume_from(path):
        fit(strategy=ZeroStrategy(), world_size=1, max_steps=4, ckpt_path=tmp_path / path)

    _, trainer = fit(strategy=ZeroStrategy(), world_size=1, max_steps=2)
    trainer.save_checkpoint(tmp_path / "ckpts" / "two")
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint at .*three; beside it there are \['two'\]$"):
        resume_from("ckpts/three")
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint at .*chkpts$"):
        resume_from("chkpts")


def test_random_states_go_on_as_they_are_saved_and_as_lists_as_they_were_before():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    state = get_random_state()
    kind, keys, *rest = np.random.get_state(legacy=True)
    before = {**state, "python": random.getstate(), "numpy": (kind, keys.tolist(), *rest)}
    drawn = draw()
    for saved in (state, before):
        set_random_state(saved)
        assert draw() == drawn


class InOrder(LightningModule):
    """Two layers of one shape, given to the optimizer in this order or that."""

    def __init__(self, *names):
        super().__init__()
        self.names = names
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def training_step(self, batch):
        return self.second(self.first(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for name in self.names for p in getattr(self, name).parameters()])

    def train_dataloader(self):
        return torch.utils.data.DataLoader([torch.ones(4)] * 8, batch_size=2)


@distributed(world_size=2, process_group=False)
def test_states_are_never_given_to_parameters_in_another_order(tmp_path):
    def trained(*names, max_steps, ckpt_path=None):
        trainer = quiet_trainer(ZeroStrategy(), world_size=2, max_steps=max_steps)
        trainer.fit(InOrder(*names), ckpt_path=ckpt_path)
        return trainer

    trained("second", "first", max_steps=2).save_checkpoint(tmp_path / "tag")
    with pytest.raises(CheckpointMismatchError, match=r"from 'first\.weight' on and not from 'second\.weight'"):
        trained("first", "second", max_steps=4, ckpt_path=tmp_path / "tag")
    with pytest.raises(CheckpointMismatchError, match=r"has param groups of \[4\] parameters, this AdamW of \[2\]"):
        trained("second", max_steps=4, ckpt_path=tmp_path / "tag")
    trained("second", "first", max_steps=4, ckpt_path=tmp_path / "tag")
