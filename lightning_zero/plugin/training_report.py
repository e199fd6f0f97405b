"""One static page that shows a run: its loss, its speed, the memory of each rank, and what its checkpoints cost."""

from __future__ import annotations

import itertools
import math
import os
import platform
import secrets
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_zero.plugin.charts import Series, line_chart, stacked_bars
from lightning_zero.plugin.strategy import ZeroStrategy

_STEP_SECONDS = "seconds a step"
_CHARTS = 12
"""As many of the other metrics get a chart."""

_KEPT = 1000
"""Points of a curve that are kept; of a longer one every second goes. They are part of every checkpoint."""

Curves = dict[str, list[tuple[float, float]]]


class TrainingReport(Callback):
    """Writes a page of HTML: no server, no script, nothing that is loaded from elsewhere.

    It shows what the module logs (`self.log`), the seconds of a step, the memory of each rank by kind, and every
    checkpoint's stall, time and bandwidth. It is written again now and then, by rank 0, and
    goes on where it was when a run is resumed.

    Args:
        path: of the page.
        every_n_train_steps: how often the curves get a point.

    Raises:
        ValueError: the path doesn't end in .html, or the number isn't positive.
    """

    def __init__(self, path: str | Path = "report.html", every_n_train_steps: int = 10) -> None:
        self.path = Path(path)
        if self.path.suffix != ".html":
            raise ValueError(f"TrainingReport writes an .html page, not {os.fspath(path)!r}")
        if not isinstance(every_n_train_steps, int) or every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps must be a whole number, at least 1, not {every_n_train_steps!r}")
        self.every_n_train_steps = every_n_train_steps
        self.curves: Curves = {}
        """By name, the points (step, value)."""
        self.memory: dict[str, dict[str, float]] = {}
        """By rank, the bytes of each kind."""
        self._about: dict[str, str] = {}
        self._last: tuple[int, float] | None = None
        self._drawn = 0.0
        self._last_save: Mapping[str, float] | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"curves": {name: [list(point) for point in line] for name, line in self.curves.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves = {name: [(x, y) for x, y in line] for name, line in state_dict["curves"].items()}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(trainer, "fast_dev_run", False):
            self._last = None
            return
        parameters = sum(p.numel() for p in pl_module.parameters())
        strategy = trainer.strategy
        stage = f", stage {strategy.stage}" if isinstance(strategy, ZeroStrategy) else ""
        self._about = {
            "module": type(pl_module).__name__,
            "parameters": f"{parameters:,}",
            "strategy": f"{type(strategy).__name__}{stage}",
            "ranks": str(trainer.world_size),
            "precision": str(trainer.precision),
            "device": str(strategy.root_device.type),
            "host": platform.node(),
            "torch": str(torch.__version__),
        }
        self._last = (trainer.global_step, time.monotonic())
        self._measured = False

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every_n_train_steps or self._last is None or step == self._last[0]:
            return
        now = time.monotonic()
        self._add(_STEP_SECONDS, step, (now - self._last[1]) / (step - self._last[0]))
        self._last = (step, now)
        logged = _logged(trainer)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not any("loss" in name for name in logged) and isinstance(loss, Tensor):
            logged["loss"] = float(loss.detach())
        for name, value in logged.items():
            self._add(name, step, value)
        if not self._measured:
            self._measured = True
            self._measure(trainer)
        if now - self._drawn > 10:
            self._write(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in _logged(trainer).items():  # the last validation came after the last batch
            self._add(name, trainer.global_step, value)
        self._measure(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last is not None:
            self._write(trainer)  # the last checkpoint has been committed by now

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._last is not None:  # else the page is another run's, and what is known of this one is nothing
            self._write(trainer)

    def _add(self, name: str, step: int, value: float) -> None:
        line = self.curves.setdefault(name, [])
        while line and line[-1][0] >= step:  # a resumed run goes over some steps again
            line.pop()
        line.append((step, value))
        if len(line) > _KEPT:
            del line[1::2]  # an odd number: the first stays, and the last

    def _measure(self, trainer: Trainer) -> None:
        """Every rank's memory by kind. Called on every rank."""
        strategy = trainer.strategy
        if not isinstance(strategy, ZeroStrategy):
            return
        everyones = strategy._ranks.everyones(lambda: [strategy.memory_bytes()])
        self.memory = {f"rank {rank}": memory for rank, memory in enumerate(everyones)}

    # --- the page ---

    def _write(self, trainer: Trainer) -> None:
        self._drawn = time.monotonic()
        if not trainer.is_global_zero:
            return
        if isinstance(trainer.strategy, ZeroStrategy):
            for save in self._new_saves(trainer.strategy.saves.history):
                for name, value in save.items():
                    if name != "step":
                        self._add(f"checkpoint/{name}", int(save["step"]), value)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
            new.write_text(self._page(), encoding="utf-8")
            os.replace(new, self.path)
        except OSError as error:  # of one rank, and no reason to end a training
            rank_zero_warn(f"the report {self.path} couldn't be written: {error}")

    def _new_saves(self, history: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
        """Those since the page was last written: what a long curve has let go of must not come back."""
        new = list(itertools.takewhile(lambda save: save is not self._last_save, reversed(history)))
        if new:
            self._last_save = new[0]
        return new[::-1]

    def _page(self) -> str:
        losses = {name: line for name, line in self.curves.items() if "loss" in name}
        checkpoint = {
            name.split("/", 1)[1]: line for name, line in self.curves.items() if name.startswith("checkpoint/")
        }
        shown = {*losses, _STEP_SECONDS}
        others = [name for name in self.curves if name not in shown and not name.startswith("checkpoint/")]
        mebibytes = {
            rank: {kind: nbytes / 2**20 for kind, nbytes in memory.items()} for rank, memory in self.memory.items()
        }
        bandwidth = {"GB/s": checkpoint.get("gigabytes_per_second", [])}
        waits: dict[str, Series] = {
            "until it is committed": checkpoint.get("seconds", []),
            "training waits": checkpoint.get("stall_seconds", []),
        }
        panels = [
            ("Loss", line_chart(losses, x_label="step")),
            ("A step", line_chart({_STEP_SECONDS: self.curves.get(_STEP_SECONDS, [])}, x_label="step", unit="s")),
            *((name, line_chart({name: self.curves[name]}, x_label="step")) for name in others[:_CHARTS]),
            ("Memory of each rank, by kind", stacked_bars(mebibytes, unit="MiB")),
            ("A checkpoint", line_chart(waits, x_label="step", unit="s")),
            ("A checkpoint's bandwidth", line_chart(bandwidth, x_label="step", unit="GB/s")),
        ]
        figures = "".join(
            f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>" for title, chart in panels
        )
        about = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
            for name, value in {**self._about, **self._summary(losses, checkpoint)}.items()
        )
        title = f"{self._about.get('module', 'Training')}: training report"
        return _PAGE.format(title=escape(title), style=_STYLE, about=about, figures=figures)

    def _summary(self, losses: Mapping[str, Series], checkpoint: Mapping[str, Series]) -> dict[str, str]:
        shown = {name: f"{line[-1][1]:.4g}" for name, line in losses.items() if line and math.isfinite(line[-1][1])}
        steps = [x for line in self.curves.values() for x, _ in line]
        if steps:
            shown["step"] = str(int(max(steps)))
        if checkpoint.get("bytes"):
            shown["checkpoint"] = f"{checkpoint['bytes'][-1][1] / 1e6:.4g} MB"
        if checkpoint.get("stall_seconds"):
            total = sum(seconds for _, seconds in checkpoint["stall_seconds"])
            shown["training waited for checkpoints"] = f"{total:.3g} s in all"
        return shown


def _logged(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<h1>{title}</h1>
<dl>{about}</dl>
<main>{figures}</main>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --text: #1d2330; --dim: #667085; --back: #ffffff; --panel: #f6f7f9; --grid: #e2e5ea;
  --series-0: #3366cc; --series-1: #e07b39; --series-2: #3a9d5d; --series-3: #b0478f; --series-4: #8a6d3b;
  --series-5: #5b6b82; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ef; --dim: #98a2b3; --back: #14171d; --panel: #1c2028;
  --grid: #2d333e; --series-0: #7aa2f7; --series-1: #f0a36b; --series-2: #73c991; --series-3: #d98fc2;
  --series-4: #c9ab6f; --series-5: #9aa7bd; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 2rem auto;
  max-width: 1200px; padding: 0 1rem; }
h1 { font-size: 1.35rem; }
dl { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin: 0 0 1.5rem; }
dt { color: var(--dim); font-size: .8rem; } dd { margin: 0; font-variant-numeric: tabular-nums; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--panel); border-radius: 8px; padding: .8rem 1rem; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
svg { width: 100%; height: auto; display: block; }
.tick { fill: var(--dim); font: 12px system-ui, sans-serif; } .grid { stroke: var(--grid); }
.legend { margin: .4rem 0 0; color: var(--dim); font-size: .8rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.legend i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .35rem; }
.none { color: var(--dim); }
"""
