"""`lightning-zero inspect`: what is inside, and the picture of who owns it."""

import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_zero.checkpoint.integrity import read_manifest
from lightning_zero.cli import main
from lightning_zero.cli.holdings import Holdings
from lightning_zero.cli.picture import draw, write
from lightning_zero.segments import ParameterSpec, plan_buckets
from tests.checkpoint.sample import SHAPES, Sample


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    Sample(world_size=2, step=2).save(tmp_path / "ckpts" / "step=2.ckpt")
    return tmp_path / "ckpts"


def test_inspect_shows_entries_owners_states_and_bytes_a_rank(
    save_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(save_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(save_dir / "step=2.ckpt")
    assert lines[1].startswith("step 2, epoch 1, 2 ranks, stage 2, ")
    table = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert table["layer.weight"] == ["64x33", "bfloat16", "parameter", "8.4", "kB", "8.5", "kB", "0-1"]
    assert table["counter"] == ["scalar", "int64", "buffer", "8", "B", "-", "0"]
    assert "tied: head.weight = embed.weight" in lines
    assert "optimizer 0: AdamW of 5 parameters" in lines


@pytest.mark.parametrize(
    "trainer",
    [
        {"optimizer_states": [{"state": {}}]},
        {"optimizer_states": [3]},
        {"optimizer_states": [{"state": {}, "param_groups": [3]}]},
        {"hyper_parameters": [3]},
    ],
)
def test_settings_that_are_none_are_an_error_in_one_line(
    save_dir: Path, trainer: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Sample(step=3, trainer=trainer).save(save_dir / "odd")
    assert main(["inspect", str(odd), "--hyper-parameters"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["diff", str(save_dir / "step=2.ckpt"), str(odd)]) == 1


def test_inspect_as_json_says_all_of_it(save_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(save_dir), "--json", "--hyper-parameters"]) == 0
    found = json.loads(capsys.readouterr().out)
    entries = {entry["name"]: entry for entry in found["entries"]}
    assert list(entries) == [*SHAPES, "frozen", "counter", "<average>"]
    assert entries["bias"]["bytes"] == 4 * 19
    assert entries["bias"]["state_bytes"] == 4 * 19 + 2 * (4 + 12)  # in two pieces, each with `step` and `factors`
    assert entries["frozen"]["bytes"] == 2 * 33
    assert found["complete"]
    assert found["aliases"] == {"head.weight": "embed.weight"}
    assert found["optimizers"][0]["states"]["exp_avg"] == 4 * sum(
        e["elements"] for e in entries.values() if e["role"] == "parameter"
    )
    assert found["hyper_parameters"] == {"width": 5}
    assert found["param_groups"] == {"0": [{"lr": 0.1}]}
    manifest = read_manifest(save_dir / "step=2.ckpt")
    tensors = sum(file.nbytes - file.header_nbytes for file in manifest.files)
    assert sum(rank["bytes"] for rank in found["ranks"]) == tensors
    for rank in found["ranks"]:
        assert rank["bytes"] == sum(
            tensor.nbytes for file in manifest.files for tensor in file.tensors if file.rank == rank["rank"]
        )


def test_a_torn_checkpoint_is_shown_and_called_so(save_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (save_dir / "step=2.ckpt" / "rank-00001-of-00002.safetensors").unlink()
    assert main(["inspect", str(save_dir)]) == 0
    assert "INCOMPLETE: rank-00001-of-00002.safetensors" in capsys.readouterr().out
    assert main(["inspect", str(save_dir), "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["complete"]


# --------------------------------------------------------------------------------------------------- the picture


def holdings(shapes: dict[str, tuple[int, ...]], world_size: int) -> Holdings:
    specs = [ParameterSpec(name, shape, 4) for name, shape in shapes.items()]
    by_name: dict[str, Counter] = {name: Counter() for name in shapes}
    for bucket in plan_buckets(specs, world_size, "element", 25 << 20):
        for rank in range(world_size):
            for segment, _ in bucket.owned(rank):
                by_name[segment.name][rank, "parameters"] += 4 * segment.numel
                by_name[segment.name][rank, "states"] += 8 * segment.numel
    return Holdings(world_size, by_name, dict.fromkeys(range(world_size), 1000))


def large(layers: int, kinds: int = 8) -> dict[str, tuple[int, ...]]:
    hidden = {f"net.h.{layer}.part{kind}.weight": (64, 64) for layer in range(layers) for kind in range(kinds)}
    return {"net.embed.weight": (5000, 64), **hidden, "net.norm.bias": (64,)}


def texts(figure: Figure) -> list[str]:
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda item: isinstance(item, Text) and item.get_visible())]


def test_the_svg_names_every_parameter_and_rank(save_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_dir.parent / "owners.svg"
    assert main(["inspect", str(save_dir), "--plot", str(path)]) == 0
    assert f"drawn: {path}" in capsys.readouterr().out
    root = ElementTree.parse(path).getroot()
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"embed.weight", "layer.weight", "bias", "frozen", "counter", "rank", "0", "1"} <= set(words)


@pytest.mark.parametrize(("layers", "world_size"), [(0, 2), (2, 1), (50, 64), (120, 200), (500, 3)])
def test_the_picture_stays_readable_and_within_itself(layers: int, world_size: int, tmp_path: Path) -> None:
    figure = draw(holdings(large(layers), world_size), "step=1.ckpt")
    assert figure.get_figheight() < 12
    write(figure, tmp_path / "picture.svg")
    left, top, width, height = map(
        float, ElementTree.parse(tmp_path / "picture.svg").getroot().attrib["viewBox"].split()
    )
    assert (left, top) == (0, 0)
    assert width < 1500
    assert height < 1000
    for text in figure.findobj(lambda item: isinstance(item, Text) and item.get_visible() and item.get_text()):
        box = text.get_window_extent()
        assert box.width < figure.bbox.width
        assert box.height < figure.bbox.height
    rows = [text for text in texts(figure) if text.startswith("net.")]
    assert 2 <= len(rows) <= 36
    assert rows[0] == "net.embed.weight" or layers == 500


def test_where_there_are_too_many_parameters_layers_share_rows() -> None:
    words = texts(draw(holdings(large(50), 4), "step=1.ckpt"))
    assert "net.h.0 to 1" in words
    assert "net.norm.bias" in words
    words = texts(draw(holdings(large(20), 4), "step=1.ckpt"))
    assert "net.h.19" in words


def test_all_bytes_are_in_the_picture() -> None:
    held = holdings({"a": (7000, 10), "b": (3,)}, 2)
    cells = Counter(text.strip() for text in texts(draw(held, "step=1.ckpt")))
    assert cells["840.0 kB"] == 1  # all of a
    assert cells["36 B"] == 3  # b is one cell, one bar, and the least of the scale


def test_names_in_the_picture_are_no_markup(tmp_path: Path) -> None:
    odd = {"<script>&": (3,), "\x1b[31m$x$\ud800": (4,), "\u5c42": (2,)}
    write(draw(holdings(odd, 1), "a]]><b>$y$"), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "&lt;script&gt;&amp;" in text
    assert "$x$" in text
    assert "\x1b" not in text
    ElementTree.fromstring(text.encode())


def test_a_png_is_a_png(save_dir: Path) -> None:
    assert main(["inspect", str(save_dir), "--plot", str(save_dir.parent / "owners.PNG")]) == 0
    assert (save_dir.parent / "owners.PNG").read_bytes().startswith(b"\x89PNG")
