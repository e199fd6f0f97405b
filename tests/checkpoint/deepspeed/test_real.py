"""Directories that DeepSpeed itself has written, on CPU ranks; only where it is installed (the extra `peers`)."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lightning_zero import ZeroStrategy, import_deepspeed_checkpoint
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.resolution import resolve
from tests.launch import run_ranks
from tests.models import quiet_trainer

pytest.importorskip("deepspeed")

WORLD_SIZE = 2
STEPS = 3


class Net(LightningModule):
    """A tie, a frozen layer, a buffer, and sizes that no number of ranks divides."""

    def __init__(self, all_in_one_group: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(5)
        self.embed = nn.Embedding(11, 7)
        self.body = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.Linear(13, 7))
        self.frozen = nn.Linear(7, 5)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(20000007))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.body(self.embed(tokens))
        logits: Tensor = self.head(hidden + self.frozen(hidden).mean())
        return nn.functional.cross_entropy(logits.float(), tokens)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def train_dataloader(self):
        tokens = torch.randint(0, 11, (64,), generator=torch.Generator().manual_seed(2))
        return torch.utils.data.DataLoader(tokens, batch_size=4)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim == 1], "lr": 2e-3},
        ]
        optimizer = torch.optim.AdamW(trained if self.hparams["all_in_one_group"] else groups, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def without_compiled_operators() -> Any:
    import deepspeed

    for operator in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[operator] = False
    return deepspeed


ONE_GROUP = {"zero_optimization": {"stage": 0}}
"""Without ZeRO: see `test_importing`."""
CONFIGS: dict[str, dict[str, Any]] = {
    "0": ONE_GROUP,
    "1": {"zero_optimization": {"stage": 1}},
    "1, in bf16": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "bf16"},
    },
    "BF16_Optimizer": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "2": {"zero_optimization": {"stage": 2}},
    "3": {"zero_optimization": {"stage": 3, "sub_group_size": 60, "stage3_param_persistence_threshold": 10}},
}
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 10**9,
}
Held = dict[str, dict[str, Tensor]]


def write(save_dir: Path, config: dict[str, Any]) -> tuple[Held, dict[str, Tensor]]:
    """Train under DeepSpeed and save; what it holds of each trained parameter, and its settled state dict."""
    deepspeed = without_compiled_operators()
    deepspeed.init_distributed("gloo")
    net = Net(all_in_one_group=config == ONE_GROUP)
    configured = net.configure_optimizers()
    options = {"optimizer": configured["optimizer"], "lr_scheduler": configured["lr_scheduler"]["scheduler"]}
    engine, *_ = deepspeed.initialize(model=net, config=CONFIG | config, **options)
    rank = int(os.environ["RANK"])
    for step in range(STEPS):
        random = torch.Generator().manual_seed(10 * step + rank)
        engine.backward(engine(torch.randint(0, 11, (4,), generator=random)))
        engine.step()
    engine.save_checkpoint(str(save_dir), client_state={"note": "here"})
    link_states(engine.optimizer)
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    if config == ONE_GROUP:
        states = configured["optimizer"].state
        held = {name: {"param": p.detach().clone(), **states[p]} for name, p in trained.items()}
        held = {name: without_step(of) for name, of in held.items()}
    else:
        held = {name: held_by_deepspeed(parameter) for name, parameter in trained.items()}
    others = {name: value.clone() for name, value in net.named_buffers()}
    return held, others


def link_states(optimizer: Any) -> None:
    """DeepSpeed does it before the first step, when a torch optimizer has none."""
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def held_by_deepspeed(parameter: nn.Parameter) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states = {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
    whole = {"param": safe_get_full_fp32_param(parameter), **states}
    return {key: value.detach().clone().float() for key, value in whole.items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_deepspeed_held_is_imported_bit_for_bit_and_trained_on(config: dict[str, Any], tmp_path: Path) -> None:
    held, buffers = run_ranks(write, WORLD_SIZE, tmp_path / "theirs", config, process_group=False)[0]
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    one_group = config == ONE_GROUP
    assert_bit_for_bit(tmp_path / "ours", held, buffers, one_group=one_group)
    for begun_with, step in run_ranks(go_on, WORLD_SIZE, tmp_path / "ours", STEPS, one_group, process_group=False):
        assert step == STEPS + 4
        assert_same({name: without_step(of) for name, of in begun_with.items()}, held)


def test_gradients_in_turns_change_the_order_on_disk_alone(tmp_path: Path) -> None:
    # What DeepSpeed's own look-up gives is another parameter's, with them
    held, buffers = run_ranks(write, WORLD_SIZE, tmp_path / "plain", CONFIGS["2"], process_group=False)[0]
    config = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    run_ranks(write, WORLD_SIZE, tmp_path / "theirs", config, process_group=False)
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert_bit_for_bit(tmp_path / "ours", held, buffers)


def without_step(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != "step"}


def assert_bit_for_bit(save_dir: Path, held: Held, buffers: dict[str, Tensor], *, one_group: bool = False) -> None:
    checkpoint = Checkpoint(resolve(save_dir), verify="full")
    state_dict = checkpoint.state_dict()
    assert set(state_dict) == set(Net().state_dict())
    assert checkpoint.manifest.aliases == {"head.weight": "embed.weight"}
    for name, value in buffers.items():
        assert torch.equal(state_dict[name].contiguous(), value), name
    for name, value in Net().frozen.named_parameters():
        stored = state_dict[f"frozen.{name}"].contiguous()
        assert torch.equal(stored, value.to(stored.dtype)), name
    state = checkpoint.lightning_checkpoint()["optimizer_states"][0]
    names = [name for group in checkpoint.manifest.optimizers[0].parameters for name in group]
    module = Net(one_group)
    in_order = {parameter: name for name, parameter in module.named_parameters()}
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert names == [in_order[parameter] for group in groups for parameter in group["params"]]
    assert [group["weight_decay"] for group in state["param_groups"]] == [group["weight_decay"] for group in groups]
    for index, name in enumerate(names):
        ours = {key: value.contiguous() for key, value in state["state"][index].items()}
        assert ours.pop("step") == STEPS
        assert_same({name: {"param": state_dict[name].contiguous(), **ours}}, {name: held[name]})


def assert_same(ours: Held, theirs: Held) -> None:
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        for key, value in values.items():
            assert torch.equal(ours[name][key], value.view(ours[name][key].shape)), (name, key)


class BegunWith(Callback):
    held: Held

    def on_train_start(self, trainer, module) -> None:
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.held = {name: trainer.strategy.full_state(parameter) for name, parameter in parameters.items()}
        learning_rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        assert learning_rates == ([5e-4] if module.hparams["all_in_one_group"] else [5e-4, 1e-3])


def go_on(save_dir: Path, step: int, one_group: bool = False) -> tuple[Held, int]:
    begun_with = BegunWith()
    trainer = quiet_trainer(ZeroStrategy(), world_size=WORLD_SIZE, max_steps=step + 4, callbacks=[begun_with])
    trainer.fit(Net(one_group), ckpt_path=save_dir)
    return begun_with.held, trainer.global_step


def under_lightning(path: Path, stage: int) -> Held:
    """Lightning's own strategy, which is for CUDA alone but for what it asks at the start."""
    from lightning.pytorch.strategies import DeepSpeedStrategy

    without_compiled_operators()

    class OnCpu(DeepSpeedStrategy):
        def setup_environment(self) -> None:
            super(DeepSpeedStrategy, self).setup_environment()

        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu", self.local_rank)

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    strategy = OnCpu(
        stage=stage,
        process_group_backend="gloo",
        config=CONFIG | {"zero_optimization": {"stage": stage}},
    )
    trainer = quiet_trainer(strategy, world_size=WORLD_SIZE, max_steps=STEPS)
    module = Net()
    trainer.fit(module)
    trainer.save_checkpoint(path)
    link_states(strategy.deepspeed_engine.optimizer)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: held_by_deepspeed(parameter) for name, parameter in trained.items()}


@pytest.mark.parametrize("stage", [2, 3])
def test_lightnings_own_directories_go_on_under_a_zero_strategy(stage: int, tmp_path: Path) -> None:
    path = tmp_path / "theirs" / "epoch=0-step=3.ckpt"
    held = run_ranks(under_lightning, WORLD_SIZE, path, stage, process_group=False)[0]
    assert import_deepspeed_checkpoint(path, tmp_path / "ours").name == path.name
    assert_bit_for_bit(tmp_path / "ours", held, {})
    trainer = Checkpoint(resolve(tmp_path / "ours")).trainer()
    assert trainer["hyper_parameters"] == {"all_in_one_group": False}
    for begun_with, step in run_ranks(go_on, WORLD_SIZE, tmp_path / "ours", STEPS, process_group=False):
        assert step == STEPS + 4
        assert_same(begun_with, held)
