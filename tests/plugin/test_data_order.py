"""A resumed run sees the batches, and draws the numbers, that the uninterrupted one does: whatever its loaders."""

import dataclasses
import os
import pickle
import random
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_zero import ZeroCheckpoint, ZeroStrategy
from tests.launch import distributed
from tests.models import quiet_trainer

ROWS = TensorDataset(torch.arange(24.0))


def generator():
    return torch.Generator().manual_seed(1)


class Shuffled(Sampler):
    """Somebody's own, which draws from Python's random numbers."""

    def __iter__(self):
        order = list(range(len(ROWS)))
        random.shuffle(order)
        yield from order

    def __len__(self):
        return len(ROWS)


class InPairs(BatchSampler):
    """Batches of neighbours, in an order of its own."""

    def __iter__(self):
        yield from ([int(first), int(first) + 1] for first in 2 * torch.randperm(len(self)))

    def __len__(self):
        return len(ROWS) // 2


@dataclasses.dataclass(frozen=True)
class PieceByPiece(Sampler):
    """Which draws each from torch's random numbers, and lets nobody set anything."""

    def __iter__(self):
        yield from (int(torch.randint(len(ROWS), ())) for _ in range(len(ROWS)))

    def __len__(self):
        return len(ROWS)

    __hash__ = None


class Unsized(Sampler):
    """Which doesn't say how many there are."""

    def __iter__(self):
        yield from torch.randperm(len(ROWS)).tolist()


class Consumed(Sampler):
    """Which goes on by itself."""

    def __init__(self):
        self.consumed = 0

    def __iter__(self):
        yield from range(self.consumed, len(ROWS))

    def __len__(self):
        return len(ROWS)


LOADERS = {
    "shuffled": lambda: DataLoader(ROWS, batch_size=4, shuffle=True),
    "with a generator": lambda: DataLoader(ROWS, batch_size=4, shuffle=True, generator=generator()),
    "with a worker": lambda: DataLoader(ROWS, batch_size=4, shuffle=True, num_workers=1),
    "two of them": lambda: CombinedLoader(
        {"a": DataLoader(ROWS, batch_size=4, shuffle=True), "b": DataLoader(ROWS, batch_size=10, shuffle=True)},
        "max_size_cycle",
    ),
    "with a state": lambda: StatefulDataLoader(ROWS, batch_size=4, shuffle=True),
    "with a state and a generator": lambda: StatefulDataLoader(ROWS, batch_size=4, shuffle=True, generator=generator()),
}
OF_ONE_RANK = {
    "random": lambda: DataLoader(ROWS, batch_size=4, sampler=RandomSampler(ROWS)),
    "with replacement": lambda: DataLoader(ROWS, batch_size=4, sampler=RandomSampler(ROWS, replacement=True)),
    "weighted": lambda: DataLoader(ROWS, batch_size=4, sampler=WeightedRandomSampler([1.0] * 24, 24)),
    "of a sampler's generator": lambda: DataLoader(
        ROWS, batch_size=4, sampler=RandomSampler(ROWS, generator=generator())
    ),
    "of Python's random": lambda: DataLoader(ROWS, batch_size=4, sampler=Shuffled()),
    "with replacement, of a generator": lambda: DataLoader(
        ROWS, batch_size=8, sampler=RandomSampler(ROWS, replacement=True, generator=generator())
    ),
    "piece by piece": lambda: DataLoader(ROWS, batch_size=4, sampler=PieceByPiece()),
    "listed": lambda: DataLoader(ROWS, batch_sampler=[[row, 23 - row] for row in range(12)]),
    "one shorter": lambda: CombinedLoader(
        {"a": DataLoader(ROWS, batch_size=4), "b": DataLoader(ROWS, batch_size=12, shuffle=True)}, "max_size"
    ),
    "of one's own batches": lambda: DataLoader(ROWS, batch_sampler=InPairs(RandomSampler(ROWS), 2, False)),
}


class Watched(LightningModule):
    def __init__(self, estimates):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.estimates = estimates
        self.seen = []

    def training_step(self, batch, batch_idx):
        parts = batch.values() if isinstance(batch, dict) else [batch]
        rows = [None if part is None else part[0].tolist() for part in parts]
        self.seen.append((self.current_epoch, batch_idx, rows, torch.rand(1).item()))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        if self.estimates:
            assert self.trainer.estimated_stepping_batches  # makes the loaders before a checkpoint's loops are there
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(make, world_size, *, ckpt_path=None, validate=False, save_after=None, estimates=False, **options):
    seed_everything(7, verbose=False)
    module = Watched(estimates)
    trainer = quiet_trainer(ZeroStrategy(), world_size=world_size, max_epochs=3, **options)
    trainer.fit(module, make(), *([DataLoader(ROWS, batch_size=8)] if validate else []), ckpt_path=ckpt_path)
    if save_after is not None:
        trainer.save_checkpoint(save_after)
    return module.seen


def cut(make, world_size, directory, steps, **options):
    """Train to a step, and save there."""
    callback = ZeroCheckpoint(directory, every_n_train_steps=steps)
    return fit(make, world_size, max_steps=steps, callbacks=[callback], **options)


def go_on_exactly(directory, world_size, kinds, **more):
    for name, make in kinds.items():
        for validate in (False, True):
            options = {"validate": validate, **more}
            whole = fit(make, world_size, **options)
            epoch = len(whole) // 3
            steps = epoch if validate else epoch // 2  # at an epoch's last batch, before it is validated
            path = directory / f"{name} {validate}"
            before = cut(make, world_size, path, steps, **options)
            after = fit(make, world_size, ckpt_path=path, **options)
            assert before + after == whole, (name, steps)


@distributed(world_size=1, process_group=False)
def test_one_rank_goes_on_with_the_next_batch(tmp_path):
    go_on_exactly(tmp_path, 1, LOADERS)
    go_on_exactly(tmp_path, 1, OF_ONE_RANK, use_distributed_sampler=False)


@distributed(world_size=2, process_group=False)
def test_two_ranks_go_on_with_the_next_batch(tmp_path):
    go_on_exactly(tmp_path, 2, {name: make for name, make in LOADERS.items() if name != "with a worker"})


@distributed(world_size=1, process_group=False)
def test_what_was_saved_at_the_end_of_a_validation_or_in_a_first_batch_goes_on_too(tmp_path):
    make, whole = LOADERS["with a generator"], fit(LOADERS["with a generator"], 1, validate=True)
    callback = ZeroCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=False, save_top_k=-1)
    assert fit(make, 1, validate=True, callbacks=[callback]) == whole
    assert fit(make, 1, validate=True, ckpt_path=tmp_path / "epoch=0.ckpt") == whole[len(whole) // 3 :]

    class InTheFirst(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 0:
                trainer.save_checkpoint(tmp_path / "first")

    assert fit(make, 1, callbacks=[InTheFirst()]) == fit(make, 1, ckpt_path=tmp_path / "first")


@distributed(world_size=1, process_group=False)
def test_what_was_saved_after_an_epoch_that_a_hook_ended_goes_on_with_the_next_batch(tmp_path):
    def ends_the_first_epoch(module, batch, batch_idx):
        return -1 if (module.current_epoch, batch_idx) == (0, 4) else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watched, "on_train_batch_start", ends_the_first_epoch)
        whole = fit(LOADERS["shuffled"], 1)
        before = cut(LOADERS["shuffled"], 1, tmp_path, 6)
        assert before + fit(LOADERS["shuffled"], 1, ckpt_path=tmp_path) == whole


@distributed(world_size=2, process_group=False)
def test_what_was_saved_before_an_epochs_last_batch_was_trained_on_goes_on_with_it(tmp_path):
    make, whole = LOADERS["shuffled"], fit(LOADERS["shuffled"], 2)
    last = len(whole) // 3 - 1

    class InTheLast(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == last:
                trainer.save_checkpoint(tmp_path / "last")

    assert fit(make, 2, callbacks=[InTheLast()]) == whole
    assert fit(make, 2, ckpt_path=tmp_path / "last") == whole[last:]


@distributed(world_size=1, process_group=False)
def test_a_loader_is_its_owners_when_the_fit_is_over_and_a_copy_of_it_at_any_time(tmp_path):
    loader = LOADERS["shuffled"]()
    copied = []
    copy = LambdaCallback(on_train_batch_end=lambda *_: copied.append(pickle.loads(pickle.dumps(loader))))
    options = {"use_distributed_sampler": False, "callbacks": [copy]}
    cut(lambda: loader, 1, tmp_path, 2, use_distributed_sampler=False)
    assert fit(lambda: loader, 1, ckpt_path=tmp_path, max_steps=2, **options) == []
    assert len(fit(lambda: loader, 1, max_steps=2, **options)) == 2
    for each in (loader, *copied):
        assert type(each.batch_sampler) is BatchSampler
        assert sorted(row for (batch,) in each for row in batch.tolist()) == [*range(24)]


@distributed(world_size=1, process_group=False)
def test_what_is_set_on_a_loaders_batch_sampler_in_mid_fit_is_set():
    class Larger(Callback):
        def on_train_epoch_start(self, trainer, module):
            sampler = trainer.train_dataloader.batch_sampler
            assert isinstance(sampler, BatchSampler)
            sampler.batch_size = 4 * (trainer.current_epoch + 1)

    seen = fit(lambda: DataLoader(ROWS, batch_size=4), 1, callbacks=[Larger()])
    assert [[len(rows[0]) for epoch, _, rows, _ in seen if epoch == each] for each in range(3)] == [
        [4] * 6,
        [8] * 3,
        [12] * 2,
    ]


@distributed(world_size=1, process_group=False)
def test_what_was_saved_at_an_epochs_last_batch_goes_on_whether_a_validation_comes_then_or_not(tmp_path):
    make = LOADERS["shuffled"]
    for often in ({"check_val_every_n_epoch": 2}, {"val_check_interval": 4}):
        whole = fit(make, 1, validate=True, **often)
        for steps in (6, 12):
            path = tmp_path / f"{often} {steps}"
            before = cut(make, 1, path, steps, validate=True, **often)
            assert before + fit(make, 1, ckpt_path=path, validate=True, **often) == whole, (often, steps)


@distributed(world_size=1, process_group=False)
def test_what_was_saved_before_a_validation_of_several_loaders_goes_on_too(tmp_path):
    class Validated(LightningDataModule):
        def train_dataloader(self):
            return LOADERS["shuffled"]()

        def val_dataloader(self):
            return [DataLoader(ROWS, batch_size=8), DataLoader(ROWS, batch_size=12)]

    whole = fit(Validated, 1)
    assert cut(Validated, 1, tmp_path, 6) + fit(Validated, 1, ckpt_path=tmp_path) == whole


@distributed(world_size=2, process_group=False)
def test_loaders_that_are_loaded_again_with_each_epoch_go_on_too(tmp_path):
    make = LOADERS["with a worker"]
    options = {"validate": True, "reload_dataloaders_every_n_epochs": 1}
    whole = fit(make, 2, **options)
    assert cut(make, 2, tmp_path, 3, **options) + fit(make, 2, ckpt_path=tmp_path, **options) == whole


@distributed(world_size=2, process_group=False)
def test_a_loader_that_is_loaded_again_keeps_its_distributed_sampler():
    loader = DataLoader(ROWS, batch_size=None, sampler=DistributedSampler(ROWS, 2, int(os.environ["RANK"])))
    seen = fit(lambda: loader, 2, reload_dataloaders_every_n_epochs=1)
    assert len(seen) == 3 * len(ROWS) // 2


@distributed(world_size=1, process_group=False)
def test_a_sampler_that_goes_on_by_itself_is_left_to_it(tmp_path):
    options = {"use_distributed_sampler": False}
    sampler = Consumed()
    whole = fit(lambda: DataLoader(ROWS, batch_size=4, sampler=sampler), 1, **options)
    cut(lambda: DataLoader(ROWS, batch_size=4, sampler=sampler), 1, tmp_path, 2, **options)
    sampler.consumed = 8
    after = fit(lambda: DataLoader(ROWS, batch_size=4, sampler=sampler), 1, ckpt_path=tmp_path, max_steps=4, **options)
    assert [rows for _, _, rows, _ in after] == [rows for _, _, rows, _ in whole[2:4]]


@distributed(world_size=1, process_group=False)
def test_a_fit_that_max_steps_has_ended_goes_on_with_the_next_batch(tmp_path):
    """Lightning counts its epoch as over; of a loader with a state it has lost that state when the fit is over."""
    for name, make in LOADERS.items():
        whole = fit(make, 1)
        at_the_end = ZeroCheckpoint(tmp_path / name, save_on_train_epoch_end=True)
        before = fit(make, 1, max_steps=2, callbacks=[at_the_end], save_after=tmp_path / f"{name} after")
        for where in (name, f"{name} after"):
            for options in {}, {"max_steps": len(whole)}:
                if not ("state" in name and "after" in where):
                    assert before + fit(make, 1, ckpt_path=tmp_path / where, **options) == whole, (where, options)


@distributed(world_size=2, process_group=False)
def test_an_epoch_that_was_saved_at_its_end_is_over_where_steps_are_counted_too(tmp_path):
    for name, make in {name: make for name, make in LOADERS.items() if name != "with a worker"}.items():
        whole = fit(make, 2)
        callback = ZeroCheckpoint(tmp_path / name, "{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
        fit(make, 2, max_steps=len(whole), callbacks=[callback])
        for options in {}, {"max_steps": len(whole)}:
            after = fit(make, 2, ckpt_path=tmp_path / name / "epoch=0.ckpt", **options)
            assert after == whole[len(whole) // 3 :], (name, options)


@distributed(world_size=1, process_group=False)
def test_loaders_that_an_optimizers_schedule_has_asked_for_go_on_too(tmp_path):
    kinds = ("shuffled", "with a generator", "with a state", "with a state and a generator")
    go_on_exactly(tmp_path, 1, {name: LOADERS[name] for name in kinds}, estimates=True)


@distributed(world_size=1, process_group=False)
def test_a_sampler_of_no_length_goes_on_too(tmp_path):
    make, options = lambda: DataLoader(ROWS, batch_size=4, sampler=Unsized()), {"use_distributed_sampler": False}
    before = cut(make, 1, tmp_path, 2, **options)
    assert before + fit(make, 1, ckpt_path=tmp_path, **options) == fit(make, 1, **options)


@distributed(world_size=1, process_group=False)
def test_nothing_is_warned_of_where_the_data_goes_on(tmp_path):
    make = LOADERS["shuffled"]
    larger = lambda: DataLoader(ROWS, batch_size=6, shuffle=True)  # noqa: E731
    # Within an epoch; and after one, where the next has another number of batches, as on another number of ranks
    for steps, then in ((2, make), (6, larger)):
        cut(make, 1, tmp_path / str(steps), steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(then, 1, ckpt_path=tmp_path / str(steps))
        assert not [warning for warning in caught if "not resumable" in str(warning.message)]
