"""`lightning-zero diff`: what differs, found without reading what needn't be."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_zero.checkpoint import difference
from lightning_zero.checkpoint.difference import Side, compare
from lightning_zero.cli import main
from tests.checkpoint.sample import Sample


def saved(path: Path, change: Callable[[Sample], object] = lambda sample: None, **options: Any) -> Path:
    sample = Sample(**options)
    change(sample)
    return sample.save(path)


def diff(a: Path, b: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The exit status, what differs by name and state, and what differs in the settings."""
    status = main(["diff", str(a), str(b), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["same"] == (status == 0)
    unlike = {
        (one["name"], one["state"] or one["kind"]): one for one in found["comparisons"] if one["verdict"] != "same"
    }
    return status, unlike, {row["name"]: (row["a"], row["b"]) for row in found["settings"]}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_same_training_on_any_number_of_ranks_is_the_same(
    world_size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = saved(tmp_path / "a" / "t", world_size=2)
    b = saved(tmp_path / "b" / "t", world_size=world_size)
    assert diff(a, b.parent, capsys) == (0, {}, {})
    assert main(["diff", str(a.parent), str(b)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "same"


def test_one_element_of_one_parameter_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(sample: Sample) -> None:
        sample.masters["layer.weight"][63, 2] += 0.5
        sample.moments["bias"][3:5] -= 2.0

    a = saved(tmp_path / "a", world_size=2)
    b = saved(tmp_path / "b", change, world_size=3)
    status, unlike, settings = diff(a, b, capsys)
    assert (status, settings) == (1, {})
    assert unlike.keys() == {("layer.weight", "parameter"), ("bias", "exp_avg")}
    found = unlike["layer.weight", "parameter"]
    assert (found["differing"], found["numel"], found["max_difference"]) == (1, 64 * 33, pytest.approx(0.5))
    assert unlike["bias", "exp_avg"]["differing"] == 2
    assert main(["diff", str(a), str(b)]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["bias", "exp_avg", "of", "optimizer", "0", "2", "19", "2"] in rows
    assert ["layer.weight", "parameter", "1", "2,112", "0.5"] in rows
    assert ["parameters:", "1", "of", "5", "differ"] in rows


def test_chunks_of_any_size_add_up_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = [Side(saved(tmp_path / str(step), world_size=step, step=step)) for step in (2, 3)]
    whole = compare(sides[0], sides[1])
    monkeypatch.setattr(difference, "_CHUNK_BYTES", 20)
    assert compare(sides[0], sides[1]) == whole


def test_pieces_with_equal_checksums_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(sample: Sample) -> None:
        sample.masters["bias"] += 1

    sides = [Side(saved(tmp_path / "a", world_size=2)), Side(saved(tmp_path / "b", change, world_size=2))]
    read, original = [], Side.read

    def watched(side: Side, stored: Any, offset: int, target: memoryview) -> None:
        read.append(stored[1].name)
        original(side, stored, offset, target)

    monkeypatch.setattr(Side, "read", watched)
    told: list[int] = []
    assert not compare(sides[0], sides[1], told.append).same
    assert set(read) == {"bias"}
    assert sum(told) == pytest.approx(difference.bytes_to_compare(*sides), rel=0.1)


def test_what_is_in_one_alone_and_other_shapes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = {"embed.weight": (7, 5), "layer.weight": (33, 64), "bias": (19,), "new": (2,)}
    a, b = saved(tmp_path / "a", world_size=2), saved(tmp_path / "b", world_size=1, shapes=shapes)
    status, unlike, settings = diff(a, b, capsys)
    assert status == 1
    assert {name for (name, _), one in unlike.items() if one["verdict"] == "only in A"} == {"scale", "empty"}
    assert {name for (name, _), one in unlike.items() if one["verdict"] == "only in B"} == {"new"}
    assert unlike["layer.weight", "parameter"]["reason"] == "shape (64, 33) and (33, 64)"
    assert settings["optimizers.0.sizes of groups"] == ("[5]", "[4]")
    assert main(["diff", str(a), str(b)]) == 1
    assert "only in A" in capsys.readouterr().out


def test_nans_are_the_same_as_themselves_and_larger_than_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def nan(*positions: int) -> Callable[[Sample], object]:
        def change(sample: Sample) -> None:
            sample.masters["bias"][list(positions)] = math.nan

        return change

    a, b, c = (saved(tmp_path / name, nan(*at), world_size=n) for name, at, n in
               (("a", [3], 1), ("b", [3], 2), ("c", [3, 4], 1)))  # fmt: skip
    assert diff(a, b, capsys)[0] == 0
    _, unlike, _ = diff(a, c, capsys)
    assert (unlike["bias", "parameter"]["differing"], unlike["bias", "parameter"]["max_difference"]) == (1, "nan")


def test_a_sign_of_zero_is_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = saved(tmp_path / "a", lambda sample: sample.masters["scale"].fill_(0.0))
    b = saved(tmp_path / "b", lambda sample: sample.masters["scale"].fill_(-0.0))
    status, unlike, _ = diff(a, b, capsys)
    assert (status, unlike["scale", "parameter"]["differing"]) == (1, 1)


def test_settings_are_compared_to_the_last_digit_and_sets_in_any_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(name: str, **settings: object) -> Path:
        return saved(tmp_path / name, trainer={"hyper_parameters": settings})

    weights, nan = torch.arange(5000.0), float("nan")
    a = save("a", weights=weights, lr=torch.tensor(0.00101), nan=torch.tensor(nan), classes={0, 8})
    b = save("b", weights=weights.clone(), lr=torch.tensor(0.00101), nan=torch.tensor(nan), classes={8, 0})
    assert diff(a, b, capsys) == (0, {}, {})
    c = save("c", weights=weights.index_fill(0, torch.tensor(2500), 7), lr=torch.tensor(0.00102), nan=nan, classes={8})
    status, _, settings = diff(a, c, capsys)
    assert (status, len(settings)) == (1, 4)
    assert all(ours != theirs for ours, theirs in settings.values())


def test_settings_are_compared_and_how_it_was_trained_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"hyper_parameters": {"width": 6, "depth": torch.tensor(3)}, "loops": {"fit_loop": 4}, "callbacks": {"a": 1}}
    a = saved(tmp_path / "a", world_size=2)
    b = saved(tmp_path / "b", trainer={"loops": {"fit_loop": 4}, "callbacks": {"a": 1}})
    c = saved(tmp_path / "c", trainer=more)
    assert diff(a, b, capsys) == (0, {}, {})
    status, unlike, settings = diff(a, c, capsys)
    assert (status, unlike) == (1, {})
    assert settings == {"hyper_parameters.width": ("5", "6"), "hyper_parameters.depth": ("nothing", "tensor(3)")}
    status, _, settings = diff(a, saved(tmp_path / "d", step=4), capsys)
    assert (status, settings) == (1, {"step": ("3", "4")})


def test_many_differences_are_cut_short_unless_all_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {f"layer{index}": (3,) for index in range(15)}
    a = saved(tmp_path / "a", shapes=shapes)
    b = saved(tmp_path / "b", shapes=shapes, seed=1)
    assert main(["diff", str(a), str(b)]) == 1
    short = capsys.readouterr().out
    assert "more; --all shows them" in short
    assert main(["diff", str(a), str(b), "--all"]) == 1
    assert len(capsys.readouterr().out.splitlines()) > 60 > len(short.splitlines())


def test_a_torn_checkpoint_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = saved(tmp_path / "a", world_size=2), saved(tmp_path / "b", world_size=2)
    next(b.glob("rank-*")).unlink()
    assert main(["diff", str(a), str(b)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
