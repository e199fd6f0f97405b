"""A resumed run sees the batches, and draws the numbers, that the uninterrupted one does: whatever its loaders."""

import random
import warnings

import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, TensorDataset, WeightedRandomSampler
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
    "of one's own batches": lambda: DataLoader(ROWS, batch_sampler=InPairs(RandomSampler(ROWS), 2, False)),
}


class Watched(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        rows = [part[0].tolist() for part in batch.values()] if isinstance(batch, dict) else batch[0].tolist()
        self.seen.append((self.current_epoch, batch_idx, rows, torch.rand(1).item()))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(make, world_size, *, ckpt_path=None, validate=False, save_after=None, **options):
    seed_everything(7, verbose=False)
    module = Watched()
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
def test_a_fit_that_max_steps_has_ended_goes_on_with_the_next_batch(tmp_path):
    """Lightning counts its epoch as over, and goes on in the middle of the next one."""
    make = LOADERS["shuffled"]
    whole = fit(make, 1)
    before = fit(make, 1, max_steps=2, save_after=tmp_path / "tag")
    after = fit(make, 1, ckpt_path=tmp_path / "tag")
    rest = len(whole) // 3 - len(before)
    assert [rows for _, _, rows, _ in after[:rest]] == [rows for _, _, rows, _ in whole[2 : 2 + rest]]


@distributed(world_size=1, process_group=False)
def test_nothing_is_warned_of_where_the_data_goes_on(tmp_path):
    make = LOADERS["shuffled"]
    cut(make, 1, tmp_path, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make, 1, ckpt_path=tmp_path)
    assert not [warning for warning in caught if "not resumable" in str(warning.message)]
