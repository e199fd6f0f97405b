"""The judge of `python -m benchmarks.soak`: what it must notice, it notices. The soak itself is `make soak`."""

import json
from pathlib import Path

import pytest

from benchmarks.soak import judge
from benchmarks.soak.training import GLOBAL_BATCH, Settings

MEBIBYTE = 2**20


def run_with_memory(directory: Path, mebibytes_per_save: float, files_per_save: float = 0.0) -> Settings:
    run = Settings(directory, 0, 1, seed=0, save_every=20)
    lines = []
    for save in range(80):
        nbytes = int((400 + save % 3 + mebibytes_per_save * save) * MEBIBYTE)
        sample = {"step": 20 * save + 10, "at": 0.0, "resident": nbytes, "anonymous": nbytes}
        lines.append(json.dumps(sample | {"files": 40 + int(files_per_save * save), "threads": 15}) + "\n")
    (directory / "run-000-rank-0.memory").write_text("".join(lines))
    return run


@pytest.mark.parametrize(
    ("mebibytes_per_save", "files_per_save", "problem"), [(0, 0, ""), (0.3, 0, "memory grew"), (0, 0.1, "open files")]
)
def test_a_rank_that_gives_back_less_than_it_takes_is_noticed(tmp_path, mebibytes_per_save, files_per_save, problem):
    [trend] = judge.trends("killed", [run_with_memory(tmp_path, mebibytes_per_save, files_per_save)])
    assert trend.judged
    assert [text[: len(problem)] for text in trend.problems()] == ([problem] if problem else [])


def test_a_loss_that_leaves_the_undisturbed_one_is_noticed_in_its_stretch():
    steps = range(100, 3100, 100)
    undisturbed = {step: 2 + 300 / step for step in steps}
    seeds = [{step: loss + shift for step, loss in undisturbed.items()} for shift in (0.02, -0.01)]
    chain = {step: loss + (0.5 if step == 1000 else 1e-5) for step, loss in undisturbed.items()}
    problems = [stretch.problems() for stretch in judge.stretches(chain, [undisturbed, *seeds])]
    assert [bool(found) for found in problems] == [False, True, False, False, False, False]


def test_a_window_that_comes_twice_is_noticed():
    expected = judge.expected_windows(seed=0, steps=20)
    run = {step: (2.0, expected[step]) for step in range(1, 21)}
    assert judge.wrong_data([run], seed=0) == []
    run[7] = (2.0, expected[6])
    assert judge.wrong_data([run], seed=0) == [7]
    assert judge.wrong_data([run], seed=1) == list(range(1, 21))
    assert GLOBAL_BATCH % 2 == GLOBAL_BATCH % 3 == 0


def test_a_step_that_was_done_again_is_compared_with_the_time_before():
    found = judge.repeated([{1: (3.0, 0), 2: (2.5, 0)}, {2: (2.75, 0), 3: (2.0, 0)}])
    assert (found.steps, found.largest) == (1, 0.25)
