"""The benchmarks still run: every contestant for a moment on a tiny model, and what is told and drawn of the figures.

The contestants run here as forked ranks, which is quick; that they are launched as processes of their own is tried with
one of them.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import benchmarks.__main__ as everything
from benchmarks import machine, plot, rounds
from benchmarks.checkpoint import __main__ as checkpoint
from benchmarks.checkpoint.table import ROWS
from benchmarks.export import __main__ as export
from benchmarks.export import conversions, plain
from benchmarks.scale import __main__ as scale
from benchmarks.scale.models import llama
from benchmarks.step import __main__ as step
from tests.launch import run_ranks
from tests.models import FSDP2_TRAINS_ON_CPU

NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed isn't installed")
NEEDS_FSDP2 = pytest.mark.skipif(not FSDP2_TRAINS_ON_CPU, reason="torch 2.6's FSDP2 doesn't train on the CPU")
LIMITS = dict.fromkeys(machine.LIMITS, 1.0)


def marked(names: Sequence[str]) -> list[Any]:
    """The names, those of DeepSpeed for where it is installed, and those of FSDP2 for where it trains."""
    needs = {"deepspeed": NEEDS_DEEPSPEED, "fsdp2": NEEDS_FSDP2}
    return [pytest.param(name, marks=[mark for peer, mark in needs.items() if peer in name]) for name in names]


def train_for_a_moment(contestant: str) -> dict[str, Any]:
    """The figures, and the loss of every micro-batch."""
    import torch

    from benchmarks.gpt import GPT, Size
    from benchmarks.step.training import VOCABULARY, Training, train

    losses: list[float] = []
    forward = GPT.forward

    def recorded(self: GPT, batch: torch.Tensor) -> torch.Tensor:
        loss = forward(self, batch)
        losses.append(loss.item())
        return loss

    GPT.forward = recorded  # in this process, which ends with the test
    GPT.learning_rate = 1e-2  # a step that isn't made would show
    torch.manual_seed(0)
    batches = Training(Size(1, 2, 16, VOCABULARY, 128), steps=4, accumulate=2).batches()
    Training.batches = lambda self: batches
    return {**train(contestant, Training(Size(1, 2, 16, VOCABULARY, 128), steps=4, accumulate=2)), "losses": losses}


@pytest.fixture(scope="module")
def losses_of_ddp() -> list[float]:
    return run_ranks(train_for_a_moment, 2, "ddp", process_group=False)[0]["losses"]


def save_and_load_for_a_moment(contestant: str, parts: Sequence[str], directory: Path) -> dict[str, Any]:
    from benchmarks.checkpoint.contestants import Task, measure
    from benchmarks.gpt import SIZES

    task = Task(contestant, SIZES["tiny"], directory, turns=2, tokens=8, first=1)
    return {part: measure(task, part) for part in parts}


@pytest.mark.parametrize("contestant", marked(list(step.CONTESTANTS)))
def test_every_contestant_of_the_step_trains_as_ddp_does(contestant: str, losses_of_ddp: list[float]) -> None:
    for figures in run_ranks(train_for_a_moment, 2, contestant, process_group=False):
        assert len(figures["seconds"]) == 2
        assert figures["peak_mib"] >= figures["base_mib"] > 0
        if contestant != "alone":  # which makes no step
            assert figures["losses"] == pytest.approx(losses_of_ddp, abs=1e-4)


@pytest.mark.parametrize("contestant", marked(list(checkpoint.PARTS)))
def test_every_contestant_of_the_checkpoint_saves_and_loads(contestant: str, tmp_path: Path) -> None:
    for part in checkpoint.PARTS[contestant]:
        ranks = run_ranks(save_and_load_for_a_moment, 2, contestant, [part], tmp_path, process_group=False)
        figures = {f"{contestant} {part}": ranks[0][part]}
        assert len(ranks[0][part]["turns"]) == 2
        rows = [row for row in ROWS if row.source in figures]
        assert rows
        for row in rows:
            for turn in ranks[0][part]["turns"]:
                quiet = ranks[0][part].get("steps_quiet", [1.0])
                assert row.value({**turn, "step_quiet": quiet[0]}) is not None


def test_ranks_are_processes_of_their_own_and_the_machine_tells_its_limits(tmp_path: Path) -> None:
    limits = machine.machine_limits(tmp_path, megabytes=1)
    assert set(limits) == set(machine.LIMITS)
    assert all(value > 0 for value in limits.values())
    assert "write + fsync" in machine.limits_text([limits])


def test_a_model_is_planned_saved_and_resumed_on_ranks_that_nobody_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale, "MODELS", {"small": llama(2, 64, 32, 128)})
    monkeypatch.setattr(scale, "RANKS", (2, 4))
    results = tmp_path / "results.json"
    monkeypatch.setattr("sys.argv", ["scale", "--rounds", "1", "--json", str(results), "--directory", str(tmp_path)])
    scale.main()
    assert "| small | 4 |" in capsys.readouterr().out
    cell = json.loads(results.read_text())["cells"]["small"]["4"]
    assert cell["resume"]["ranges"] > 0
    assert cell["manifest"]["segments"] >= 4


# ----------------------------------------------------------------------------------------- what is told and drawn


@pytest.fixture
def made_up_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures without running anything."""

    def ranks_say(module: str, *arguments: object, world_size: int = 2) -> list[dict[str, Any]]:
        step_figures = {"seconds": [0.5, 0.6], "peak_mib": 900.0, "base_mib": 300.0, "parameters": 1000}
        keys = (
            "write",
            "save",
            "copy",
            "stall",
            "durable",
            "lost",
            "above_mib",
            "read",
            "read_fresh",
            "load",
            "again",
            "full",
        )
        turns = [{**dict.fromkeys(keys, 0.25), "steps_beside": [0.5, 0.6]} for _ in range(3)]
        checkpoint_figures = {"turns": turns, "parameters": 1000, "steps_quiet": [0.5]}
        return [step_figures if module == "benchmarks.step.training" else checkpoint_figures] * 2

    for module in (step, checkpoint, conversions):
        monkeypatch.setattr(module, "run_ranks", ranks_say)
        monkeypatch.setattr(module, "installed", lambda *_, **__: True)
    for module in (step, checkpoint, export):
        monkeypatch.setattr(module, "machine_limits", lambda *_: LIMITS)
    figures = {"seconds": 2.0, "peak_mib": 240.0}
    monkeypatch.setattr(conversions, "_convert", lambda *_: figures)
    sizes = {"ratio": 1.0, "seconds": 1.0, "peak_mib": 140.0, "rounds": []}
    monkeypatch.setattr(plain, "measure", lambda *_: {".ckpt": sizes})


@pytest.mark.usefixtures("made_up_runs")
@pytest.mark.parametrize(
    ("benchmark", "name", "said"),
    [
        (step, "step", "| **lightning_zero, stage 2** | 1.00 (≤ 0.95) | 0.550 | 600 | 1.00 (≤ 1) | 0.550 | 600 |"),
        (checkpoint, "checkpoint", "| **lightning_zero, save** | 0.250 s | 0.250 s | 1.00 | 1.00 | ≤ 1.3 |"),
        (export, "export", "| **lightning_zero, to .ckpt** | 2.00 | 1.00 (DeepSpeed ZeRO-2, to .bin) | ≤ 0.4 | 240 |"),
    ],
)
def test_a_run_prints_its_table_and_its_figures_become_a_picture(
    benchmark: Any, name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, picture = tmp_path / "results.json", tmp_path / "picture.svg"
    benchmark.main(["--quick", "--json", str(results)])
    assert said in capsys.readouterr().out
    assert json.loads(results.read_text())["limits"]
    plot.main([name, str(results), str(picture)])
    drawn = picture.read_text()
    assert "lightning_zero" in drawn
    assert "DeepSpeed" in drawn


def test_contestants_take_turns_in_being_the_first() -> None:
    assert [rounds.rotated("abc", number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert rounds.median_ratio([{"a": {"s": 2}, "b": {"s": 1}}, {"a": {"s": 9}, "b": {"s": 3}}], "a", "b", "s") == 2.5


def test_all_runs_each_benchmark_and_draws_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(everything, "run", lambda *call: calls.append(tuple(map(str, call))) or call[0] == "export")
    assert everything.main(["all", "--quick", "--only", "step", "export", "--directory", str(tmp_path)]) == 1
    assert calls == [
        ("step", "--quick", "--json", str(tmp_path / "step.json")),
        ("plot", "step", str(tmp_path / "step.json"), str(tmp_path / "step.svg")),
        ("export", "--quick", "--json", str(tmp_path / "export.json")),
    ]
