"""Large tensors that a callback or a client puts into a checkpoint: behind training, out of the pickle, and back."""

import shutil

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import Tensor

from lightning_zero import Fp32Export, ZeroCheckpointIO, ZeroStrategy
from tests.launch import distributed
from tests.models import fit

TABLE = torch.arange(50_000.0)


class Keeper(Callback):
    """Keeps the weights beside what it makes of them, as averaging does, and a table with a part of it."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["before"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value + 1 for name, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        pl_module.load_state_dict(checkpoint["before"])

    def state_dict(self):
        return {"table": TABLE, "part": TABLE[10:20]}

    def load_state_dict(self, state_dict):
        self.loaded = state_dict


class Load(Callback):
    def __init__(self, directory):
        self.directory = directory

    def on_train_start(self, trainer, pl_module):
        self.resumed = {name: value.clone() for name, value in pl_module.state_dict().items()}
        path, self.client_state = trainer.strategy.load_zero_checkpoint(self.directory)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(path)
        dist.barrier()


def assert_kept(state):
    assert type(state["table"]) is type(state["part"]) is Tensor
    assert torch.equal(state["table"], TABLE)
    assert torch.equal(state["part"], TABLE[10:20])


@distributed(world_size=2, process_group=False)
def test_large_tensors_elsewhere_are_no_part_of_the_pickle_and_come_back(tmp_path):
    strategy = ZeroStrategy(checkpoint_io=ZeroCheckpointIO(async_save=True))
    export = Fp32Export(tmp_path / "model.ckpt")
    whole, trainer = fit(strategy=strategy, world_size=2, max_steps=3, callbacks=[Keeper(), export])
    trainer.save_checkpoint(tmp_path / "tag")
    trainer.strategy.save_zero_checkpoint(tmp_path / "tags", client_state={"mine": [TABLE, TABLE[10:20]]})
    assert (tmp_path / "tag" / "trainer.pt").stat().st_size < 20_000
    keeper, load = Keeper(), Load(tmp_path / "tags")
    options = {"max_steps": 4, "ckpt_path": tmp_path / "tag"}
    fit(strategy=ZeroStrategy(), world_size=2, callbacks=[keeper, load], **options)
    table, part = load.client_state["mine"]
    assert_kept(keeper.loaded)
    assert_kept({"table": table, "part": part})
    exported = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert_kept(exported["callbacks"]["Keeper"])
    for name, value in whole.named_parameters():
        assert torch.equal(load.resumed[name], value)
        assert torch.equal(exported["before"][name], value)
        assert torch.equal(exported["state_dict"][name], value + 1)
