"""The page that shows a run."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

from lightning_zero import TrainingReport, ZeroCheckpoint, ZeroStrategy
from lightning_zero.checkpoint.report import SaveReport
from lightning_zero.errors import CheckpointNotFoundError, UnsupportedModelError
from lightning_zero.plugin.charts import line_chart, stacked_bars
from tests.launch import distributed, run_ranks
from tests.models import Model, fit


class Logging(Model):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        self.log("tokens/s <fast>", torch.tensor(5.0))
        return loss


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}  # nothing is loaded from elsewhere

    def handle_data(self, data):
        self.text += data


def report(directory, max_steps, precision):
    callbacks = [
        ZeroCheckpoint(directory / "ckpts", every_n_train_steps=4, save_top_k=-1, async_save=True),
        TrainingReport(directory / "page" / "report.html", every_n_train_steps=2),
    ]
    _, trainer = fit(
        Logging(),
        ZeroStrategy(),
        world_size=2,
        max_steps=max_steps,
        callbacks=callbacks,
        ckpt_path="last",
        precision=precision,
    )
    return trainer.strategy.memory_bytes(), callbacks[1].curves


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_page_shows_loss_speed_memory_and_checkpoints_and_goes_on_after_a_resume(tmp_path, precision):
    run_ranks(report, 2, tmp_path, 6, precision, process_group=False)
    memory, curves = run_ranks(report, 2, tmp_path, 10, precision, process_group=False)[0]
    text = (tmp_path / "page" / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert page.tags.count("svg") >= 6
    assert {"tokens/s <fast>", "val_loss"} & set(curves) == {"tokens/s <fast>", "val_loss"}
    assert [step for step, _ in curves["train_loss"]] == [2, 4, 6, 8, 10]
    assert [step for step, _ in curves["checkpoint/stall_seconds"]][-1] == 8
    assert "rank 1, optimizer states" in page.text
    assert "tokens/s <fast>" in page.text
    trained = sum(p.numel() for p in set(Model().parameters()) if p.requires_grad)
    width = 4 if precision == "32-true" else 2
    assert memory["optimizer states"] == pytest.approx(8 * trained / 2, rel=0.1)
    assert memory["masters"] == pytest.approx(0 if width == 4 else 4 * trained / 2, rel=0.1)
    assert memory["parameters"] >= width * trained


@distributed(world_size=1, process_group=False)
def test_the_last_validation_is_on_the_page_although_no_batch_comes_after_it(tmp_path):
    page = TrainingReport(tmp_path / "report.html", every_n_train_steps=1)
    _, trainer = fit(Logging(), ZeroStrategy(), world_size=1, max_epochs=2, callbacks=[page])
    last = trainer.callback_metrics["val_loss"].item()
    assert page.curves["val_loss"][-1] == (trainer.global_step, last)
    assert page.curves["val_loss"][-2][1] != last  # the first epoch's
    assert f"{last:.4g}" in page.path.read_text()


@distributed(world_size=1, process_group=False)
def test_a_fit_that_fails_before_it_trains_and_a_try_leave_the_page_as_it_is(tmp_path):
    page = tmp_path / "report.html"
    fit(Logging(), ZeroStrategy(), world_size=1, max_steps=4, callbacks=[TrainingReport(page, 2)])
    before = page.read_text()
    with pytest.raises(CheckpointNotFoundError):
        fit(Logging(), ZeroStrategy(), world_size=1, callbacks=[TrainingReport(page, 2)], ckpt_path=tmp_path / "gone")
    fit(Logging(), ZeroStrategy(), world_size=1, callbacks=[TrainingReport(page, 1)], fast_dev_run=True)
    assert page.read_text() == before


def test_a_run_that_has_saved_thousands_of_times_keeps_the_newest_figures_and_draws_each_save_once(tmp_path):
    strategy, page = ZeroStrategy(), TrainingReport(tmp_path / "report.html")
    trainer = SimpleNamespace(strategy=strategy, is_global_zero=True)
    drawn = []
    page._add = lambda name, step, value: drawn.append(step) if name == "checkpoint/bytes" else None
    for step in range(1, 2501):
        strategy.saves._telemetry.log(SaveReport(tmp_path / "tag", step, 8, 8, 1.0, 0.5, (0.5,)), ())
        if step % 300 == 0:
            page._write(trainer)
    page._write(trainer)
    assert drawn == list(range(1, 2501))
    assert [save["step"] for save in strategy.saves.history] == list(range(1501, 2501))


def test_a_long_curve_is_thinned_out_and_keeps_its_ends():
    page = TrainingReport()
    for step in range(5000):
        page._add("loss", step, 1.0)
        assert page.curves["loss"][0][0] == 0
        assert page.curves["loss"][-1][0] == step
    assert len(page.curves["loss"]) <= 1000


def test_before_a_fit_nothing_is_partitioned_whose_memory_could_be_told():
    with pytest.raises(UnsupportedModelError, match="nothing is partitioned"):
        ZeroStrategy().memory_bytes()


def test_a_path_that_is_no_page_is_refused():
    for arguments in (("report.txt",), ("report.html", 0)):
        with pytest.raises(ValueError, match=r"\.html page|at least 1"):
            TrainingReport(*arguments)


@pytest.mark.parametrize(
    "line",
    [[], [(1, 2.0)], [(1, 2.0), (2, 2.0)], [(0, -5.0), (9, 1e12)], [(1, float("nan")), (2, 1e-9)], [(0, 0.0)] * 5],
)
def test_any_curve_makes_a_chart_within_its_frame(line):
    chart = line_chart({"<a>": line, "b": []}, x_label="step", unit="s")
    Page(chart)
    _, _, width, height = map(float, re.search(r"viewBox='([^']+)'", chart)[1].split()) if line else (0, 0, 1, 1)
    for x, y in re.findall(r"cx='([^']+)' cy='([^']+)'", chart):
        assert 0 <= float(x) <= width
        assert 0 <= float(y) <= height
    bars = stacked_bars({f"rank {n}": {"a": 1.0 * n, "b": 0.0} for n in range(len(line))})
    Page(bars)
