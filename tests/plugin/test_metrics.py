"""torchmetrics in a module: the same results as under DDP, and whole ones after a resume in the middle of an epoch."""

import pytest
import torch
import torchmetrics
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_zero import ZeroCheckpoint, ZeroStrategy
from tests.launch import distributed, run_ranks
from tests.models import Rows
from tests.plugin.parity import Plain, assert_same_modules, fit


class Measured(Plain):
    """Metrics of sums, lists and extremes; logged as objects and computed by hand; in training and in validation."""

    def __init__(self):
        super().__init__(torch.optim.SGD)
        self.error = torchmetrics.MeanSquaredError()
        self.values = torchmetrics.CatMetric()
        self.largest = torchmetrics.MaxMetric()
        self.val_error = torchmetrics.MeanSquaredError()
        self.both = torchmetrics.MetricCollection(
            [torchmetrics.MeanAbsoluteError(), torchmetrics.R2Score(multioutput="uniform_average")]
        )
        self.whole_run = torchmetrics.SumMetric()
        self.kept = torchmetrics.SumMetric()
        self.kept.persistent(True)
        self.results = []

    def training_step(self, batch, batch_idx):
        out = self.net(batch)
        self.error.update(out, batch)
        self.values.update(out.detach().mean())
        self.largest.update(out.detach())
        self.both.update(out.detach().reshape(-1), batch.reshape(-1))
        self.whole_run.update(batch.sum())
        self.kept.update(batch.mean())
        self.log("error", self.error, on_step=False, on_epoch=True)
        return self.loss(batch)

    def on_train_epoch_end(self):
        computed = self.both.compute()
        self.results.append(
            {
                "values": self.values.compute().sort().values,
                "largest": self.largest.compute(),
                "whole_run": self.whole_run.compute(),
                "kept": self.kept.compute(),
                **computed,
            }
        )
        for metric in (self.values, self.largest, self.both):
            metric.reset()

    def on_train_end(self):
        self.results.append({"error": self.trainer.callback_metrics["error"]})

    def validation_step(self, batch, batch_idx):
        self.val_error.update(self.net(batch), batch)
        self.log("val_error", self.val_error)

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.results.append({"val_error": self.val_error.compute()})

    def train_dataloader(self):
        return StatefulDataLoader(Rows(), batch_size=4)

    val_dataloader = Plain.train_dataloader


def assert_same_results(ours, theirs, **tolerance):
    assert len(ours) == len(theirs) > 0
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.keys() == its.keys()
        for key in mine:
            torch.testing.assert_close(mine[key], its[key], **tolerance, msg=lambda text, key=key: f"{key}: {text}")


@distributed(world_size=2, process_group=False)
def test_synchronised_results_equal_ddps():
    theirs, _ = fit(Measured, "ddp")
    ours, _ = fit(Measured, ZeroStrategy())
    assert_same_modules(ours, theirs)
    assert_same_results(ours.results, theirs.results, rtol=0, atol=0)


def measure(directory, cut=None, world_size=None, **options):
    """A whole run, which saves at every step; or one that goes on from a step."""
    if cut is None:
        save = lambda: ZeroCheckpoint(directory, every_n_train_steps=1, save_top_k=-1)  # noqa: E731
        ours, _ = fit(Measured, ZeroStrategy(), callbacks=[save], **options)
    else:
        ours, _ = fit(Measured, ZeroStrategy(), ckpt_path=directory / f"step={cut}.ckpt", **options)
    return ours.results, ours.state_dict()


@pytest.mark.parametrize("val_check_interval", [1.0, 0.25])
def test_an_epochs_result_is_whole_after_a_resume_at_any_step(tmp_path, val_check_interval):
    options = {"process_group": False, "val_check_interval": val_check_interval, "max_epochs": 2}
    whole = run_ranks(measure, 2, tmp_path, **options)
    for cut in (1, 4, 7, 8, 11):
        resumed = run_ranks(measure, 2, tmp_path, cut, **options)
        for (results, state), (expected, expected_state) in zip(resumed, whole, strict=True):
            lost = {"whole_run"} if cut == 8 else set()  # saved with an epoch's last batch: what persists is kept
            results, expected = ([{k: r[k] for k in r.keys() - lost} for r in rs] for rs in (results, expected))
            assert_same_results(results, expected[-len(results) :], rtol=0, atol=0)
            assert all(torch.equal(state[name], expected_state[name]) for name in state)


def test_metrics_are_merged_on_fewer_ranks_and_start_empty_on_more(tmp_path):
    options = {"process_group": False, "max_epochs": 1, "limit_val_batches": 0}
    run_ranks(measure, 2, tmp_path, **options)
    saved = run_ranks(states, 2, tmp_path, **options)
    for world_size in (1, 3):
        merged = run_ranks(states, world_size, tmp_path, **options)
        for key in ("error", "whole_run", "kept"):
            torch.testing.assert_close(sum(rank[key] for rank in merged), sum(rank[key] for rank in saved))
        assert max(rank["largest"] for rank in merged) == max(rank["largest"] for rank in saved)
        values = [value for rank in merged for value in rank["values"]]
        assert sorted(values) == sorted(value for rank in saved for value in rank["values"])


class Halted(Measured):
    """What the metrics hold when training goes on."""

    def on_train_epoch_end(self):
        pass

    def on_train_start(self):
        self.held = {
            "error": self.error.sum_squared_error.clone(),
            "whole_run": self.whole_run.sum_value.clone(),
            "kept": self.kept.sum_value.clone(),
            "largest": self.largest.max_value.clone(),
            "values": [float(value) for values in self.values.value for value in values.reshape(-1)],
        }


def states(directory, **options):
    ours, _ = fit(Halted, ZeroStrategy(), ckpt_path=directory / "step=5.ckpt", **{**options, "max_steps": 6})
    return ours.held


class Listed(Plain):
    """Metrics that keep lists: of numbers; of rows, and of integers."""

    def __init__(self, length=64):
        super().__init__(torch.optim.SGD)
        self.length, self.batches = length, []
        self.numbers = torchmetrics.CatMetric()
        self.ranking = torchmetrics.AUROC(task="multiclass", num_classes=3)

    def measure(self, batch):
        self.numbers.update(batch.mean())
        self.ranking.update(batch[:, :3].softmax(-1), batch[:, 3:6].argmax(-1))

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        self.measure(batch)
        return self.loss(batch)

    def on_train_epoch_end(self):
        self.computed = {"numbers": self.numbers.compute().reshape(-1), "ranking": self.ranking.compute()}

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Rows(self.length), batch_size=4)


def computed_at_the_epochs_end(directory, length, cut=None):
    """Of a whole epoch, which saves at every step; or of one that goes on from a step."""
    path = None if cut is None else directory / f"step={cut}.ckpt"
    callbacks = [] if cut else [lambda: ZeroCheckpoint(directory, every_n_train_steps=1, save_top_k=-1)]
    ours, _ = fit(lambda: Listed(length), ZeroStrategy(), callbacks=callbacks, ckpt_path=path, max_epochs=1)
    return ours.batches, ours.computed


def test_lists_are_gathered_on_more_ranks_though_these_see_no_batch_of_the_epoch(tmp_path):
    for cut in (1, 8):
        length, directory = 8 * cut, tmp_path / str(cut)
        [(batches, _)] = run_ranks(computed_at_the_epochs_end, 1, directory, length, process_group=False)
        expected = Listed()
        for batch in batches[:cut]:
            expected.measure(batch)
        for batches, computed in run_ranks(computed_at_the_epochs_end, 2, directory, length, cut, process_group=False):
            assert not batches
            torch.testing.assert_close(computed["numbers"], expected.numbers.compute().reshape(-1))
            torch.testing.assert_close(computed["ranking"], expected.ranking.compute())


class Averaged(Plain):
    """A metric whose ranks' states are averaged: it can't be put together from parts."""

    def __init__(self):
        super().__init__(torch.optim.SGD)
        self.metric = torchmetrics.MeanMetric()
        self.metric._reductions = dict.fromkeys(self.metric._reductions, torch.mean)
        self.other = nn.Identity()

    def training_step(self, batch, batch_idx):
        self.metric.update(batch.mean())
        return self.loss(batch)


@distributed(world_size=1, process_group=False)
def test_a_metric_that_cannot_be_merged_is_named():
    from lightning_zero.plugin.metric_state import get_metric_states, set_metric_states

    module = Averaged()
    module.metric.update(torch.ones(3))
    saved = get_metric_states(module)
    with pytest.warns(UserWarning, match="MeanMetric 'metric' can't be merged"):
        set_metric_states(module, [saved, saved], saved)
    assert module.metric.update_count == 1


class Wrapped(Plain):
    """Metrics that wrap or combine others, and states that are no tensors."""

    def __init__(self):
        super().__init__(torch.optim.SGD)
        self.sum = torchmetrics.SumMetric()
        self.best = torchmetrics.MinMaxMetric(self.sum)
        self.both = self.sum + self.sum
        self.last = torchmetrics.wrappers.Running(torchmetrics.SumMetric(), window=3)
        self.masks = Masks()
        self.results = []

    def training_step(self, batch, batch_idx):
        self.sum.update(batch.sum())
        self.last.update(batch.sum())
        self.masks.update(((2, 3), b"mask"))
        self.best.compute()
        return self.loss(batch)

    def on_train_end(self):
        self.results = {
            "sum": self.sum.sum_value,
            "both": self.both.compute(),
            "last": self.last.compute(),
            "masks": torch.tensor(len(self.masks.masks)),
            **self.best.compute(),
        }

    def train_dataloader(self):
        return StatefulDataLoader(Rows(), batch_size=4)


class Masks(torchmetrics.Metric):
    def __init__(self):
        super().__init__()
        self.add_state("masks", default=[], dist_reduce_fx=None)

    def _apply(self, fn):
        return self  # nothing to move

    def update(self, mask):
        self.masks.append(mask)

    def compute(self):
        return len(self.masks)


@distributed(world_size=1, process_group=False)
def test_metrics_that_wrap_others_and_keep_other_things_go_on(tmp_path):
    save = lambda: ZeroCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1)  # noqa: E731
    whole, _ = fit(Wrapped, ZeroStrategy(), callbacks=[save], max_steps=12)
    half, _ = fit(Wrapped, ZeroStrategy(), ckpt_path=tmp_path / "step=7.ckpt", max_steps=12)
    assert_same_results([half.results], [whole.results], rtol=0, atol=0)


@distributed(world_size=1, process_group=False)
def test_a_metric_of_another_shape_starts_anew_and_is_named():
    from lightning_zero.plugin.metric_state import get_metric_states, set_metric_states

    small = nn.ModuleDict({"m": torchmetrics.ConfusionMatrix(task="multiclass", num_classes=3)})
    large = nn.ModuleDict({"m": torchmetrics.ConfusionMatrix(task="multiclass", num_classes=5)})
    small["m"].update(torch.tensor([0, 1]), torch.tensor([0, 2]))
    saved = get_metric_states(small)
    with pytest.warns(UserWarning, match="MulticlassConfusionMatrix 'm' has states of other shapes"):
        set_metric_states(large, [saved], saved)
    assert large["m"].confmat.sum() == 0
    with pytest.warns(UserWarning, match=r"no metrics \['m'\] any more"):
        set_metric_states(nn.ModuleDict(), [saved], saved)
