"""Lightning's own callbacks, beside stock DDP and on checkpoint directories."""

import copy
import os
import re
import shutil
import signal
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import lightning.pytorch.callbacks
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
)
from torch import nn

from lightning_zero import ZeroCheckpoint, ZeroStrategy, get_fp32_state_dict_from_zero_checkpoint
from lightning_zero.checkpoint.resolution import resolve
from tests.launch import distributed, run_ranks
from tests.models import quiet_trainer
from tests.plugin.parity import Plain, assert_equals_ddp, assert_same_modules, fit

EMAWeightAveraging = getattr(lightning.pytorch.callbacks, "EMAWeightAveraging", None)
has_ema = pytest.mark.skipif(EMAWeightAveraging is None, reason="came with Lightning 2.6")


class Normed(Plain):
    """BatchNorm, whose statistics weight averaging has to renew, and a loss that is logged."""

    def __init__(self):
        super().__init__(torch.optim.SGD, momentum=0.9)
        self.norm = nn.BatchNorm1d(8)

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.norm(batch))
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self.norm(batch)), sync_dist=True)

    val_dataloader = Plain.train_dataloader


def tags(directory):
    return sorted(path.name for path in Path(directory).iterdir() if (path / "manifest.json").is_file())


@distributed(world_size=2, process_group=False)
def test_stochastic_weight_averaging_equals_ddp():
    assert_equals_ddp(Normed, callbacks=[lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1)], max_epochs=4)


@has_ema
@distributed(world_size=2, process_group=False)
def test_weight_averaging_with_decay_equals_ddp():
    assert_equals_ddp(Normed, callbacks=[lambda: EMAWeightAveraging(decay=0.9)], max_epochs=3)


class Masters(Callback):
    """Every parameter's whole master, when training starts and after the eleventh step."""

    def on_train_start(self, trainer, pl_module):
        self.at_start = [trainer.strategy.full_state(p)["param"].clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 11:
            self.at_11 = [trainer.strategy.full_state(p)["param"].clone() for p in pl_module.parameters()]


class Interrupt(Callback):
    """Ctrl+C, which the first rank hears first, after a step."""

    def __init__(self, after=5):
        self.after = after

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.after and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGINT)


@distributed(world_size=1, process_group=False)
def test_an_interrupt_of_a_rank_that_is_alone_stops_it_with_a_checkpoint(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    checkpoint = lambda: ZeroCheckpoint(tmp_path, every_n_train_steps=100)  # noqa: E731
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Normed, ZeroStrategy(), callbacks=[Interrupt, checkpoint])
    assert tags(tmp_path) == ["step=5.ckpt"]
    _, trainer = fit(Normed, ZeroStrategy(), callbacks=[checkpoint], ckpt_path="last")
    assert trainer.global_step == 32


@distributed(world_size=1, process_group=False)
def test_a_stop_saves_what_came_of_a_validation_though_the_step_before_it_is_saved(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    callbacks = [lambda: EarlyStopping("val_loss"), lambda: ZeroCheckpoint(tmp_path, every_n_train_steps=16)]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Normed, ZeroStrategy(), callbacks=[lambda: Interrupt(16), *callbacks])
    assert tags(tmp_path) == ["step=16.ckpt"]
    _, trainer = fit(Normed, ZeroStrategy(), callbacks=callbacks, max_epochs=1, ckpt_path="last")
    assert torch.isfinite(trainer.early_stopping_callback.best_score)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_interrupt_after_the_last_batch_leaves_a_checkpoint_too(tmp_path, world_size):
    run_ranks(interrupted_at_the_end, world_size, tmp_path, process_group=False)
    assert tags(tmp_path) == ["step=3.ckpt"]


def interrupted_at_the_end(directory):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    callbacks = [lambda: Interrupt(3), lambda: ZeroCheckpoint(directory, every_n_train_steps=100)]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Plain, ZeroStrategy(), callbacks=callbacks, max_steps=3)


@has_ema
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_checkpoint_holds_the_average_and_what_training_goes_on_from(tmp_path, precision):
    run_ranks(averaged, 2, tmp_path, precision, process_group=False)


def averaged(directory, precision):
    ema, before, after = lambda: EMAWeightAveraging(decay=0.9), Masters(), Masters()
    options = {"max_epochs": 3, "precision": precision}

    def saving(kind, name):
        return lambda: kind(directory / name, "{step}", every_n_train_steps=11, save_top_k=-1)

    fit(Normed, ZeroStrategy(), callbacks=[ema, saving(ZeroCheckpoint, "zero"), lambda: before], **options)
    tag = directory / "zero" / "step=11.ckpt"
    ours, _ = fit(Normed, ZeroStrategy(), callbacks=[ema, lambda: after], ckpt_path=tag, **options)
    assert all(torch.equal(a, b) for a, b in zip(before.at_11, after.at_start, strict=True))
    saved = get_fp32_state_dict_from_zero_checkpoint(tag)
    assert not torch.equal(saved["net.0.weight"], before.at_11[0])  # the average
    if precision == "32-true":
        theirs, _ = fit(Normed, "ddp", callbacks=[ema], **options)  # without a break
        theirs.losses = theirs.losses[-len(ours.losses) :]
        assert_same_modules(ours, theirs)


class BackAndForth(Callback):
    """Goes back by two steps, to what the module, its masters and its average were; a frozen layer isn't saved."""

    def __init__(self, directory, **options):
        self.directory, self.options = directory, options

    def on_train_batch_end(self, trainer, module, *_):
        (average,) = (c._average_model for c in trainer.callbacks if isinstance(c, EMAWeightAveraging))
        if trainer.global_step == 3:
            excluding = not self.options.get("load_module_strict", True)
            trainer.strategy.save_zero_checkpoint(self.directory, exclude_frozen_parameters=excluding)
            self.saved = copy.deepcopy([module.state_dict(), average.state_dict(), masters(trainer)])
        if trainer.global_step == 5:
            trainer.strategy.load_zero_checkpoint(self.directory, **self.options)
            # A frozen layer's average is its weight, but for a rounding; without states masters are what was rounded
            tolerance = {"rtol": 1e-2, "atol": 1e-3} if self.options else {"rtol": 0, "atol": 0}
            held = [module.state_dict(), average.state_dict(), masters(trainer)]
            torch.testing.assert_close(held, self.saved, **tolerance)


class PartlyFrozen(Plain):
    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad], **self.optimizer_options)


def masters(trainer):
    return [segment.master for segment in trainer.strategy.segments(trainer.optimizers[0])]


@has_ema
@distributed(world_size=2, process_group=False)
def test_what_is_loaded_in_mid_fit_is_the_average_and_what_training_goes_on_from(tmp_path):
    for precision in ("32-true", "bf16-true"):
        for options in ({}, {"load_optimizer_states": False}, {"load_module_strict": False}):
            back = BackAndForth(tmp_path / f"{precision} {options}", **options)
            callbacks = [lambda: EMAWeightAveraging(decay=0.9), lambda back=back: back]
            fit(PartlyFrozen, ZeroStrategy(), callbacks=callbacks, max_steps=6, precision=precision)


@distributed(world_size=2, process_group=False)
def test_pruning_equals_ddp_and_is_made_permanent_in_checkpoints(tmp_path):
    prune = lambda: ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.3)  # noqa: E731
    assert_equals_ddp(Plain, callbacks=[prune], max_epochs=3)
    _, trainer = fit(Plain, ZeroStrategy(), callbacks=[prune], max_epochs=2)
    trainer.save_checkpoint(tmp_path / "tag")
    state_dict = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "tag")
    assert "net.0.weight" in state_dict
    assert "net.0.weight_orig" not in state_dict
    assert (state_dict["net.0.weight"] == 0).sum() >= 0.3 * state_dict["net.0.weight"].numel()


@distributed(world_size=2, process_group=False)
def test_early_stopping_stops_where_it_does_under_ddp():
    stop = lambda: EarlyStopping("val_loss", patience=0, min_delta=0.05)  # noqa: E731
    theirs, a = fit(Normed, "ddp", callbacks=[stop], max_epochs=20)
    ours, b = fit(Normed, ZeroStrategy(), callbacks=[stop], max_epochs=20)
    assert a.global_step == b.global_step < 8 * 20
    assert_same_modules(ours, theirs)


@distributed(world_size=2, process_group=False)
def test_timer_and_progress_bar_and_summary_work():
    _, trainer = fit(
        Normed,
        ZeroStrategy(),
        callbacks=[lambda: Timer(timedelta(seconds=60)), RichProgressBar],
        enable_progress_bar=True,
        enable_model_summary=True,
    )
    assert trainer.global_step == 16
    _, trainer = fit(Normed, ZeroStrategy(), callbacks=[lambda: Timer(timedelta(seconds=0))])
    assert trainer.global_step < 2


# --- checkpoints ---


@distributed(world_size=2, process_group=False)
def test_top_k_by_a_monitor_keeps_the_best_directories(tmp_path):
    for kind in (ModelCheckpoint, ZeroCheckpoint):
        directory = tmp_path / kind.__name__
        make = lambda kind=kind, directory=directory: kind(  # noqa: E731
            directory, "{epoch}-{val_loss:.4f}", monitor="val_loss", mode="max", save_top_k=2, save_last=True
        )
        _, trainer = fit(Normed, ZeroStrategy(), callbacks=[make], max_epochs=5)
        best = {Path(path).name: float(score) for path, score in trainer.checkpoint_callback.best_k_models.items()}
        assert tags(directory) == sorted([*best, "last.ckpt"])
        assert all("epoch=0" in name or "epoch=1" in name for name in best)  # the loss falls, and the highest are kept
        assert Path(trainer.checkpoint_callback.best_model_path).name == max(best, key=best.get)
        quiet_trainer(world_size=2).validate(Normed(), ckpt_path=trainer.checkpoint_callback.best_model_path)


@distributed(world_size=2, process_group=False)
def test_save_last_as_a_link_is_followed_and_goes_with_the_newest(tmp_path):
    make = lambda: ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=1, save_last="link")  # noqa: E731
    _, trainer = fit(Normed, ZeroStrategy(), callbacks=[make])
    assert os.readlink(tmp_path / "last.ckpt") == "step=15.ckpt"
    assert (tmp_path / "latest").read_text() == "step=15.ckpt"
    _, trainer = fit(Normed, ZeroStrategy(), ckpt_path=tmp_path / "last.ckpt", max_epochs=3)
    assert trainer.global_step == 24


@distributed(world_size=2, process_group=False)
def test_save_last_takes_no_room_beside_what_it_is_a_copy_of_and_outlives_it(tmp_path):
    for behind in (False, True):
        directory = tmp_path / str(behind)
        make = lambda directory=directory, behind=behind: ZeroCheckpoint(  # noqa: E731
            directory, every_n_train_steps=3, keep_last=1, save_last=True, async_save=behind
        )
        fit(Normed, ZeroStrategy(), callbacks=[make], max_steps=15)  # before 2.6 Lightning saves a last one at 16
        assert tags(directory) == ["last.ckpt", "step=15.ckpt"]
        for name in os.listdir(directory / "last.ckpt"):
            assert os.path.samefile(directory / "last.ckpt" / name, directory / "step=15.ckpt" / name)
        assert (directory / "latest").read_text() == "step=15.ckpt"
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(directory / "step=15.ckpt")
        dist.barrier()
        _, trainer = fit(Normed, ZeroStrategy(), ckpt_path=directory / "last.ckpt", max_epochs=3)
        assert trainer.global_step == 24


@distributed(world_size=2, process_group=False)
def test_checkpoints_by_epoch_by_validation_and_by_time(tmp_path):
    modes = {
        "epoch": ({"save_on_train_epoch_end": True, "every_n_epochs": 2}, {}, ["step=16.ckpt", "step=32.ckpt"]),
        "validation": ({"save_top_k": -1}, {"val_check_interval": 0.5}, [f"step={4 * n}.ckpt" for n in range(1, 9)]),
        "time": ({"train_time_interval": timedelta(microseconds=1), "save_top_k": -1}, {"max_steps": 3}, None),
        "weights": ({"save_weights_only": True, "save_top_k": -1}, {"max_epochs": 1}, ["step=8.ckpt"]),
    }
    for name, (arguments, options, expected) in modes.items():
        make = lambda name=name, arguments=arguments: ZeroCheckpoint(  # noqa: E731
            tmp_path / name, **{"save_top_k": -1, **arguments}
        )
        fit(Normed, ZeroStrategy(), callbacks=[make], **{"max_epochs": 4, **options})
        found = tags(tmp_path / name)
        assert found == (sorted(expected) if expected else [f"step={n}.ckpt" for n in (1, 2, 3)]), name
    assert not (tmp_path / "weights" / "latest").exists()


def keeps(directory, kind):
    return {
        "all of some": lambda: ZeroCheckpoint(directory, every_n_train_steps=3, save_top_k=-1),
        "Lightning's": lambda: ModelCheckpoint(directory, "{step}", every_n_train_steps=3, save_top_k=-1),
        "by number": lambda: ZeroCheckpoint(directory, every_n_train_steps=3, keep_last=3),
        "for their step": lambda: ZeroCheckpoint(directory, every_n_train_steps=3, keep_last=1, keep_every_n_steps=3),
    }[kind]


@pytest.mark.parametrize("behind", [False, True])
@distributed(world_size=2, process_group=False)
def test_two_callbacks_keep_their_own_tags_in_one_directory_and_so_does_a_run_that_goes_on(tmp_path, behind):
    for kind in ("all of some", "Lightning's", "by number", "for their step"):
        for order in (1, -1):
            directory = tmp_path / f"{kind} {order}"
            last_two = lambda directory=directory: ZeroCheckpoint(  # noqa: E731
                directory, every_n_train_steps=2, keep_last=2, async_save=behind
            )
            make = [last_two, keeps(directory, kind)][::order]
            fit(Normed, ZeroStrategy(), callbacks=make, max_steps=10, max_epochs=-1)
            assert steps_in(directory) == {8, 10, 3, 6, 9}, (kind, order)
            fit(Normed, ZeroStrategy(), callbacks=make, max_steps=16, max_epochs=-1, ckpt_path="last")
            expected = {14, 16, 9, 12, 15} if kind == "by number" else {14, 16, 3, 6, 9, 12, 15}
            assert steps_in(directory) == expected, (kind, order)


@distributed(world_size=1, process_group=False)
def test_a_callback_that_is_set_otherwise_counts_what_it_has_saved_before(tmp_path):
    for every, steps in ((2, 6), (3, 15), (1, 18)):
        make = lambda every=every: ZeroCheckpoint(tmp_path, every_n_train_steps=every, keep_last=2)  # noqa: E731
        fit(Normed, ZeroStrategy(), callbacks=[make], max_steps=steps, max_epochs=-1, ckpt_path="last")
    assert steps_in(tmp_path) == {17, 18}


@distributed(world_size=1, process_group=False)
def test_what_lightnings_callback_no_longer_wants_stays_if_ours_does(tmp_path):
    make = [
        lambda: ZeroCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1),
        lambda: ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=1, enable_version_counter=False),
    ]
    fit(Normed, ZeroStrategy(), callbacks=make, max_steps=10, max_epochs=-1)
    assert steps_in(tmp_path) == {4, 8, 10}


@distributed(world_size=1, process_group=False)
def test_a_link_to_the_directory_names_the_same_tags(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    class ByHand(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "link" / "step=3.ckpt")

    make = [lambda: ZeroCheckpoint(tmp_path / "link", every_n_train_steps=2, keep_last=1), ByHand]
    fit(Normed, ZeroStrategy(), callbacks=make, max_steps=8)
    assert steps_in(tmp_path / "real") == {3, 8}


def steps_in(directory):
    return {int(re.match(r"step=(\d+)", name)[1]) for name in tags(directory)}


@distributed(world_size=1, process_group=False)
def test_what_a_user_saves_beside_a_callback_stays(tmp_path):
    class ByHand(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "step=3.ckpt")

    make = [lambda: ZeroCheckpoint(tmp_path, every_n_train_steps=2, keep_last=1), ByHand]
    fit(Normed, ZeroStrategy(), callbacks=make, max_steps=8)
    assert tags(tmp_path) == ["step=3.ckpt", "step=8.ckpt"]


@distributed(world_size=1, process_group=False)
def test_a_files_url_is_the_path_that_it_names(tmp_path):
    for name, options, root in (
        ("by callback", {"dirpath": f"file://{tmp_path}/by callback"}, None),
        ("by root/checkpoints", {}, f"file://{tmp_path}/by root"),
    ):
        make = lambda options=options: ZeroCheckpoint(**options, every_n_train_steps=2)  # noqa: E731
        fit(Normed, ZeroStrategy(), callbacks=[make], max_steps=2, default_root_dir=root)
        assert tags(tmp_path / name) == ["step=2.ckpt"]


class Steps(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *args):
        self.seen.append(trainer.global_step)


class Saves(Callback):
    """How many batches of the epoch had come, whenever something was saved."""

    def __init__(self):
        self.seen = []

    def on_save_checkpoint(self, trainer, *args):
        self.seen.append(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


@distributed(world_size=1, process_group=False)
def test_no_checkpoint_lacks_what_a_window_of_batches_has_accumulated(tmp_path):
    saves = Saves()
    by_step = lambda: ZeroCheckpoint(tmp_path, every_n_train_steps=1)  # noqa: E731
    by_time = lambda: ZeroCheckpoint(tmp_path / "b", train_time_interval=timedelta(microseconds=1))  # noqa: E731
    options = {"callbacks": [lambda: saves, by_step, by_time], "accumulate_grad_batches": 2}
    fit(Normed, ZeroStrategy(), max_steps=1, **options)
    fit(Normed, ZeroStrategy(), max_steps=2, ckpt_path="last", **options)
    assert saves.seen == [2, 2, 4, 4]


@distributed(world_size=2, process_group=False)
def test_signals_have_their_handlers_back_after_a_fit():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    for _ in range(2):
        fit(Normed, ZeroStrategy(), max_steps=1)
        assert before == {number: signal.getsignal(number) for number in before}


class Breaks(Callback):
    """An error on some ranks."""

    def __init__(self, *ranks):
        self.ranks = ranks

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 5 and trainer.global_rank in self.ranks:
            raise RuntimeError("something broke")


class BreaksOff(torch.optim.SGD):
    """An error in the middle of the fifth step."""

    steps = 0

    def step(self, closure=None):
        loss = super().step(closure)
        self.steps += 1
        if self.steps == 5:
            raise RuntimeError("something broke")
        return loss


@distributed(world_size=2, process_group=False)
def test_an_exception_on_every_rank_saves_what_all_have(tmp_path):
    make = lambda: OnExceptionCheckpoint(tmp_path)  # noqa: E731
    with pytest.raises(RuntimeError, match="something broke"):
        fit(Normed, ZeroStrategy(), callbacks=[make, lambda: Breaks(0, 1)])
    assert tags(tmp_path) == ["on_exception.ckpt"]
    steps = Steps()
    fit(Normed, ZeroStrategy(), callbacks=[make, lambda: steps], ckpt_path="last")
    assert steps.seen == list(range(5, 16))


@distributed(world_size=2, process_group=False)
def test_an_exception_is_saved_after_another_fits_too(tmp_path):
    for name in ("first", "second"):
        make = lambda name=name: OnExceptionCheckpoint(tmp_path / name)  # noqa: E731
        with pytest.raises(RuntimeError, match="something broke"):
            fit(Normed, ZeroStrategy(), callbacks=[make, lambda: Breaks(0, 1)])
        assert tags(tmp_path / name) == ["on_exception.ckpt"]


@distributed(world_size=1, process_group=False)
def test_saving_on_exception_works_under_other_strategies_too(tmp_path):
    for name, strategy in (("ddp", "ddp"), ("zero", ZeroStrategy())):
        make = lambda name=name: ZeroCheckpoint(tmp_path / name, every_n_train_steps=100, save_on_exception=True)  # noqa: E731
        with pytest.raises(RuntimeError, match="something broke"):
            fit(Normed, strategy, callbacks=[make, lambda: Breaks(0)])
        assert (tmp_path / name / "step=5.ckpt").exists()


def break_on_one_rank(directory):
    import lightning_zero.plugin.ranks as ranks

    ranks._ARRIVAL_SECONDS = 1
    callbacks = [lambda: ZeroCheckpoint(directory, every_n_train_steps=2), lambda: OnExceptionCheckpoint(directory)]
    with pytest.raises(Exception, match=r"\w"):  # what rank 0 gets depends on where it waits for rank 1
        fit(Normed, ZeroStrategy(timeout=timedelta(seconds=5)), callbacks=[*callbacks, lambda: Breaks(1)])
    assert tags(directory) == ["step=4.ckpt"]


def test_an_exception_on_one_rank_saves_nothing_and_leaves_latest(tmp_path):
    run_ranks(break_on_one_rank, 2, tmp_path, process_group=False)
    assert (tmp_path / "latest").read_text() == "step=4.ckpt"
    assert resolve(tmp_path).name == "step=4.ckpt"


@distributed(world_size=2, process_group=False)
def test_a_step_that_was_broken_off_is_not_saved(tmp_path):
    warned = pytest.warns(match="a step of the optimizer was broken off")
    with pytest.raises(RuntimeError, match="something broke"), warned:
        fit(lambda: Plain(BreaksOff), ZeroStrategy(), callbacks=[lambda: OnExceptionCheckpoint(tmp_path)])
    assert tags(tmp_path) == []


@distributed(world_size=2, process_group=False)
def test_last_resumes_from_ddps_own_last_and_never_passes_its_files_by_in_silence(tmp_path):
    save = lambda: ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_last=True)  # noqa: E731
    fit(Normed, "ddp", callbacks=[save], max_steps=3)
    zero = lambda: ZeroCheckpoint(tmp_path, "zero-{step}", every_n_train_steps=100)  # noqa: E731
    steps = Steps()
    fit(Normed, ZeroStrategy(), callbacks=[zero, lambda: steps], max_steps=6, ckpt_path="last")
    assert steps.seen == [3, 4, 5]
    (tmp_path / "last.ckpt").unlink(missing_ok=True)
    dist.barrier()
    warned = pytest.warns(match="holds checkpoints of another strategy") if dist.get_rank() == 0 else nullcontext()
    with warned:
        fit(Normed, ZeroStrategy(), callbacks=[zero], max_steps=1, ckpt_path="last")
