"""`lightning-zero import-fsdp` on directories that are laid out as torch.distributed.checkpoint's."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_zero import get_fp32_state_dict_from_zero_checkpoint, import_fsdp_checkpoint
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.resolution import resolve
from lightning_zero.cli import main
from lightning_zero.errors import CheckpointMismatchError, CheckpointNotFoundError, UnsupportedModelError
from tests.checkpoint.deepspeed.training import trained
from tests.checkpoint.fsdp.forger import flattened, forge, optimizer_state, training
from tests.checkpoint.imports import memory_of
from tests.models import Model


def assert_holds(save_dir: Path, module: nn.Module, optimizer: Any = None, *, prefix: str = "") -> Checkpoint:
    """Bit for bit: the state dict, and the optimizer's states, groups and settings."""
    checkpoint = Checkpoint(resolve(save_dir), verify="full")
    stored = checkpoint.state_dict()
    assert list(stored) == [prefix + name for name in module.state_dict()]
    for name, value in module.state_dict().items():
        assert torch.equal(stored[prefix + name].contiguous(), value), name
    assert len(checkpoint.manifest.optimizers) == (optimizer is not None)
    if optimizer is None:
        return checkpoint
    saved, names = (
        checkpoint.lightning_checkpoint()["optimizer_states"][0],
        {p: prefix + name for name, p in module.named_parameters()},
    )
    assert checkpoint.manifest.optimizers[0].parameters == tuple(
        tuple(names[p] for p in group["params"]) for group in optimizer.param_groups
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        assert saved["state"][index].keys() == optimizer.state[parameter].keys()
        for key, value in optimizer.state[parameter].items():
            ours = saved["state"][index][key].contiguous()
            assert (ours.dtype, ours.shape) == (torch.float32, value.shape), key
            assert torch.equal(ours, value), key
    for ours, theirs in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
    return checkpoint


def in_loops(module: Model, optimizer: Any, **more: Any) -> dict[str, Any]:
    return {"model": module.state_dict(), "optimizer": optimizer_state(module, optimizer), **more}


@pytest.mark.parametrize("world_size", [1, 3, 40])
@pytest.mark.parametrize("flat", [False, True])
def test_everything_is_imported_bit_for_bit(world_size: int, flat: bool, tmp_path: Path) -> None:
    module, optimizer = training()
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    state = in_loops(module, optimizer, note={"of": ["a", 1, None], "list": [{"x": 1}, {"x": 2}]})
    if flat:
        state["optimizer"] = flattened(state["optimizer"])
    path = import_fsdp_checkpoint(forge(tmp_path / "theirs" / "step-5", state, world_size), tmp_path / "ours")
    assert path == tmp_path / "ours" / "step-5"
    checkpoint = assert_holds(tmp_path / "ours", module, optimizer)
    held_by = min(world_size, 24)  # no tensor has more rows
    assert (checkpoint.manifest.step, checkpoint.manifest.stage, checkpoint.manifest.world_size) == (5, 3, held_by)
    trainer = checkpoint.trainer()
    assert trainer["lightning_zero_client_state"] == {"note": {"of": ["a", 1, None], "list": [{"x": 1}, {"x": 2}]}}


def test_where_the_module_stands_is_found_or_said(tmp_path: Path) -> None:
    module, optimizer = training()
    model, state = module.state_dict(), optimizer_state(module, optimizer)
    layouts: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        "an application": ({"app": {"model": model, "optim": state}}, {}),
        "Lightning's": ({"state_dict": model, "optimizer_0": state}, {}),
        "averages beside it": ({"model": model, "optimizer": state, "ema": {"note": 1, "model": {"x": 1}}}, {}),
        "other names": (
            {"generator": model, "of_generator": state, "other": {"w": torch.ones(3)}, "of_other": state},
            {"model_key": "generator", "optimizer_key": "of_generator"},
        ),
        "the top": ({**model, "optimizer": state, "step": 5}, {"model_key": ""}),
    }
    for name, (content, options) in layouts.items():
        source = forge(tmp_path / "theirs" / name, content)
        if name == "other names":
            with pytest.raises(CheckpointMismatchError, match=r"where the module.*generator"):
                import_fsdp_checkpoint(source, tmp_path / name)
            with pytest.warns(UserWarning, match="other"):
                import_fsdp_checkpoint(source, tmp_path / name, **options)
        else:
            import_fsdp_checkpoint(source, tmp_path / name, **options)
        assert_holds(tmp_path / name, module, optimizer)
    with pytest.raises(CheckpointMismatchError, match="'nowhere'"):
        import_fsdp_checkpoint(source, tmp_path / "ours", model_key="nowhere")


def test_lightnings_dict_is_its_own(tmp_path: Path) -> None:
    module, optimizer = training()
    state = {"state_dict": module.state_dict(), "optimizer_0": optimizer_state(module, optimizer)}
    source = forge(tmp_path / "epoch=3.ckpt", state)
    lightnings = {
        "pytorch-lightning_version": "2.6.0",
        "epoch": 3,
        "global_step": 7,
        "callbacks": {"Some": {"best": torch.tensor(0.5)}},
        "lr_schedulers": [{"last_epoch": 7}],
        "hyper_parameters": {"width": 24},
    }
    torch.save(lightnings, source / "meta.pt")
    checkpoint = Checkpoint(import_fsdp_checkpoint(source, tmp_path / "ours"))
    assert (checkpoint.manifest.step, checkpoint.manifest.epoch) == (7, 3)
    trainer = checkpoint.trainer()
    assert {key: trainer[key] for key in lightnings} == lightnings


def test_a_network_becomes_a_part_of_a_lightning_module_and_takes_a_tag(tmp_path: Path) -> None:
    module, optimizer = training()
    source = forge(tmp_path / "theirs", in_loops(module, optimizer))
    for prefix in ("net.", ".net", "net..in", "."):
        with pytest.raises(ValueError, match="is no submodule's name, such as 'model'"):
            import_fsdp_checkpoint(source, tmp_path / "ours", "five", submodule=prefix)
    assert import_fsdp_checkpoint(source, tmp_path / "ours", "five", submodule="net").name == "five"
    assert_holds(tmp_path / "ours", module, optimizer, prefix="net.")


def test_weights_alone(tmp_path: Path) -> None:
    module, optimizer = training()
    import_fsdp_checkpoint(forge(tmp_path / "a", in_loops(module, optimizer)), tmp_path / "ours", module_only=True)
    import_fsdp_checkpoint(forge(tmp_path / "b", {"model": module.state_dict()}), tmp_path / "ours2")
    for name in ("ours", "ours2"):
        assert_holds(tmp_path / name, module)


def test_a_16_bit_parameter_becomes_its_master_by_value(tmp_path: Path) -> None:
    module, optimizer = training(step=0)
    module.bfloat16()
    for parameter in module.parameters():
        parameter.grad = parameter.detach().clone() if parameter.requires_grad else None
    optimizer.step()
    import_fsdp_checkpoint(forge(tmp_path / "theirs", in_loops(module, optimizer)), tmp_path / "ours")
    checkpoint = assert_holds(tmp_path / "ours", module, optimizer)
    stored = checkpoint.state_dict()
    assert stored["into.weight"].dtype == torch.float32
    assert stored["frozen.weight"].dtype == torch.bfloat16
    assert {entry.dtype for entry in checkpoint.manifest.entries if entry.role == "parameter"} == {"bfloat16"}


def test_a_scheduler_goes_on_with_its_milestones(tmp_path: Path) -> None:
    module, optimizer = training()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 4])
    state = in_loops(module, optimizer, lr_scheduler={**scheduler.state_dict(), "milestones": Counter({2: 1, 4: 2})})
    checkpoint = Checkpoint(import_fsdp_checkpoint(forge(tmp_path / "theirs", state), tmp_path / "ours"))
    scheduler.load_state_dict(checkpoint.trainer()["lr_schedulers"][0])
    rates = []
    for _ in range(5):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == pytest.approx([2e-3, 2e-4, 2e-4, 2e-6, 2e-6])


def test_an_optimizer_that_counts_no_steps_is_warned_of(tmp_path: Path) -> None:
    module, optimizer = training(torch.optim.SGD, momentum=0.9)
    source = forge(tmp_path / "theirs", in_loops(module, optimizer))
    with pytest.warns(UserWarning, match="how many steps"):
        import_fsdp_checkpoint(source, tmp_path / "ours")
    assert assert_holds(tmp_path / "ours", module, optimizer).manifest.step == 0


def test_plain_states_and_rates_that_are_tensors_stay_what_they_are(tmp_path: Path) -> None:
    module, optimizer = training()
    state = in_loops(module, optimizer)
    for of in state["optimizer"]["state"].values():
        of.update(kind="x", step=5)
    for group in state["optimizer"]["param_groups"]:
        group["lr"] = torch.tensor(0.5)
    checkpoint = Checkpoint(import_fsdp_checkpoint(forge(tmp_path / "theirs", state), tmp_path / "ours"))
    saved = checkpoint.lightning_checkpoint()["optimizer_states"][0]
    assert saved["param_groups"][0]["lr"] == torch.tensor(0.5)
    assert saved["state"][0]["kind"] == "x"
    assert saved["state"][0]["step"].contiguous() == 5
    assert checkpoint.manifest.step == 5


def test_what_is_not_kept_by_rows_is_refused_by_name(tmp_path: Path) -> None:
    module, optimizer = training()
    state = in_loops(module, optimizer)
    with pytest.raises(UnsupportedModelError, match=r"'into\.weight' of shape \(24, 8\).*dimension 1"):
        import_fsdp_checkpoint(forge(tmp_path / "columns", state, dimension=1), tmp_path / "ours")
    state["optimizer"]["state"]["into.weight"]["row"] = torch.ones(24)
    with pytest.raises(UnsupportedModelError, match=r"'row' of 'into\.weight'.*--module-only"):
        import_fsdp_checkpoint(forge(tmp_path / "factored", state), tmp_path / "ours")
    import_fsdp_checkpoint(tmp_path / "factored", tmp_path / "ours", module_only=True)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    module = nn.Linear(2048, 8192, bias=False)
    states = {"step": torch.tensor(5.0), "exp_avg": module.weight.detach(), "exp_avg_sq": module.weight.detach()}
    optimizer = {"state": {"weight": states}, "param_groups": [{"lr": 1e-3, "params": ["weight"]}]}
    forge(tmp_path / "theirs", {"model": module.state_dict(), "optimizer": optimizer}, world_size=2)
    assert memory_of("import_fsdp_checkpoint", tmp_path / "theirs", tmp_path / "ours") < 30  # of 192 MiB
    state_dict = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "ours")
    assert torch.equal(state_dict["weight"], module.weight)


def test_from_and_to_a_url(tmp_path: Path) -> None:
    source = forge(tmp_path / "theirs", in_loops(*training()))
    path = import_fsdp_checkpoint(source.as_uri(), "memory://imported_from_fsdp")
    assert Checkpoint(path, verify="full").manifest.step == 5


def test_the_command_and_what_it_leads_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, ours = forge(tmp_path / "run" / "step-5", in_loops(*training())), str(tmp_path / "ours")
    with pytest.raises(CheckpointNotFoundError, match="step-5"):
        import_fsdp_checkpoint(source.parent, ours)
    assert main(["import-fsdp", str(source), ours]) == 0
    assert "run/step-5 → " in capsys.readouterr().out
    assert main(["import-fsdp", str(source / ".metadata"), ours, "--tag", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "source": str(source),
        "checkpoint": str(tmp_path / "ours" / "b"),
        "step": 5,
        "stage": 3,
        "world_size": 3,
        "bytes": sum(file.stat().st_size for file in (tmp_path / "ours" / "b").iterdir()),
    }
    for command in (["ls", ours], ["inspect", ours], ["verify", ours], ["export", ours, f"{ours}.ckpt"]):
        assert main(command) == 0
    assert main(["diff", f"{ours}/step-5", f"{ours}/b"]) == 0


@pytest.mark.parametrize("command", ["ls", "verify", "inspect", "export"])
def test_whoever_takes_it_for_one_of_ours_is_told_the_command(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = forge(tmp_path / "run" / "step-5", in_loops(*training()))
    other = trained(stage=2).save(tmp_path / "other")
    more = [str(tmp_path / "x.ckpt")] if command == "export" else []
    for given, advised in ((source, source), (source.parent, source), (other, other), (other.parent, other)):
        assert main([command, str(given), *more]) == (0 if command == "ls" else 1)
        told = capsys.readouterr()
        name = "import-fsdp" if advised is source else "import-deepspeed"
        assert f"lightning-zero {name} {advised} DST" in told.out + told.err
    if command != "ls":
        assert main([command, str(source.parent), *more, "--tag", source.name]) == 1
        assert f"lightning-zero import-fsdp {source} DST" in capsys.readouterr().err


def test_each_of_the_imports_names_the_other_where_that_one_is_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fsdps = forge(tmp_path / "run" / "step-5", in_loops(*training()))
    deepspeeds = trained(stage=2).save(tmp_path / "other")
    for used, meant, tag in (("deepspeed", "fsdp", fsdps), ("fsdp", "deepspeed", deepspeeds)):
        for given in (tag, tag.parent):
            assert main([f"import-{used}", str(given), str(tmp_path / "ours")]) == 1
            assert f"lightning-zero import-{meant} {tag} DST" in capsys.readouterr().err
