"""Modules that are compiled, made late, made without memory, loaded from directories, and saved at any time."""

import copy
from inspect import signature

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn

from lightning_zero import (
    Fp32Export,
    ZeroCheckpoint,
    ZeroCheckpointIO,
    ZeroStrategy,
    get_fp32_state_dict_from_zero_checkpoint,
)
from lightning_zero.errors import CheckpointNotFoundError, CheckpointWriteError, UnsupportedModelError
from tests.launch import distributed, run_ranks
from tests.models import Data, Model, quiet_trainer
from tests.models import fit as fit_model
from tests.plugin.parity import Plain, assert_equals_ddp, assert_same_modules, fit


@distributed(world_size=2, process_group=False)
def test_a_compiled_module_equals_a_compiled_one_under_ddp():
    whole = lambda: torch.compile(Plain(), backend="aot_eager")  # noqa: E731
    theirs, _ = fit(whole, "ddp")
    ours, _ = fit(whole, ZeroStrategy())
    assert_same_modules(ours._orig_mod, theirs._orig_mod)
    torch._dynamo.reset()


class CompiledInside(Plain):
    def configure_model(self):
        if not isinstance(self.net, torch._dynamo.OptimizedModule):
            self.net = torch.compile(self.net, backend="aot_eager")


@distributed(world_size=2, process_group=False)
def test_a_network_that_is_compiled_in_configure_model_is_trained_saved_and_resumed(tmp_path):
    assert_equals_ddp(CompiledInside, stages=(2,))
    _, trainer = fit(CompiledInside, ZeroStrategy(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "tag")
    whole, _ = fit(CompiledInside, ZeroStrategy(), max_epochs=2)
    resumed, _ = fit(CompiledInside, ZeroStrategy(), max_epochs=2, ckpt_path=tmp_path / "tag")
    resumed.losses = whole.losses
    assert_same_modules(resumed, whole)
    torch._dynamo.reset()


class Late(Plain):
    """Its network is made in `configure_model`, on whatever device that is called under."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 8))


class WithoutMemory(Late):
    def configure_model(self):
        with torch.device("meta"):
            super().configure_model()


class Scratch(nn.Module):
    """A layer that says how it is initialised."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(8))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.scale, 2.0)


class ScratchWithoutMemory(Plain):
    def configure_model(self):
        with torch.device("meta"):
            self.net = Scratch()

    def loss(self, batch):
        loss = (batch * self.net.scale - batch).pow(2).mean()
        self.losses.append(float(loss.detach()))
        return loss


@distributed(world_size=2, process_group=False)
def test_a_module_that_is_made_in_configure_model_equals_ddp():
    assert_equals_ddp(Late)


@distributed(world_size=2, process_group=False)
def test_a_module_on_the_meta_device_is_initialised_by_its_layers_and_the_same_on_every_rank(tmp_path):
    scratch, _ = fit(ScratchWithoutMemory, ZeroStrategy(), max_steps=0)
    assert torch.equal(scratch.net.scale.detach(), torch.full((8,), 2.0))

    ours, trainer = fit(WithoutMemory, ZeroStrategy(), max_epochs=1)
    assert ours.losses[-1] < ours.losses[0]
    assert not any(p.is_meta for p in ours.parameters())
    trainer.save_checkpoint(tmp_path / "tag")
    whole, _ = fit(WithoutMemory, ZeroStrategy(), max_epochs=2)
    resumed, _ = fit(WithoutMemory, ZeroStrategy(), max_epochs=2, ckpt_path=tmp_path / "tag")
    resumed.losses = whole.losses
    assert_same_modules(resumed, whole)


class HalfWithoutMemory(Plain):
    """A pretrained backbone with its weights; a head, tied to itself, without memory."""

    def configure_model(self):
        self.net = nn.Linear(8, 8)
        nn.init.constant_(self.net.weight, 0.5)
        with torch.device("meta"):
            self.head = nn.Linear(8, 8)
            self.tied = nn.Linear(8, 8)
            self.tied.weight = self.head.weight

    def loss(self, batch):
        return self.tied(self.head(self.net(batch))).pow(2).mean()


class Forgotten(Plain):
    """A layer on the meta device that nothing initialises."""

    def configure_model(self):
        self.lost = nn.Module()
        self.lost.weight = nn.Parameter(torch.empty(8, device="meta"))
        self.lost.register_buffer("table", torch.empty(3, device="meta"), persistent=False)


@distributed(world_size=2, process_group=False)
def test_only_what_has_no_memory_gets_some_and_what_nobody_fills_is_named(tmp_path):
    model, trainer = fit(HalfWithoutMemory, ZeroStrategy(), max_steps=0)
    assert torch.equal(model.net.weight.detach(), torch.full((8, 8), 0.5))
    assert model.tied.weight is model.head.weight
    model, trainer = fit(HalfWithoutMemory, ZeroStrategy(), max_steps=3)
    trainer.save_checkpoint(tmp_path / "tag")
    fit(HalfWithoutMemory, ZeroStrategy(), max_steps=4, ckpt_path=tmp_path / "tag")
    with pytest.raises(UnsupportedModelError, match=r"\['lost.table', 'lost.weight'\] were made on the meta device"):
        fit(Forgotten, ZeroStrategy(), max_steps=1)


@distributed(world_size=2, process_group=False)
def test_init_module_makes_a_module_on_the_strategys_device():
    trainer = quiet_trainer(world_size=2, max_epochs=4, precision="bf16-true")
    with trainer.init_module(empty_init=False):
        model = Plain()
    assert model.net[0].weight.dtype == torch.bfloat16
    trainer.fit(model)
    epoch = len(model.losses) // 4
    assert sum(model.losses[-epoch:]) < sum(model.losses[:epoch]), model.losses


class Judged(Model):
    """Validates, tests and predicts."""

    def test_step(self, batch, batch_idx):
        self.log("test_loss", (self(batch) - batch).pow(2).mean(), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self(batch)


@distributed(world_size=2, process_group=False)
def test_validate_test_and_predict_load_directories_and_exported_files(tmp_path):
    exported = tmp_path / "model.ckpt"
    trained, trainer = fit_model(
        Judged(),
        ZeroStrategy(),
        world_size=2,
        max_epochs=1,
        callbacks=[ZeroCheckpoint(tmp_path / "ckpts", every_n_train_steps=4), Fp32Export(exported)],
    )
    for path in (tmp_path / "ckpts", tmp_path / "ckpts" / "step=8.ckpt", exported):
        for make in (lambda: ZeroStrategy(), lambda: "ddp") if path == exported else (lambda: ZeroStrategy(),):
            fresh, trainer = Judged(), quiet_trainer(make(), world_size=2)
            validated = trainer.validate(fresh, datamodule=Data(), ckpt_path=path, verbose=False)
            safely = {"weights_only": True} if "weights_only" in signature(trainer.test).parameters else {}
            tested = trainer.test(fresh, Data().val_dataloader(), ckpt_path=path, verbose=False, **safely)
            predicted = trainer.predict(fresh, Data().val_dataloader(), ckpt_path=path)
            for name, value in trained.state_dict().items():
                assert torch.equal(fresh.state_dict()[name], value), (path, name)
            assert validated[0]["val_loss"] == pytest.approx(tested[0]["test_loss"])
            assert len(predicted) == 2
    assert Judged.load_from_checkpoint(exported, map_location="cpu").hparams == trained.hparams


@distributed(world_size=2, process_group=False)
def test_save_checkpoint_during_and_after_fit_gives_the_same(tmp_path):
    class Saves(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "during")

    _, trainer = fit_model(strategy=ZeroStrategy(), world_size=2, max_epochs=1, callbacks=[Saves()])
    trainer.save_checkpoint(tmp_path / "after")
    trainer.save_checkpoint(tmp_path / "weights", weights_only=True)
    assert (tmp_path / "latest").read_text() == "after"
    during, after, weights = (
        ZeroCheckpointIO().load_checkpoint(tmp_path / name) for name in ("during", "after", "weights")
    )
    for name, value in during["state_dict"].items():
        assert torch.equal(value, after["state_dict"][name])
        assert torch.equal(value, weights["state_dict"][name])
    for index, state in during["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, after["optimizer_states"][0]["state"][index][key])
    assert "optimizer_states" not in weights


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_another_checkpoint_io_writes_one_whole_file_that_resumes_anywhere(tmp_path, precision):
    run_ranks(other_io, 2, tmp_path, precision, process_group=False)


def other_io(directory, precision):
    io = lambda: ZeroStrategy(checkpoint_io=TorchCheckpointIO())  # noqa: E731
    whole, _ = fit(Plain, ZeroStrategy(), precision=precision)
    _, trainer = fit(Plain, io(), max_epochs=1, precision=precision)
    path = directory / "plain.ckpt"
    trainer.save_checkpoint(path)
    assert path.is_file()
    state = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
    assert state[0]["exp_avg"].shape == whole.net[0].weight.shape
    for make in (io, ZeroStrategy, lambda: "ddp") if precision == "32-true" else ():
        resumed, _ = fit(Plain, make(), ckpt_path=path)
        resumed.losses = whole.losses
        assert_same_modules(resumed, whole)


class Breaks(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 5:
            raise RuntimeError("something broke")


@distributed(world_size=2, process_group=False)
def test_another_checkpoint_io_saves_after_an_exception_what_it_saves_without_one(tmp_path):
    io = lambda: ZeroStrategy(checkpoint_io=TorchCheckpointIO())  # noqa: E731
    with pytest.raises(RuntimeError, match="something broke"):
        fit(Plain, io(), callbacks=[Breaks, lambda: OnExceptionCheckpoint(tmp_path)])
    _, trainer = fit(Plain, io(), max_steps=5)
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    files = [torch.load(tmp_path / name, weights_only=True) for name in ("on_exception.ckpt", "without.ckpt")]
    for part in (lambda saved: saved["state_dict"], lambda saved: saved["optimizer_states"]):
        torch.testing.assert_close(*map(part, files), rtol=0, atol=0)


@distributed(world_size=2, process_group=False)
def test_another_checkpoint_io_that_fails_on_the_first_rank_fails_on_all(tmp_path):
    (tmp_path / "file").write_text("in the way")
    _, trainer = fit(Plain, ZeroStrategy(checkpoint_io=TorchCheckpointIO()), max_steps=1)
    with pytest.raises(FileExistsError):
        trainer.save_checkpoint(tmp_path / "file" / "plain.ckpt")


@distributed(world_size=2, process_group=False)
def test_tags_and_exports_are_directories_and_files_whatever_the_users_own_io_writes(tmp_path):
    class Tags(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 2:
                trainer.strategy.save_zero_checkpoint(tmp_path / "tags", client_state={"a": 1})
                self.loaded = trainer.strategy.load_zero_checkpoint(tmp_path / "tags")

    tags = Tags()
    export = lambda: Fp32Export(tmp_path / "model.ckpt")  # noqa: E731
    strategy = ZeroStrategy(checkpoint_io=TorchCheckpointIO())
    model, _ = fit(Plain, strategy, callbacks=[lambda: tags, export], max_steps=3)
    assert tags.loaded == (str(tmp_path / "tags" / "global_step2"), {"a": 1})
    exported = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(exported[name], value) for name, value in model.state_dict().items())


@distributed(world_size=2, process_group=False)
def test_a_directory_is_resumed_from_whatever_the_users_own_io_reads(tmp_path):
    whole, _ = fit(Plain, ZeroStrategy(), callbacks=[lambda: ZeroCheckpoint(tmp_path)], max_steps=3)
    resumed, trainer = fit(Plain, ZeroStrategy(checkpoint_io=TorchCheckpointIO()), ckpt_path=tmp_path, max_steps=3)
    assert trainer.global_step == 3
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in whole.state_dict().items())


@distributed(world_size=1, process_group=False)
def test_a_directory_that_holds_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=str(tmp_path)):
        fit(Plain, ZeroStrategy(), ckpt_path=tmp_path)


@distributed(world_size=2, process_group=False)
def test_a_url_that_the_ranks_dont_share_is_an_error_and_whole_checkpoints_go_to_any(tmp_path):
    _, trainer = fit(Plain, ZeroStrategy(), max_steps=1)
    with pytest.raises(CheckpointWriteError, match="all ranks have to save to one shared file system"):
        trainer.save_checkpoint("memory://bucket/tag")
    _, trainer = fit(Plain, ZeroStrategy(checkpoint_io=TorchCheckpointIO()), max_steps=1)
    trainer.save_checkpoint(f"file://{tmp_path}/whole.ckpt")
    assert (tmp_path / "whole.ckpt").is_file()


@distributed(world_size=1, process_group=False)
def test_a_precision_plugin_is_the_users_again_after_the_fit():
    plugin = Precision()
    fit(Plain, ZeroStrategy(), plugins=[plugin], gradient_clip_val=0.1)
    fit(Plain, "ddp", plugins=[plugin], gradient_clip_val=0.1)


@distributed(world_size=2, process_group=False)
def test_lightnings_asynchronous_io_is_waited_for(tmp_path):
    strategy = ZeroStrategy(checkpoint_io=AsyncCheckpointIO(ZeroCheckpointIO()))
    _, trainer = fit_model(
        strategy=strategy, world_size=2, max_epochs=1, callbacks=[ZeroCheckpoint(tmp_path, every_n_train_steps=3)]
    )
    assert (tmp_path / "latest").read_text() == "step=6.ckpt"
    fit_model(strategy=ZeroStrategy(), world_size=2, max_epochs=2, ckpt_path=tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointWriteError):
        trainer.save_checkpoint(tmp_path / "file" / "tag")


@distributed(world_size=2, process_group=False)
def test_a_trainer_can_be_copied_in_mid_fit():
    class Copies(Callback):
        def on_fit_start(self, trainer, pl_module):
            self.trainer = trainer
            self.copied = copy.deepcopy(trainer.callbacks)

    fit(Plain, ZeroStrategy(), callbacks=[Copies], max_steps=1)


def test_a_trainer_with_the_strategy_can_be_copied():
    trainer = Trainer(strategy=ZeroStrategy(stage=1), accelerator="cpu", devices=2, logger=False)
    assert copy.deepcopy(trainer.strategy).stage == 1


class ChannelsLast(Model):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)


@distributed(world_size=1, process_group=False)
def test_a_parameter_that_is_not_contiguous_is_saved_by_a_rank_that_is_alone(tmp_path):
    module, trainer = fit_model(ChannelsLast(), ZeroStrategy(), world_size=1, max_steps=2)
    trainer.save_checkpoint(tmp_path / "tag")
    saved = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "tag")
    assert torch.equal(saved["conv.weight"], module.conv.weight)
