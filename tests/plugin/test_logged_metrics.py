"""What was logged goes on with the run: averages over the whole epoch, and everything that is decided by them."""

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers.logger import Logger

from lightning_zero import ZeroCheckpoint, ZeroStrategy
from tests.launch import run_ranks
from tests.models import Data, Model, Rows, quiet_trainer


class Logging(Model):
    """Logs in every way, and lets a learning rate follow the epoch's average."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("agreed", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=batch_idx + 1)
        self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("batches", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def on_train_batch_start(self, batch, batch_idx):
        self.log("early", float(batch_idx), on_step=False, on_epoch=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.05)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "agreed"}}


class Seen(Callback):
    """What a callback finds, at every batch and at the epochs' ends."""

    def __init__(self):
        self.batches, self.epochs = [], []

    @staticmethod
    def _of(trainer):
        return {key: float(value) for key, value in trainer.callback_metrics.items()}

    def on_train_batch_end(self, trainer, *args):
        self.batches.append(self._of(trainer))

    def on_train_epoch_end(self, trainer, pl_module):
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.epochs.append({**self._of(trainer), "lr": lr})


def run(ckpt_path=None, callbacks=(), module=None, data=Data, **options):
    seed_everything(3, verbose=False)
    model, seen = module or Logging(), Seen()
    trainer = quiet_trainer(
        ZeroStrategy(), world_size=int(options.pop("world_size")), callbacks=[seen, *callbacks], max_epochs=4, **options
    )
    trainer.fit(model, datamodule=data(), ckpt_path=ckpt_path)
    return model, seen


def goes_on(directory, world_size):
    whole, expected = run(world_size=world_size)
    epoch = len(expected.batches) // 4
    for steps in (epoch // 2, epoch + 1, 2 * epoch - 1):
        path = directory / str(steps)
        run(world_size=world_size, callbacks=[ZeroCheckpoint(path, every_n_train_steps=steps)], max_steps=steps)
        model, seen = run(path, world_size=world_size)
        assert seen.batches == expected.batches[steps:], steps
        assert seen.epochs == expected.epochs[steps // epoch :], steps
        assert model.losses == whole.losses[steps:]


@pytest.mark.parametrize("world_size", [1, 2])
def test_averages_of_a_resumed_epoch_are_those_of_all_of_it(tmp_path, world_size):
    run_ranks(goes_on, world_size, tmp_path, world_size, process_group=False)


def monitored(directory):
    best = lambda: ModelCheckpoint(directory / "best", monitor="val_loss", every_n_train_steps=3)  # noqa: E731
    run(callbacks=[ZeroCheckpoint(directory / "cut", every_n_train_steps=20), best()], max_steps=20, world_size=1)
    _, seen = run(directory / "cut", callbacks=[best()], world_size=1)
    assert "val_loss" in seen.batches[0]


def test_what_is_monitored_is_there_before_it_is_logged_again(tmp_path):
    run_ranks(monitored, 1, tmp_path, process_group=False)


class Seldom(Logging):
    """Logs something with the first batch of an epoch alone."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 0:
            self.log("first", float(self.current_epoch), on_step=False, on_epoch=True)


def logged_before(directory):
    run(callbacks=[ZeroCheckpoint(directory, every_n_train_steps=3)], max_steps=3, world_size=1, module=Seldom())
    _, seen = run(directory, world_size=1, module=Seldom())
    assert [epoch["first"] for epoch in seen.epochs[1:]] == [1, 2, 3]


def test_what_was_logged_before_and_not_again_in_its_epoch_is_no_part_of_the_next_ones(tmp_path):
    run_ranks(logged_before, 1, tmp_path, process_group=False)


class Steps(Logger):
    """The steps that losses are logged at."""

    name, version = "steps", 0

    def __init__(self):
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged += [step] if "loss_step" in metrics else []

    def log_hyperparams(self, *args, **kwargs):
        pass


class ByStep(Logging):
    """Lets the learning rate follow each second step."""

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        configured["lr_scheduler"] |= {"monitor": "loss_step", "interval": "step", "frequency": 2}
        return configured


class Stateless(Data):
    """Whose loader hasn't given away the batch that failed."""

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Rows(), batch_size=4, shuffle=True)


class Failing(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError


def stopped(directory):
    options = {"data": Stateless, "world_size": 1, "log_every_n_steps": 1}
    options |= {"limit_train_batches": 6, "val_check_interval": 3}
    logger = Steps()
    whole, seen = run(module=ByStep(), logger=logger, **options)
    rates = [epoch["lr"] for epoch in seen.epochs]
    epoch = 6
    for step in (2, 3, 5, 6):  # in the middle, behind a validation, before and in a first batch
        with pytest.raises(RuntimeError):
            run(callbacks=[Failing(step), OnExceptionCheckpoint(directory, f"{step}")], module=ByStep(), **options)
        logger = Steps()
        model, seen = run(directory / f"{step}.ckpt", module=ByStep(), logger=logger, **options)
        assert logger.logged == [*range(step, 4 * epoch)], step
        assert [each["lr"] for each in seen.epochs] == rates[step // epoch :], step
        assert model.losses == whole.losses[step:]


def test_what_was_stopped_between_two_batches_logs_at_the_same_steps_and_steps_no_scheduler_twice(tmp_path):
    run_ranks(stopped, 1, tmp_path, process_group=False)
