"""Directories that FSDP itself has written, on two CPU ranks; and a ZeroStrategy that goes on from them."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from lightning_zero import ZeroStrategy, import_fsdp_checkpoint
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.resolution import resolve
from tests.checkpoint.deepspeed.test_importing import Held
from tests.launch import run_ranks
from tests.models import FSDP2_TRAINS_ON_CPU, Model, Rows, quiet_trainer

WORLD_SIZE, STEPS, MORE = 2, 3, 4

State = dict[str, dict[str, Tensor]]
"""What is held of each tensor of the module: `param`, and the optimizer's states."""

Written = dict[str, list[State]]
"""What a rank held when it saved, and at the end, of each training."""


class Net(Model):
    """Without dropout, with a last row that one rank alone has, and with data whose order both sides know."""

    def __init__(self, narrow: bool = False) -> None:
        super().__init__(dropout=0.0)
        self.gain = nn.Parameter(torch.ones(1))
        self.to(torch.bfloat16 if narrow else torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) * self.gain
        return out

    def train_dataloader(self) -> DataLoader:
        return batches(self.trainer.global_rank)


class Sharded(Net):
    def configure_model(self) -> None:
        if not isinstance(self.into, torch.distributed.fsdp.FSDPModule):
            shard(self, self.device_mesh["data_parallel"])


def shard(net: Net, mesh: Any) -> None:
    fully_shard(net.into, mesh=mesh)
    fully_shard(net, mesh=mesh)


def batches(rank: int) -> DataLoader:
    return DataLoader(Rows(), batch_size=4, sampler=DistributedSampler(Rows(), WORLD_SIZE, rank, shuffle=False))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> None:
    for _, batch in zip(range(steps), batches(dist.get_rank()), strict=False):
        batch = batch.to(next(net.parameters()).dtype)
        (net(batch) - batch).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def held_by(net: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    model, state = get_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
    return {
        name: {key: of.detach().clone() for key, of in {"param": value, **state["state"].get(name, {})}.items()}
        for name, value in model.items()
    }


def in_a_loop(directory: Path, *, narrow: bool = False, wrap: Callable[[Net], nn.Module] | None = None) -> list[State]:
    """Train, save, train on; what was held at both ends."""
    net: Any = Net(narrow)
    if wrap is None:
        shard(net, init_device_mesh("cpu", (WORLD_SIZE,)))
    else:
        net = wrap(net)
    configured: Any = net.configure_optimizers() if wrap is None else net.module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    train(net, optimizer, scheduler, STEPS)
    for name, flat in (("nested", False), ("flattened", True)):
        model, state = get_state_dict(net, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
        saved = {"model": model, "optimizer": state, "scheduler": scheduler.state_dict(), "step": STEPS}
        dcp.save(saved, checkpoint_id=directory / name)
    before = held_by(net, optimizer)
    if wrap is not None:  # as Lightning's FSDPStrategy does it
        config = ShardedStateDictConfig(offload_to_cpu=True)
        with FullyShardedDataParallel.state_dict_type(net, StateDictType.SHARDED_STATE_DICT, config):
            states = FullyShardedDataParallel.optim_state_dict(net, optimizer)
            dcp.save({"model": net.state_dict(), "optimizer_0": states}, checkpoint_id=directory / "lightnings")
    train(net, optimizer, scheduler, MORE)
    return [before, held_by(net, optimizer)]


def fsdp1(net: Net) -> nn.Module:
    return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)


def under_lightning(directory: Path) -> list[State]:
    """Lightning's own strategy for FSDP2, saved in the middle of an epoch; and the whole of it, uninterrupted."""
    held = []
    for steps in (STEPS, STEPS + MORE):
        seed_everything(3, verbose=False)
        net = Sharded()
        strategy = ModelParallelStrategy(data_parallel_size=WORLD_SIZE, tensor_parallel_size=1)
        trainer = quiet_trainer(strategy, world_size=WORLD_SIZE, max_steps=steps, limit_val_batches=0)
        trainer.fit(net)
        if steps == STEPS:
            trainer.save_checkpoint(directory)
        held.append(held_by(net, trainer.optimizers[0]))
    return held


def write(root: Path) -> Written:
    return {
        "fsdp2": in_a_loop(root / "fsdp2"),
        "narrow": in_a_loop(root / "narrow", narrow=True),
        "fsdp1": in_a_loop(root / "fsdp1", wrap=fsdp1),
        "lightning": under_lightning(root / "lightning" / "last.ckpt"),
    }


def go_on(ours: Path, names: list[str]) -> dict[str, tuple[Held, dict[str, Tensor]]]:
    """Under a ZeroStrategy: what each began with, and the parameters that it came to."""
    found = {}
    for name in names:
        held, net = Held(), Net("narrow" in name)
        strategy: Any = {"strategy": ZeroStrategy(), "precision": "bf16-true" if "narrow" in name else "32-true"}
        trainer = quiet_trainer(**strategy, world_size=WORLD_SIZE, max_steps=STEPS + MORE, callbacks=[held])
        trainer.fit(net, ckpt_path=ours / name)
        assert trainer.global_step == STEPS + MORE
        found[name] = held, {key: value.detach().clone() for key, value in net.named_parameters()}
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def written(root: Path) -> list[Written]:
    """By rank: buffers differ, and DCP keeps some rank's."""
    if not FSDP2_TRAINS_ON_CPU:
        pytest.skip("torch 2.6's FSDP2 doesn't train on the CPU")
    return run_ranks(write, WORLD_SIZE, root / "theirs")


SOURCES = {
    "fsdp2": "fsdp2/nested",
    "fsdp2, flattened": "fsdp2/flattened",
    "fsdp1": "fsdp1/nested",
    "fsdp1, Lightning's": "fsdp1/lightnings",
    "narrow": "narrow/nested",
    "lightning": "lightning/last.ckpt",
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_fsdp_held_is_imported_bit_for_bit(name: str, root: Path, written: list[Written]) -> None:
    import_fsdp_checkpoint(root / "theirs" / SOURCES[name], root / "ours" / name)
    checkpoint = Checkpoint(resolve(root / "ours" / name), verify="full")
    theirs, ours = [rank[SOURCES[name].split("/")[0]][0] for rank in written], checkpoint.state_dict()
    assert list(ours) == list(Net().state_dict())
    assert checkpoint.manifest.step == STEPS
    saved, groups = (
        checkpoint.lightning_checkpoint()["optimizer_states"][0],
        Net().configure_optimizers()["optimizer"].param_groups,
    )
    parameters = checkpoint.manifest.optimizers[0].parameters
    assert list(map(len, parameters)) == [len(group["params"]) for group in groups]
    assert [group["weight_decay"] for group in saved["param_groups"]] == [group["weight_decay"] for group in groups]
    states = dict(zip(chain(*parameters), saved["state"].values(), strict=True))
    for key in ours:
        mine = {"param": ours[key], **states.get(key, {})}
        assert mine.keys() == theirs[0][key].keys(), key
        for what, value in mine.items():
            held = [rank[key][what] for rank in theirs]
            assert any(torch.equal(value.contiguous().to(one.dtype), one) for one in held), (key, what)


def test_a_zero_strategy_trains_on_to_what_fsdp_would_have_come_to(root: Path, written: list[Written]) -> None:
    names = ["fsdp2", "fsdp2, flattened", "lightning", "narrow"]
    for name in names:
        import_fsdp_checkpoint(root / "theirs" / SOURCES[name], root / "trained" / name)
    for found in run_ranks(go_on, WORLD_SIZE, root / "trained", names, process_group=False):
        for name, (held, parameters) in found.items():
            before, after = written[0][SOURCES[name].split("/")[0]]
            assert held.step == STEPS
            for key, begun_with in held.held.items():
                assert torch.equal(begun_with["param"].to(before[key]["param"].dtype), before[key]["param"]), key
                assert torch.equal(begun_with["exp_avg"].to(before[key]["exp_avg"].dtype), before[key]["exp_avg"]), key
                if name != "narrow":  # which had no masters there
                    torch.testing.assert_close(parameters[key], after[key]["param"], rtol=1e-5, atol=1e-6)
