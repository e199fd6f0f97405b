"""Fits under Lightning's Trainer, beside stock DDP."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_zero import ZeroStrategy, get_fp32_state_dict_from_zero_checkpoint
from tests.launch import distributed
from tests.models import Data, Model, fit, quiet_trainer


def assert_equal_states(ours, theirs, **tolerance):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, name=name: f"{name}: {m}"
        )


@distributed(world_size=2, process_group=False)
def test_a_fit_equals_ddps_bit_for_bit_at_both_stages():
    theirs, _ = fit(strategy="ddp", world_size=2, max_epochs=2)
    for stage in (1, 2):
        ours, _ = fit(strategy=ZeroStrategy(stage=stage), world_size=2, max_epochs=2)
        assert ours.losses == theirs.losses
        assert_equal_states(ours, theirs)


@distributed(world_size=1, process_group=False)
def test_one_process_equals_ddp_bit_for_bit_in_every_precision():
    for precision in ("32-true", "bf16-mixed", "64-true"):
        options = {"world_size": 1, "max_epochs": 1, "precision": precision, "gradient_clip_val": 0.5}
        theirs, _ = fit(strategy="ddp", **options)
        ours, _ = fit(strategy=ZeroStrategy(), **options)
        assert_equal_states(ours, theirs)


@distributed(world_size=2, process_group=False)
def test_bf16_mixed_clipping_and_accumulation_equal_ddp():
    for options in (
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3},
    ):
        theirs, _ = fit(strategy="ddp", world_size=2, max_epochs=1, **options)
        for stage in (1, 2):
            ours, _ = fit(strategy=ZeroStrategy(stage=stage), world_size=2, max_epochs=1, **options)
            assert_equal_states(ours, theirs, rtol=1e-4, atol=1e-5)


@distributed(world_size=2, process_group=False)
def test_bf16_true_trains_on_fp32_masters():
    model, trainer = fit(strategy=ZeroStrategy(), world_size=2, max_epochs=4, precision="bf16-true")
    assert model.into.weight.dtype == torch.bfloat16
    segments = trainer.strategy.segments(trainer.optimizers[0])
    assert {segment.master.dtype for segment in segments} == {torch.float32}
    first = segments[0]
    assert repr(first) == f"OwnedSegment(name={first.name!r}, start={first.start}, stop={first.stop})"
    full = trainer.strategy.full_state(model.into.weight)
    assert torch.equal(full["param"].bfloat16(), model.into.weight.detach())
    assert full["exp_avg"].dtype == torch.float32
    assert sum(model.losses[-8:]) < sum(model.losses[:8])


@distributed(world_size=2, process_group=False)
def test_the_registered_names_and_the_ddp_family_are_recognised():
    for name, stage in (("zero_stage_1", 1), ("zero_stage_2", 2)):
        trainer = quiet_trainer(name, world_size=2)
        assert isinstance(trainer.strategy, ZeroStrategy)
        assert trainer.strategy.stage == stage


class Watcher(Callback):
    """Looks at the groups and the norm where callbacks do."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        mine = {id(parameter) for parameter in pl_module.parameters()}
        assert all(id(p) in mine for group in optimizer.param_groups for p in group["params"])
        self.norms.append(float(trainer.strategy.grad_norm()))


class TorchNorm(Callback):
    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(
            float(nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None]))
        )


@distributed(world_size=2, process_group=False)
def test_the_global_norm_before_the_step_is_ddps():
    ours, theirs = Watcher(), TorchNorm()
    fit(strategy=ZeroStrategy(), world_size=2, max_epochs=1, callbacks=[ours])
    fit(strategy="ddp", world_size=2, max_epochs=1, callbacks=[theirs])
    torch.testing.assert_close(torch.tensor(ours.norms), torch.tensor(theirs.norms))


@distributed(world_size=2, process_group=False)
def test_validate_test_predict_and_a_second_fit_work_on_one_trainer():
    model, trainer = fit(strategy=ZeroStrategy(), world_size=2, max_epochs=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics = trainer.validate(model, datamodule=Data(), verbose=False)
    assert metrics[0]["val_loss"] > 0
    model.test_step = lambda batch, batch_idx: None
    model.predict_step = lambda batch, batch_idx: model(batch)
    trainer.test(model, dataloaders=Data().val_dataloader(), verbose=False)
    assert len(trainer.predict(model, dataloaders=Data().val_dataloader())) == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, datamodule=Data())
    assert not torch.equal(model.into.weight, before["into.weight"])


@distributed(world_size=2, process_group=False)
def test_after_fit_the_module_is_an_ordinary_one():
    model, _ = fit(strategy=ZeroStrategy(), world_size=2, max_epochs=1)
    model.zero_grad()
    (model(torch.randn(4, 8)) ** 2).mean().backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model.into.weight.detach().clone()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert not torch.equal(before, model.into.weight)


def test_lbfgs_is_refused_with_a_reason_and_a_way_out():
    from lightning_zero.engine.cuts import cut_for

    with pytest.raises(ValueError, match=r"LBFGS can't be partitioned.*Use DDPStrategy"):
        cut_for(torch.optim.LBFGS([nn.Parameter(torch.zeros(1))]), "auto", alone=False)


def test_an_optimizer_that_is_not_known_gets_whole_parameters():
    from lightning_zero.engine.cuts import cut_for

    class Mine(torch.optim.AdamW):
        pass

    parameter = [nn.Parameter(torch.zeros(1))]
    assert cut_for(Mine(parameter), "auto", alone=False).policy == "parameter"
    assert cut_for(torch.optim.AdamW(parameter), "auto", alone=False).policy == "element"
    assert cut_for(Mine(parameter), "element", alone=False).policy == "element"


def test_the_model_for_the_tests_has_what_the_tests_are_about():
    model = Model()
    assert model.out.weight is model.tied.weight
    assert not model.frozen.weight.requires_grad


@distributed(world_size=2, process_group=False)
def test_after_the_fit_every_parameter_has_memory_of_its_own_and_what_is_written_there_is_saved(tmp_path):
    for precision in ("32-true", "bf16-true"):
        model, trainer = fit(strategy=ZeroStrategy(), world_size=2, max_steps=3, precision=precision)
        for parameter in model.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
        path = tmp_path / precision
        trainer.save_checkpoint(path / "as trained")
        before = get_fp32_state_dict_from_zero_checkpoint(path / "as trained")
        whole = trainer.strategy.full_state(model.into.weight)
        assert torch.equal(before["into.weight"], whole["param"])
        with torch.no_grad():
            model.into.weight[0] += 1
        model.float()  # follows the parameters to wherever they go
        trainer.save_checkpoint(path / "changed")
        after = get_fp32_state_dict_from_zero_checkpoint(path / "changed")
        assert torch.equal(after["into.weight"][0], model.into.weight[0])
        assert torch.equal(after["into.weight"][1:], before["into.weight"][1:])
