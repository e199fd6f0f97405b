"""Parameters that aren't trained are written once, and are whole in every tag."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_zero import ZeroCheckpoint, ZeroStrategy
from lightning_zero import get_fp32_state_dict_from_zero_checkpoint as get_fp32
from lightning_zero.checkpoint import save, storage
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.shards import verify_tensors
from lightning_zero.cli import main
from lightning_zero.errors import CheckpointWriteError
from tests.launch import distributed, run_ranks
from tests.models import Data, Model, fit
from tests.plugin import parity


class Adapted(Model):
    """A large frozen backbone and small adapters, as LoRA has them."""

    def __init__(self, all_in_optimizer=False):
        super().__init__()
        self.all_in_optimizer = all_in_optimizer
        self.backbone = nn.Linear(8, 20_000, bias=False).requires_grad_(False)
        self.down = nn.Linear(20_000, 8, bias=False).requires_grad_(False)

    def forward(self, x):
        return super().forward(x + self.down(self.backbone(x)) / 20_000)

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad or self.all_in_optimizer]
        return torch.optim.AdamW(parameters, lr=1e-2)


BACKBONE_BYTES = 2 * 8 * 20_000 * 4


def bytes_on_disk(directory):
    """What all files take, one with several names counted once."""
    found = {path.stat().st_ino: path.stat().st_size for path in Path(directory).rglob("*") if path.is_file()}
    return sum(found.values())


def train(directory, world_size, max_steps, model, **options):
    callback = ZeroCheckpoint(directory, every_n_train_steps=1, save_top_k=-1, **options)
    fit(model(), world_size=world_size, max_steps=max_steps, callbacks=[callback], ckpt_path="last", data=Data())
    return callback


def adapted():
    return Adapted()


def all_in_optimizer():
    return Adapted(all_in_optimizer=True)


@pytest.mark.parametrize("model", [adapted, all_in_optimizer])
@pytest.mark.parametrize("behind", [False, True])
def test_what_is_frozen_is_on_disk_once_after_resumes_too_and_every_tag_is_whole(tmp_path, model, behind):
    options = {"process_group": False, "async_save": behind}
    run_ranks(train, 2, tmp_path, 2, 3, model, **options)
    run_ranks(train, 2, tmp_path, 2, 6, model, **options)
    tags = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert len(tags) == 6
    adapters = sum(len(list(tag.glob("rank-*"))) for tag in tags)
    assert adapters == 12
    beside = sum(path.stat().st_size for path in tmp_path.rglob("*") if not path.name.startswith("frozen-"))
    assert bytes_on_disk(tmp_path) <= beside + 1.1 * BACKBONE_BYTES
    for tag in tags[:-1]:
        shutil.rmtree(tag)
    last = Checkpoint(tags[-1], verify="full").state_dict()
    assert torch.equal(last["backbone.weight"], model().backbone.weight)
    shutil.copytree(tags[-1], tmp_path / "elsewhere" / "tag")
    assert torch.equal(
        Checkpoint(tmp_path / "elsewhere" / "tag", verify="full").state_dict()["down.weight"], last["down.weight"]
    )


@pytest.mark.parametrize("model", [adapted, all_in_optimizer])
def test_what_is_frozen_is_left_out_of_an_export_whoever_holds_it(tmp_path, model, capsys):
    run_ranks(train, 2, tmp_path / "ckpts", 2, 1, model, process_group=False)
    frozen = {name: p.nbytes for name, p in model().named_parameters() if not p.requires_grad}
    assert main(["inspect", str(tmp_path / "ckpts"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in found["entries"] if entry["role"] == "frozen"} == frozen.keys()
    assert sum(rank["frozen"] for rank in found["ranks"]) == sum(frozen.values())
    assert main(["export", str(tmp_path / "ckpts"), str(tmp_path / "m.ckpt"), "--exclude-frozen"]) == 0
    exported = torch.load(tmp_path / "m.ckpt", weights_only=True)["state_dict"]
    assert exported.keys() == get_fp32(tmp_path / "ckpts").keys() - frozen.keys()
    assert exported.keys() == get_fp32(tmp_path / "ckpts", exclude_frozen_parameters=True).keys()


class WriteUnseen(Callback):
    """Changes a frozen parameter in a way that no version counter sees."""

    def on_train_batch_start(self, trainer, module, *args):
        if trainer.global_step == 2:
            version = module.backbone.weight._version
            module.backbone.weight.data[-1, -1] = 7.0
            assert module.backbone.weight._version == version


@distributed(world_size=2, process_group=False)
def test_a_frozen_parameter_that_was_written_is_saved_anew(tmp_path):
    callback = ZeroCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(Adapted(), world_size=2, max_steps=4, callbacks=[WriteUnseen(), callback])
    values = [
        Checkpoint(tmp_path / f"step={step}.ckpt", "full").state_dict()["backbone.weight"][-1, -1]
        for step in (1, 2, 3, 4)
    ]
    assert [float(value) == 7.0 for value in values] == [False, False, True, True]
    inodes = [(tmp_path / f"step={s}.ckpt" / "frozen-00000-of-00002.safetensors").stat().st_ino for s in (1, 2, 3, 4)]
    assert inodes[0] == inodes[1]
    # rank 0's half hasn't changed
    inodes = [(tmp_path / f"step={s}.ckpt" / "frozen-00001-of-00002.safetensors").stat().st_ino for s in (1, 2, 3, 4)]
    assert inodes[0] == inodes[1] != inodes[2] == inodes[3]


def damage(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)  # in place: every tag that shares it is damaged


def test_a_file_that_was_damaged_is_not_linked_by_the_next_run(tmp_path):
    run_ranks(train, 2, tmp_path, 2, 2, adapted, process_group=False)
    damage(tmp_path / "step=2.ckpt" / "frozen-00001-of-00002.safetensors")
    run_ranks(train, 2, tmp_path, 2, 4, adapted, process_group=False)
    Checkpoint(tmp_path / "step=4.ckpt", verify="full")


@distributed(world_size=1, process_group=False)
def test_what_is_unfrozen_while_a_damaged_file_is_written_anew_is_in_no_checkpoint(tmp_path):
    class Damage(Adapted):
        def on_train_start(self):  # it has been read
            damage(tmp_path / "step=2.ckpt" / "frozen-00000-of-00001.safetensors")

    train(tmp_path, 1, 2, adapted)
    model = Damage()

    def verify_and_train(*args):
        found = list(verify_tensors(*args))
        model.backbone.weight[0, 0] += 1
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "verify_tensors", verify_and_train)
        with pytest.raises(CheckpointWriteError, match="frozen parameters that it held were changed"):
            train(tmp_path, 1, 3, lambda: model, async_save=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step=1.ckpt", "step=2.ckpt"]


@distributed(world_size=1, process_group=False)
def test_where_there_are_no_links_everything_is_written(tmp_path):
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*args, **kwargs):
            raise PermissionError(1, "Operation not permitted")

        patch.setattr(storage.os, "link", refuse)
        train(tmp_path, 1, 2, adapted)
    inodes = {path.stat().st_ino for path in tmp_path.rglob("frozen-*")}
    assert len(inodes) == 2
    for step in (1, 2):
        Checkpoint(tmp_path / f"step={step}.ckpt", verify="full")


@distributed(world_size=1, process_group=False)
def test_a_layer_that_is_unfrozen_later_is_in_the_shards_from_then_on(tmp_path):
    class Unfreeze(Callback):
        def on_train_batch_start(self, trainer, module, *args):
            if trainer.global_step == 1:
                module.backbone.requires_grad_(True)

    callback = ZeroCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(all_in_optimizer(), world_size=1, max_steps=3, callbacks=[Unfreeze(), callback])
    sizes = [
        os.stat(tmp_path / f"step={step}.ckpt" / "frozen-00000-of-00001.safetensors").st_size for step in (1, 2, 3)
    ]
    assert sizes[1] == sizes[2] < 0.6 * sizes[0]
    before, after = (
        Checkpoint(tmp_path / f"step={step}.ckpt", "full").state_dict()["backbone.weight"] for step in (1, 3)
    )
    assert not torch.equal(before, after)


class PartlyFrozen(parity.Plain):
    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)  # and its optimizer holds it all the same


class BackAndForth(Callback):
    def __init__(self, directory):
        self.directory = directory

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 2:
            trainer.strategy.save_zero_checkpoint(self.directory, exclude_frozen_parameters=True)
            self.saved = copy.deepcopy(module.state_dict())
        if trainer.global_step == 4:
            trainer.strategy.load_zero_checkpoint(self.directory, load_module_strict=False)
            for name, value in module.state_dict().items():
                assert torch.equal(value, self.saved[name])


@distributed(world_size=2, process_group=False)
def test_what_was_saved_without_frozen_16_bit_parameters_that_an_optimizer_holds_is_loaded(tmp_path):
    options = {"max_steps": 5, "precision": "bf16-true"}
    parity.fit(PartlyFrozen, ZeroStrategy(), callbacks=[lambda: BackAndForth(tmp_path)], **options)
