"""Files of the model through Lightning: what DDP resumes from, and what is written while training goes on."""

import os
import threading
from collections import deque
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything

from lightning_zero import (
    Fp32Export,
    ZeroCheckpoint,
    ZeroCheckpointIO,
    ZeroStrategy,
    convert_zero_checkpoint_to_fp32_state_dict,
    load_from_zero_checkpoint,
)
from lightning_zero.checkpoint.export import Wanted, exported_bytes
from lightning_zero.checkpoint.integrity import read_manifest
from lightning_zero.checkpoint.reader import Reader
from lightning_zero.checkpoint.storage import locate
from lightning_zero.errors import (
    CheckpointMismatchError,
    CheckpointWriteError,
    CorruptCheckpointError,
    UnsupportedModelError,
)
from lightning_zero.plugin import callbacks
from tests.launch import distributed, run_ranks
from tests.models import Data, Model, quiet_trainer
from tests.plugin.parity import OneStep

# ------------------------------------------------------------------------------------- the training checkpoint


class WithSGD(Model):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9, nesterov=True)


class WithAdafactor(Model):
    """Its states are no flat slices: row and column factors."""

    def configure_optimizers(self):
        return torch.optim.Adafactor([p for p in self.parameters() if p.requires_grad], lr=0.05)


class WithTwo(Model):
    """Two optimizers and a scheduler, by hand; one of them begins late, and has no state at first."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx > 6:
            second.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        first = torch.optim.AdamW(self.into.parameters(), lr=1e-2, amsgrad=True)
        second = torch.optim.RMSprop([*self.norm.parameters(), *self.out.parameters()], lr=1e-3, momentum=0.5)
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, 3)]


def fit_from(make, strategy, ckpt_path=None, *, world_size, sampler="own", callbacks=(), **options):
    seed_everything(3, verbose=False)
    model = make(dropout=0.0)
    trainer = quiet_trainer(strategy, world_size=world_size, callbacks=list(callbacks), **options)
    trainer.fit(model, datamodule=Data(sampler), ckpt_path=ckpt_path)
    return model, trainer


def zero_and_then_ddp(directory, make, world_size, where, sampler):
    """Train with ZeRO, export on the way, and go on with either; a rank's losses and weights of both."""
    options = {"world_size": world_size, "max_epochs": 2, "sampler": sampler}
    every = {"every_n_epochs": 1} if where == "epoch" else {"every_n_train_steps": where}
    zero, trainer = fit_from(
        make, ZeroStrategy(), callbacks=[ZeroCheckpoint(directory, save_top_k=-1, **every)], **options
    )
    tag = sorted(directory.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)[0]
    if trainer.global_rank == 0:
        written = []
        convert_zero_checkpoint_to_fp32_state_dict(
            tag, directory / "whole.ckpt", with_optimizer=True, progress=written.append
        )
        assert sum(written) == exported_bytes(Reader(tag), Path("x.ckpt"), Wanted(with_optimizer=True))
    trainer.strategy.barrier()
    with torch.serialization.safe_globals([deque]):
        ddp, _ = fit_from(make, "ddp", directory / "whole.ckpt", **options)
    return zero.losses, ddp.losses, dict(zero.state_dict()), dict(ddp.state_dict())


class InContainers(OneStep):
    """Keeps lists, dicts and deques of tensors, as SOAP, AggMo and AdaShift do, and row factors without their shape."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def update(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["sides"] = [torch.zeros(n, n) for n in p.shape]
                    state["averages"] = {0.5: torch.zeros_like(p), 0.9: torch.zeros_like(p)}
                    state["steps"], state["flat"] = (0, [None]), torch.zeros(p.numel())
                    state["queue"] = deque(
                        [p.grad.clone()]
                    )  # without maxlen, which Lightning loses on its way to a device
                for beta, average in state["averages"].items():
                    average.lerp_(p.grad, 1 - beta)
                for dim, side in enumerate(state["sides"]):
                    matrix = p.grad.movedim(dim, 0).flatten(1) if p.dim() > 1 else p.grad[:, None]
                    side.addmm_(matrix, matrix.mT)
                state["flat"] += p.grad.view(-1)
                assert state["flat"].shape == (p.numel(),)
                state["queue"].append(p.grad.clone())
                if len(state["queue"]) > 2:
                    state["queue"].popleft()
                state["steps"] = (state["steps"][0] + 1, [None])
                by = sum(state["averages"].values()) + sum(state["queue"]) + state["flat"].view(p.shape)
                p.sub_(by, alpha=group["lr"] / (1 + state["steps"][0] + sum(side.norm() for side in state["sides"])))


class Counting(torch.optim.SGD):
    """Has a count in its state dict, on which each step depends, as StableSPAM, and leaves something out of it."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            group["lr"], group["_kind"] = 0.01 * self.count, Counting  # which torch would refuse to load
        return super().step(closure)

    def state_dict(self):
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            group.pop("_kind", None)
        return {**state_dict, "count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "count"})


class Wrapping(torch.optim.SGD):
    """Shows another's groups and states as its own."""

    def __init__(self, params, lr):
        self.inner = torch.optim.Adam(params, lr=lr)
        self.defaults = self.inner.defaults

    param_groups = property(lambda self: self.inner.param_groups, lambda self, groups: None)
    state = property(lambda self: self.inner.state, lambda self, state: None)

    def step(self, closure=None):
        return self.inner.step(closure)


class Apart(Counting):
    """Has states under a key of its own."""

    def state_dict(self):
        return {**super().state_dict(), "slow": {0: torch.zeros(3)}}


class WithCount(Model):
    kind = Counting

    def configure_optimizers(self):
        return self.kind([p for p in self.parameters() if p.requires_grad], lr=0.01)


class WithWrapper(WithCount):
    kind = Wrapping


class WithApart(WithCount):
    kind = Apart


class WithContainers(Model):
    def configure_optimizers(self):
        return InContainers([p for p in self.parameters() if p.requires_grad], lr=0.01)


def resumed(make, directory, world_size):
    options = {"world_size": world_size, "max_epochs": 2}
    every = ZeroCheckpoint(directory, save_top_k=-1, every_n_epochs=1)
    whole, _ = fit_from(make, ZeroStrategy(), callbacks=[every], **options)
    first = min(directory.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    half, _ = fit_from(make, ZeroStrategy(), first, **options)
    assert len(half.losses) == len(whole.losses) // 2
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in half.state_dict().items())


def states_with_containers(directory, world_size):
    """Every optimizer state as this number of ranks has it, saved or loaded."""
    saved = directory if world_size == 1 else None
    every = [] if saved else [ZeroCheckpoint(directory, every_n_epochs=1)]
    model, trainer = fit_from(
        WithContainers, ZeroStrategy(), saved, world_size=world_size, callbacks=every, max_epochs=1
    )
    return {name: trainer.strategy.full_state(p) for name, p in model.named_parameters() if p.requires_grad}


def test_states_in_lists_dicts_and_deques_are_the_same_on_another_number_of_ranks(tmp_path):
    (expected, _), (got,) = (run_ranks(states_with_containers, n, tmp_path, n, process_group=False) for n in (2, 1))
    torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)
    assert all(state["flat"].dim() == 1 for state in got.values())


@distributed(world_size=2, process_group=False)
def test_states_in_lists_dicts_and_deques_are_resumed_bit_for_bit(tmp_path):
    resumed(WithContainers, tmp_path, 2)


@distributed(world_size=2, process_group=False)
def test_what_an_optimizer_adds_to_its_state_dict_is_resumed(tmp_path):
    resumed(WithCount, tmp_path, 2)


@distributed(world_size=2, process_group=False)
def test_an_optimizer_that_shows_anothers_states_is_resumed(tmp_path):
    resumed(WithWrapper, tmp_path, 2)


@distributed(world_size=2, process_group=False)
def test_an_optimizer_with_states_outside_of_its_state_is_not_saved_in_part(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"Apart has states in its state_dict\(\)\['slow'\].*weights alone"):
        resumed(WithApart, tmp_path, 2)


@pytest.mark.parametrize(
    ("make", "world_size", "where", "sampler"),
    [
        (WithContainers, 2, "epoch", "own"),
        (WithCount, 2, "epoch", "own"),
        (Model, 1, 5, "own"),
        (Model, 1, 16, "own"),  # an epoch's last batch
        (Model, 2, "epoch", "own"),
        (Model, 2, 5, "injected, in order"),
        (WithSGD, 1, "epoch", "own"),
        (WithAdafactor, 1, 5, "own"),
        (WithTwo, 1, 5, "own"),
    ],
)
def test_ddp_resumes_exactly_from_an_export_with_the_optimizer(tmp_path, make, world_size, where, sampler):
    for zero, ddp, expected, got in run_ranks(
        zero_and_then_ddp, world_size, tmp_path, make, world_size, where, sampler, process_group=False
    ):
        assert 0 < len(ddp) < len(zero)
        assert ddp == zero[-len(ddp) :]
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@distributed(world_size=1, process_group=False)
def test_ddp_takes_its_states_in_bf16_from_fp32(tmp_path):
    options = {
        "world_size": 1,
        "precision": "bf16-true",
        "callbacks": [ZeroCheckpoint(tmp_path, every_n_train_steps=3)],
    }
    fit_from(Model, ZeroStrategy(), max_steps=3, **options)
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "whole.ckpt", with_optimizer=True)
    saved = torch.load(tmp_path / "whole.ckpt", weights_only=True)

    class Look(Callback):
        def on_train_start(self, trainer, module):
            (optimizer,) = trainer.optimizers
            for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                state = saved["optimizer_states"][0]["state"][index]
                assert state["exp_avg"].dtype == torch.float32
                assert torch.equal(optimizer.state[parameter]["exp_avg"], state["exp_avg"].bfloat16())
            for name, value in module.state_dict().items():
                assert torch.equal(value, saved["state_dict"][name].to(value.dtype))

    options["callbacks"] = [Look()]
    _, trainer = fit_from(Model, "ddp", tmp_path / "whole.ckpt", max_steps=5, **options)
    assert trainer.global_step == 5


# ------------------------------------------------------------------------------------------------- while fitting


class Masters(Callback):
    """The whole fp32 parameters after each step."""

    def __init__(self):
        self.after = {}

    def on_train_batch_end(self, trainer, module, *args):
        full = {n: trainer.strategy.full_state(p) for n, p in module.named_parameters() if p.requires_grad}
        self.after[trainer.global_step] = {name: state["param"].clone() for name, state in full.items()}


class Release(Callback):
    """Lets the exports go on when training has ended, and not before: nobody can have waited for one."""

    def __init__(self):
        self.event = threading.Event()
        self.held = []

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 7:
            trainer.strategy.saves.join()
            self.tags = sorted(p.name for p in trainer.checkpoint_callback_directory.iterdir() if p.suffix == ".ckpt")
            self.event.set()

    def export(self, *args, **options):
        assert self.event.wait(60)
        return EXPORT(*args, **options)


EXPORT = callbacks.export


def fit_and_export_behind(directory, async_save):
    masters, release = Masters(), Release()
    checkpoint = ZeroCheckpoint(directory / "ckpts", every_n_train_steps=1, keep_last=1, async_save=async_save)
    export = Fp32Export(directory / "model-{step:02d}-{epoch}.ckpt", every_n_checkpoints=2)
    small = Fp32Export(directory / "small.safetensors", every_n_checkpoints=3, dtype="bf16")
    callbacks.export = release.export
    seed_everything(3, verbose=False)
    trainer = quiet_trainer(
        world_size=2, max_steps=7, precision="bf16-true", callbacks=[masters, release, export, small, checkpoint]
    )
    trainer.checkpoint_callback_directory = directory / "ckpts"
    model = Model()
    trainer.fit(model, datamodule=Data())
    return masters.after, release.tags, dict(model.state_dict())


@pytest.mark.parametrize("async_save", [False, True])
def test_rank_zero_exports_what_was_committed_while_all_train_and_retention_removes_it(tmp_path, async_save):
    after, tags, weights = run_ranks(fit_and_export_behind, 2, tmp_path, async_save, process_group=False)[0]
    assert tags == ["step=6.ckpt"]  # the last step is done, and nothing has been exported yet but from second names
    exports = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert exports == ["model-02-0.ckpt", "model-04-0.ckpt", "model-06-0.ckpt", "model-07-1.ckpt", "small.safetensors"]
    for step in (2, 4, 6, 7):
        (path,) = tmp_path.glob(f"model-0{step}-*")
        exported = torch.load(path, weights_only=True)
        assert exported["global_step"] == step
        assert exported["hyper_parameters"]["width"] == 24
        for name, master in after[step].items():
            assert torch.equal(exported["state_dict"][name], master)
    from safetensors.torch import load_file

    small = load_file(tmp_path / "small.safetensors")
    assert small.keys() == weights.keys() - {"tied.weight"}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in small.items())
    assert sorted(path.name for path in (tmp_path / "ckpts").iterdir()) == ["latest", "step=7.ckpt"]
    assert not list(tmp_path.glob(".*"))


def fit_with_a_failing_export(directory):
    export = Fp32Export(directory / "at{step}" / "model.safetensors", every_n_checkpoints=1)
    checkpoint = ZeroCheckpoint(directory / "ckpts", every_n_train_steps=2)
    model, trainer = Model(), quiet_trainer(world_size=2, max_steps=5, callbacks=[export, checkpoint])
    with pytest.raises(OSError, match="at2"):
        trainer.fit(model, datamodule=Data())
    return trainer.global_step


def test_an_export_that_fails_on_the_way_fails_the_fit_at_its_end_on_all_ranks(tmp_path):
    (tmp_path / "at2").touch()
    assert run_ranks(fit_with_a_failing_export, 2, tmp_path, process_group=False) == [5, 5]
    assert (tmp_path / "at4" / "model.safetensors").exists()
    assert (tmp_path / "at5" / "model.safetensors").exists()
    assert sorted(path.name for path in (tmp_path / "ckpts").iterdir()) == ["latest", "step=4.ckpt"]


class Damage(Callback):
    """Flips a bit of a parameter in whatever is saved, before anybody can export it."""

    def setup(self, trainer, module, stage):
        if trainer.is_global_zero:
            trainer.strategy.saves.listeners.append(self.flip)

    def flip(self, directory):
        file = read_manifest(directory).files[0]
        tensor = next(item for item in file.tensors if item.kind == "model")
        with open(directory / file.name, "r+b") as shard:  # in place: the other rank may look at it meanwhile
            shard.seek(tensor.offset)
            flipped = shard.read(1)[0] ^ 1
            shard.seek(tensor.offset)
            shard.write(bytes([flipped]))


def fit_and_export_what_is_damaged(directory):
    exports = [Fp32Export(directory / "behind{step}.ckpt", every_n_checkpoints=1), Fp32Export(directory / "m.ckpt")]
    checkpoint = ZeroCheckpoint(directory / "ckpts", every_n_train_steps=2)
    trainer = quiet_trainer(world_size=2, max_steps=2, callbacks=[Damage(), *exports, checkpoint])
    with pytest.raises(CorruptCheckpointError, match=r"rank-00000-of-00002\.safetensors: 'model/.*checksum"):
        trainer.fit(Model(), datamodule=Data())


def test_an_export_of_what_was_damaged_since_it_was_saved_fails_the_fit_and_writes_nothing(tmp_path):
    run_ranks(fit_and_export_what_is_damaged, 2, tmp_path, process_group=False)
    assert os.listdir(tmp_path) == ["ckpts"]


class Change(Callback):
    """What a callback does to the weights at the very end."""

    def on_train_end(self, trainer, module):
        with torch.no_grad():
            module.into.weight.data.fill_(7)


def fit_and_count_saves(directory, changed):
    saves = []

    class Counting(ZeroCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            saves.append(locate(path).name)
            super().save_checkpoint(checkpoint, path, storage_options)

    checkpoint = ZeroCheckpoint(directory / "ckpts", every_n_train_steps=4)
    more = [Change()] if changed else []
    exports = [Fp32Export(directory / "model.ckpt"), Fp32Export(directory / "model.safetensors")]
    model = Model()
    trainer = quiet_trainer(
        ZeroStrategy(checkpoint_io=Counting()), world_size=2, max_steps=4, callbacks=[*exports, *more, checkpoint]
    )
    trainer.fit(model, datamodule=Data())
    return saves, dict(model.state_dict())


@pytest.mark.parametrize("changed", [False, True])
def test_the_last_checkpoint_is_converted_if_it_holds_the_model_as_it_is(tmp_path, changed):
    saves, weights = run_ranks(fit_and_count_saves, 2, tmp_path, changed, process_group=False)[0]
    assert saves == ["step=4.ckpt", *([".weights"] * 2 if changed else [])]
    exported = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)
    assert bool((exported["into.weight"] == 7).all()) == changed
    assert sorted(os.listdir(tmp_path)) == ["ckpts", "model.ckpt", "model.safetensors"]


@distributed(world_size=2, process_group=False)
def test_a_run_that_was_killed_before_its_export_is_exported_by_a_resume_that_trains_nothing(tmp_path):
    saving = lambda: ZeroCheckpoint(tmp_path / "ckpts", every_n_train_steps=2)  # noqa: E731
    fit_from(lambda dropout: Model(), ZeroStrategy(), world_size=2, max_steps=2, callbacks=[saving()])
    model, trainer = fit_from(
        lambda dropout: Model(),
        ZeroStrategy(),
        world_size=2,
        max_steps=2,
        ckpt_path="last",
        callbacks=[Fp32Export(tmp_path / "model.ckpt"), saving()],
    )
    assert trainer.global_step == 2
    if trainer.is_global_zero:
        exported = torch.load(tmp_path / "model.ckpt", weights_only=True)
        assert exported["global_step"] == 2
        assert all(torch.equal(exported["state_dict"][name], value) for name, value in model.state_dict().items())


@distributed(world_size=2, process_group=False)
def test_a_module_is_made_out_of_a_directory_as_out_of_a_file(tmp_path):
    saving = ZeroCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    model, trainer = fit_from(
        lambda dropout: Model(width=16), ZeroStrategy(), world_size=2, max_epochs=2, callbacks=[saving]
    )
    if not trainer.is_global_zero:
        return
    loaded = load_from_zero_checkpoint(Model, saving.best_model_path)
    assert loaded.hparams["width"] == 16
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))
    assert load_from_zero_checkpoint(Model, tmp_path, dropout=0.7).hparams["dropout"] == 0.7
    with pytest.raises(CheckpointMismatchError, match="size mismatch"):
        load_from_zero_checkpoint(Model, tmp_path, width=8)
    shard = next(Path(saving.best_model_path).glob("rank-00000*"))
    content = shard.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    shard.write_bytes(content[:header] + bytes(len(content) - header))
    with pytest.raises(CorruptCheckpointError):
        load_from_zero_checkpoint(Model, saving.best_model_path)


@pytest.mark.parametrize("what", [torch.nn.Linear, Model(), "Model"], ids=["another class", "a module", "a name"])
def test_what_no_module_can_be_made_of_is_refused_with_the_function_that_fills_one(what, tmp_path):
    with pytest.raises(TypeError, match=r"takes the class of it, not <class .*load_state_dict_from_zero_checkpoint"):
        load_from_zero_checkpoint(what, tmp_path)


class Wrapped(Model):
    """As those of the libraries of models are wrapped: what is to be published is a part of the module."""

    def configure_model(self):
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
        self.net[0].bias.requires_grad_(False)


def fit_and_export_a_part(tmp_path):
    part = {"submodule": "net"}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    exports = [
        Fp32Export(tmp_path / "hf", max_shard_size=300, **part),
        Fp32Export(tmp_path / "net.bin", exclude_frozen_parameters=True, **part),
        Fp32Export(tmp_path / "whole-{step}.pt", every_n_checkpoints=1),
    ]
    model = Wrapped()
    saving = ZeroCheckpoint(tmp_path / "ckpts", every_n_train_steps=2)
    quiet_trainer(world_size=1, max_steps=3, callbacks=[*exports, saving]).fit(model, datamodule=Data())
    trainer = quiet_trainer(world_size=1, callbacks=[Fp32Export(tmp_path / "x.bin", submodule="nett")])
    with pytest.raises(UnsupportedModelError, match=r"no such part.*'net'"):
        trainer.fit(Wrapped(), datamodule=Data())
    return dict(model.net.state_dict()), dict(model.state_dict())


def test_a_part_of_the_module_is_exported_under_its_own_names_as_a_folder_or_a_plain_state_dict(tmp_path):
    from safetensors.torch import load_file

    net, whole = run_ranks(fit_and_export_a_part, 1, tmp_path, process_group=False)[0]
    folder = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert folder[:1] == ["config.json"]
    assert "model.safetensors.index.json" in folder
    shards = [load_file(path) for path in (tmp_path / "hf").glob("*.safetensors")]
    together = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert len(shards) > 1
    plain = torch.load(tmp_path / "net.bin", weights_only=True)
    assert together.keys() == net.keys()
    assert plain.keys() == net.keys() - {"0.bias"}
    assert all(torch.equal(tensor, net[name]) for found in (together, plain) for name, tensor in found.items())
    assert torch.load(tmp_path / "whole-3.pt", weights_only=True).keys() == whole.keys()
    assert sorted(path.name for path in tmp_path.glob("whole*")) == ["whole-2.pt", "whole-3.pt"]
    (tmp_path / "hf" / "mine.py").touch()
    with pytest.raises(FileExistsError, match=r"mine\.py"):
        Fp32Export(tmp_path / "hf", max_shard_size=300)


def nowhere(tmp_path):
    for callback in (Fp32Export(tmp_path / "file" / "a" / "model.ckpt"), ZeroCheckpoint(tmp_path / "file")):
        model = Model()
        with pytest.raises(CheckpointWriteError, match="file is no directory"):
            quiet_trainer(world_size=2, callbacks=[callback]).fit(model, datamodule=Data())
        assert not model.losses


def test_a_fit_that_has_nowhere_to_write_to_ends_when_it_begins(tmp_path):
    (tmp_path / "file").touch()
    run_ranks(nowhere, 2, tmp_path, process_group=False)


def test_what_an_export_is_told_has_a_meaning(tmp_path):
    (tmp_path / "a directory.ckpt").mkdir()
    for path, options, said in (
        ("model.onnx", {}, r"writes \.ckpt.* not .*model\.onnx"),
        ("model", {}, r"writes \.ckpt.* not .*model"),
        ("model", {"max_shard_size": "huge"}, "is not a size"),
        ("model-{loss}.ckpt", {}, "can.t be filled in"),
        ("a directory.ckpt", {}, "is a directory"),
        ("model-{}.ckpt", {}, "can.t be filled in"),
        ("model.ckpt", {"every_n_checkpoints": 0}, "every_n_checkpoints must be a whole number from 1 on"),
        ("model.ckpt", {"dtype": "int8"}, "is not a dtype"),
    ):
        with pytest.raises(ValueError, match=said):
            Fp32Export(tmp_path / path, **options)
