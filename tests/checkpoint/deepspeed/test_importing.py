"""`lightning-zero import-deepspeed` on directories that are laid out as DeepSpeed's."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from lightning_zero import ZeroStrategy, get_fp32_state_dict_from_zero_checkpoint, import_deepspeed_checkpoint
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.cli import main
from lightning_zero.errors import CheckpointMismatchError, CheckpointWriteError
from tests.checkpoint.deepspeed.forger import Run, edit
from tests.checkpoint.deepspeed.training import assert_holds, trained
from tests.checkpoint.imports import memory_of
from tests.launch import distributed, run_ranks
from tests.models import Model, fit

LIGHTNING = {
    "pytorch-lightning_version": "2.6.0",
    "epoch": 3,
    "global_step": 5,
    "callbacks": {"Some": {"best": torch.tensor(0.5)}},
    "lr_schedulers": [],
    "hparams_name": "kwargs",
    "hyper_parameters": {"width": 24},
}


@pytest.mark.parametrize("stage", [1, 2, 3, "bf16"])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_everything_is_imported_bit_for_bit(stage: int | str, world_size: int, tmp_path: Path) -> None:
    run = trained(stage=stage, world_size=world_size, client_state={"note": "before the drop"})
    if stage == "bf16":  # frozen parameters are as narrow as the module, and masters are not
        run.module.frozen.bfloat16()
    run.save(tmp_path / "theirs")
    path = import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert path == tmp_path / "ours" / "global_step5"
    checkpoint = assert_holds(tmp_path / "ours", run)
    assert (checkpoint.manifest.step, checkpoint.manifest.world_size) == (5, world_size)
    assert checkpoint.manifest.stage == (1 if stage == "bf16" else stage)
    told = "decoupled_weight_decay" in torch.optim.AdamW([torch.ones(1)]).param_groups[0]  # torch 2.6 doesn't yet
    assert checkpoint.manifest.optimizers[0].class_name == ("AdamW" if told else "")
    trainer = checkpoint.trainer()
    assert trainer["lightning_zero_client_state"] == {"note": "before the drop"}
    assert trainer["lr_schedulers"] == [run.scheduler]


def test_without_zero_there_is_one_file(tmp_path: Path) -> None:
    run = trained(stage=0, world_size=1)
    run.module.frozen.requires_grad_(True)
    parameters = list(run.module.parameters())
    run.optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        run.optimizer.state[parameter] = {"step": torch.tensor(5.0), "exp_avg": torch.rand_like(parameter)}
    run.save(tmp_path / "theirs")
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert_holds(tmp_path / "ours", run)


def test_without_zero_states_find_their_parameters_by_their_shapes(tmp_path: Path) -> None:
    run = trained(stage=0, world_size=1)
    run.module.norm.requires_grad_(False)
    parameters = [parameter for parameter in run.module.parameters() if parameter.requires_grad]
    run.optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        run.optimizer.state[parameter] = {"step": torch.tensor(5.0), "exp_avg": torch.rand_like(parameter)}
    run.save(tmp_path / "theirs")
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    checkpoint = assert_holds(tmp_path / "ours", run)
    frozen = {entry.name for entry in checkpoint.manifest.entries if entry.role == "frozen"}
    assert frozen == {"norm.weight", "norm.bias", "frozen.weight", "frozen.bias"}


def test_weights_alone(tmp_path: Path) -> None:
    for stage in (0, 2, 3):
        run = trained(stage=stage, world_size=1)
        run.save(tmp_path / f"theirs{stage}")
        import_deepspeed_checkpoint(tmp_path / f"theirs{stage}", tmp_path / f"ours{stage}", module_only=True)
        assert_holds(tmp_path / f"ours{stage}", run, states=False)


def test_lightnings_dict_is_its_own(tmp_path: Path) -> None:
    run = trained(stage=2, client_state=LIGHTNING, prefix="_forward_module.")
    run.save(tmp_path / "epoch=3.ckpt", "checkpoint")
    for name, source in (("a", tmp_path / "epoch=3.ckpt"), ("b", tmp_path / "epoch=3.ckpt" / "checkpoint")):
        assert import_deepspeed_checkpoint(source, tmp_path / name).name == "epoch=3.ckpt"
        checkpoint = assert_holds(tmp_path / name, run)
    assert (checkpoint.manifest.step, checkpoint.manifest.epoch) == (5, 3)
    trainer = checkpoint.trainer()
    assert {key: trainer[key] for key in LIGHTNING} == LIGHTNING


def test_a_network_becomes_a_part_of_a_lightning_module(tmp_path: Path) -> None:
    run = trained(stage=3)
    run.save(tmp_path / "theirs")
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours", submodule="model")
    assert_holds(tmp_path / "ours", run, prefix="model.")


def test_files_of_a_larger_run_may_linger(tmp_path: Path) -> None:
    for stage in (2, 3):
        trained(stage=stage, world_size=6, step=4).save(tmp_path / f"theirs{stage}")
        run = trained(stage=stage, world_size=3)
        run.save(tmp_path / f"theirs{stage}")
        import_deepspeed_checkpoint(tmp_path / f"theirs{stage}", tmp_path / f"ours{stage}")
        assert assert_holds(tmp_path / f"ours{stage}", run).manifest.world_size == 3


def test_parameters_that_travelled_in_turns_come_back_in_their_order(tmp_path: Path) -> None:
    run = trained(stage=1)
    whole = run.groups
    shuffled = [list(reversed(group)) for group in whole]
    cls = type("Shuffled", (Run,), {"groups": property(lambda self: shuffled)})
    other = cls(run.module, run.optimizer, stage=1, scheduler=run.scheduler)
    directory = other.save(tmp_path / "theirs")
    edit(
        directory / "mp_rank_00_model_states.pt",
        lambda content: content["ds_config"]["zero_optimization"].update(round_robin_gradients=True),
    )
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert_holds(tmp_path / "ours", run)


def test_paddings_between_parameters_are_left_out(tmp_path: Path) -> None:
    run = trained(stage=2, world_size=2)
    directory = run.save(tmp_path / "theirs")
    for rank in range(2):

        def widen(content: dict, rank: int = rank) -> None:
            saved = content["optimizer_state_dict"]
            for flat, group in enumerate(run.groups):
                parts = [torch.cat([p.detach().reshape(-1), torch.full((4,), torch.nan)]) for p in group]
                masters = torch.cat(parts)[:-4]
                half = (len(masters) + 3) // 4 * 2
                cut = slice(rank * half, (rank + 1) * half)
                saved["single_partition_of_fp32_groups"][flat] = masters[cut].clone()
                saved["param_alignment_paddings"][flat] = [4] * (len(group) - 1) + [0]
                for key in ("exp_avg", "exp_avg_sq"):
                    states = [torch.cat([run.whole(p, key), torch.full((4,), torch.nan)]) for p in group]
                    saved["base_optimizer_state"]["state"][flat][key] = torch.cat(states)[:-4][cut].clone()

        edit(directory / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", widen)
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert_holds(tmp_path / "ours", run)


@pytest.mark.parametrize(
    "kept", [lambda: 5, lambda: torch.tensor(5), lambda: torch.tensor([5.0])], ids=["int", "integer", "vector"]
)
def test_a_step_is_kept_as_torchs_optimizers_keep_it(kept, tmp_path: Path) -> None:
    run = trained(stage=2)
    directory = run.save(tmp_path / "theirs")
    for rank in range(3):

        def change(content: dict) -> None:
            for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
                state["step"] = kept()

        edit(directory / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", change)
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert_holds(tmp_path / "ours", run)


def test_a_step_that_only_the_group_knows(tmp_path: Path) -> None:
    run = trained(stage=1, world_size=1)
    directory = run.save(tmp_path / "theirs")

    def change(content: dict) -> None:
        base = content["optimizer_state_dict"]["base_optimizer_state"]
        for state, group in zip(base["state"].values(), base["param_groups"], strict=True):
            group["step"] = int(state.pop("step"))

    edit(directory / "zero_pp_rank_0_mp_rank_00_optim_states.pt", change)
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert_holds(tmp_path / "ours", run)


def test_an_elastic_checkpoint_has_no_settings(tmp_path: Path) -> None:
    run = trained(stage=1, world_size=2)
    directory = run.save(tmp_path / "theirs")
    for rank in range(2):

        def change(content: dict, rank: int = rank) -> None:
            saved = content["optimizer_state_dict"]
            states = saved["base_optimizer_state"]["state"].values()
            lengths = [len(flat) for flat in saved["single_partition_of_fp32_groups"]]
            saved["base_optimizer_state"] = [
                {key: value[:length].clone() if value.ndim else value for key, value in state.items()}
                for state, length in zip(states, lengths, strict=True)
            ]

        edit(directory / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", change)
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    for group in run.optimizer.param_groups:
        for key in [key for key in group if key != "params"]:
            del group[key]
    assert_holds(tmp_path / "ours", run)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    module = torch.nn.Linear(2048, 8192, bias=False)
    optimizer = torch.optim.AdamW(module.parameters())
    states = {key: module.weight.detach() for key in ("exp_avg", "exp_avg_sq")}
    optimizer.state[module.weight] = {"step": torch.tensor(5.0), **states}
    Run(module, optimizer, stage=2, world_size=2).save(tmp_path / "theirs")
    assert memory_of("import_deepspeed_checkpoint", tmp_path / "theirs", tmp_path / "ours") < 30  # of 192 MiB
    state_dict = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "ours")
    assert torch.equal(state_dict["weight"], module.weight)


def test_a_tag_that_is_there_is_never_replaced(tmp_path: Path) -> None:
    run = trained(stage=2)
    run.save(tmp_path / "theirs")
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(CheckpointWriteError, match="is a checkpoint already"):
        import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours", module_only=True)
    assert_holds(tmp_path / "ours", run)


def test_the_files_may_be_links(tmp_path: Path) -> None:
    run = trained(stage=2)
    tag = run.save(tmp_path / "theirs")
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(tag.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(tmp_path / "blobs" / str(number))
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert_holds(tmp_path / "ours", run)


def test_from_and_to_a_url(tmp_path: Path) -> None:
    run = trained(stage=2)
    run.save(tmp_path / "theirs")
    path = import_deepspeed_checkpoint((tmp_path / "theirs").as_uri(), "memory://imported")
    assert Checkpoint(path, verify="full").manifest.step == 5


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        ({"type": "Adam"}, "AdamW"),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, "Adam"),
        ({"type": "Lion"}, "Lion"),
    ],
)
def test_the_optimizers_class_is_what_deepspeed_makes_of_its_configuration(optimizer, name, tmp_path: Path) -> None:
    directory = trained(stage=1, world_size=1).save(tmp_path / "theirs")
    edit(directory / "mp_rank_00_model_states.pt", lambda content: content["ds_config"].update(optimizer=optimizer))
    edit(
        directory / "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        lambda content: [
            group.pop("decoupled_weight_decay", None)
            for group in content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
        ],
    )
    path = import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert Checkpoint(path).manifest.optimizers[0].class_name == name


def test_a_scheduler_of_deepspeeds_own_is_warned_of(tmp_path: Path) -> None:
    run = trained(stage=2)
    run.scheduler = {"last_batch_iteration": 4}
    run.save(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="last_epoch=5"):
        import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert assert_holds(tmp_path / "ours", run).trainer()["lr_schedulers"] == []


def test_the_command_and_what_it_leads_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(stage=2)
    run.save(tmp_path / "theirs", "a")
    run.save(tmp_path / "theirs", "b", latest=False)
    ours = str(tmp_path / "ours")
    assert main(["import-deepspeed", str(tmp_path / "theirs"), ours]) == 0
    assert "theirs/a → " in capsys.readouterr().out
    assert main(["import-deepspeed", str(tmp_path / "theirs"), ours, "--tag", "b", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "source": str(tmp_path / "theirs" / "b"),
        "checkpoint": str(tmp_path / "ours" / "b"),
        "step": 5,
        "stage": 2,
        "world_size": 3,
        "bytes": sum(file.stat().st_size for file in (tmp_path / "ours" / "b").iterdir()),
    }
    for command in (["ls", ours], ["inspect", ours], ["verify", ours], ["export", ours, f"{ours}.ckpt"]):
        assert main(command) == 0
    assert main(["diff", f"{ours}/a", f"{ours}/b"]) == 0
    assert main(["export", ours, f"{ours}-resumable.ckpt", "--with-optimizer"]) == 0
    exported = torch.load(f"{ours}-resumable.ckpt")
    assert exported["global_step"] == 5
    for name, value in get_fp32_state_dict_from_zero_checkpoint(ours).items():
        assert torch.equal(value, run.module.state_dict()[name])
        assert torch.equal(value, exported["state_dict"][name])


# ------------------------------------------------------------------------------------------------------- going on


class Held(Callback):
    """What a rank begins with."""

    def __init__(self) -> None:
        self.step = -1
        self.held: dict = {}
        self.learning_rates: list[float] = []

    def on_train_start(self, trainer, module) -> None:
        self.step = trainer.global_step
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.held = {name: trainer.strategy.full_state(p) for name, p in parameters.items()}
        self.learning_rates = [group["lr"] for group in trainer.optimizers[0].param_groups]


def go_on(save_dir: Path, max_steps: int, model_class: type = Model) -> tuple[Held, int, list[float]]:
    held = Held()
    model, trainer = fit(
        model_class(),
        strategy=ZeroStrategy(stage=2),
        world_size=2,
        max_steps=max_steps,
        ckpt_path=save_dir,
        callbacks=[held],
        limit_val_batches=0,
    )
    return held, trainer.global_step, model.losses


class Around(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.net = torch.nn.Identity(), Model()

    def training_step(self, batch):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


@distributed(world_size=1, process_group=False)
def test_who_needs_submodule_is_told_so(tmp_path: Path) -> None:
    trained(stage=2).save(tmp_path / "theirs")
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    needs = pytest.raises(CheckpointMismatchError, match=r"the names of its 'net'.* import it with --submodule net$")
    with needs:
        fit(Around(), ZeroStrategy(), world_size=1, max_steps=6, ckpt_path=tmp_path / "ours")
    trainer = fit(Around(), ZeroStrategy(), world_size=1, max_steps=1)[1]
    with needs:
        trainer.strategy.load_zero_checkpoint(tmp_path / "ours", load_module_only=True)
    with pytest.raises(ValueError, match=r"'net\.' is no submodule's name"):
        import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "whole", submodule="net.")
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "whole", submodule="net")
    trainer.strategy.load_zero_checkpoint(tmp_path / "whole", load_module_only=True)
    with pytest.raises(CheckpointMismatchError, match=r"doesn't fit the module") as caught:
        fit(Model(width=8), ZeroStrategy(), world_size=1, max_steps=6, ckpt_path=tmp_path / "ours")
    assert "--submodule" not in str(caught.value)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_training_goes_on_from_the_step_that_deepspeed_has_come_to(stage: int, tmp_path: Path) -> None:
    run = trained(stage=stage)
    run.save(tmp_path / "theirs")
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    for held, step, losses in run_ranks(go_on, 2, tmp_path / "ours", 17, process_group=False):
        assert (held.step, step, len(losses)) == (5, 17, 12)
        assert held.learning_rates == [group["lr"] for group in run.optimizer.param_groups]
        for name, parameter in run.module.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(held.held[name]["param"], parameter)
                for key, value in run.optimizer.state[parameter].items():
                    assert torch.equal(held.held[name][key], value)


class AllInTheOptimizer(Model):
    """Frozen parameters are in the optimizer too, as in `AdamW(self.parameters())`; DeepSpeed leaves them out."""

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        configured["optimizer"].param_groups[0]["params"][1:1] = list(self.frozen.parameters())
        return configured


def test_frozen_parameters_in_the_optimizer_are_no_hindrance(tmp_path: Path) -> None:
    run = trained(stage=2)
    run.save(tmp_path / "theirs")
    import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    for held, step, _ in run_ranks(go_on, 2, tmp_path / "ours", 7, AllInTheOptimizer, process_group=False):
        assert (held.step, step) == (5, 7)
        for name, parameter in run.module.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(held.held[name]["exp_avg"], run.optimizer.state[parameter]["exp_avg"])


class LoadsByTag(Callback):
    def __init__(self, save_dir: Path) -> None:
        self.save_dir = save_dir

    def on_train_start(self, trainer, module) -> None:
        path, client_state = trainer.strategy.load_zero_checkpoint(self.save_dir)
        assert path.endswith("global_step5")
        assert client_state == {"note": "here"}
        self.learning_rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self.out = module.out.weight.detach().clone()


@distributed(world_size=2, process_group=False)
def load_by_tag(save_dir: Path, learning_rates: list[float], out: torch.Tensor) -> None:
    callback = LoadsByTag(save_dir)
    fit(strategy=ZeroStrategy(stage=1), world_size=2, max_steps=1, callbacks=[callback], limit_val_batches=0)
    assert callback.learning_rates == learning_rates
    assert torch.equal(callback.out, out)


def test_it_is_loaded_by_its_tag(tmp_path: Path) -> None:
    run = trained(stage=3, client_state={"note": "here"})
    run.save(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_deepspeed_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    learning_rates = [group["lr"] for group in run.optimizer.param_groups]
    load_by_tag(tmp_path / "ours", learning_rates, run.module.out.weight.detach())
