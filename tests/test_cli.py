"""The command, as a user runs it."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_zero import __version__
from lightning_zero.checkpoint import commit
from lightning_zero.cli import main
from tests.checkpoint.sample import Sample


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    for step in (1, 2):
        Sample(world_size=2, step=step).save(tmp_path / "ckpts" / f"step={step}.ckpt")
    return tmp_path / "ckpts"


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_ls_shows_the_tags(save_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (save_dir / "step=1.ckpt" / "rank-00001-of-00002.safetensors").unlink()
    assert main(["ls", str(save_dir)]) == 0
    header, newest, oldest = capsys.readouterr().out.splitlines()
    assert header.split() == ["tag", "step", "epoch", "world", "size", "stage", "bytes", "age"]
    assert newest.split()[:5] == ["step=2.ckpt", "2", "1", "2", "2"]
    assert newest.endswith("latest")
    assert oldest.endswith("INCOMPLETE")
    assert main(["ls", str(save_dir), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["tag"], row["latest"], row["complete"]) for row in rows] == [
        ("step=2.ckpt", True, True),
        ("step=1.ckpt", False, False),
    ]
    assert main(["ls", str(save_dir / "step=1.ckpt"), "--json"]) == 0
    assert [row["tag"] for row in json.loads(capsys.readouterr().out)] == ["step=1.ckpt"]


def test_verify_of_a_sound_checkpoint_is_0(save_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(save_dir)]) == 0
    assert "step=2.ckpt: sound" in capsys.readouterr().out
    assert main(["verify", str(save_dir), "--tag", "step=1.ckpt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sound"]


def test_verify_names_the_file_the_tensor_and_the_bytes(save_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = save_dir / "step=2.ckpt" / "rank-00001-of-00002.safetensors"
    flip(shard)
    flip(save_dir / "step=2.ckpt" / "trainer.pt", 100)
    size = shard.stat().st_size
    assert main(["verify", str(save_dir)]) == 1
    out = capsys.readouterr().out
    assert "trainer.pt" in out
    assert f"{shard.name}: 'rank/state', bytes {size - 6} to {size}: the checksum doesn't match" in out
    assert main(["verify", str(save_dir), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {problem["file"] for problem in found["problems"]} == {"trainer.pt", shard.name}
    assert main(["verify", str(save_dir / "step=1.ckpt")]) == 0


@pytest.mark.parametrize("content", ["gone", "../x", "", None])
def test_verify_finds_a_damaged_latest(save_dir: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    (save_dir / "latest").unlink()
    if content is not None:
        (save_dir / "latest").write_text(content)
    assert main(["verify", str(save_dir)]) == 1
    assert capsys.readouterr().out.startswith("latest: ")


def test_verify_of_a_damaged_manifest_is_1(save_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(save_dir / "step=2.ckpt" / "manifest.json", 30)
    assert main(["verify", str(save_dir)]) == 1
    assert "manifest.json" in capsys.readouterr().out


def test_verify_of_all_names_the_checkpoint_and_the_file(save_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(save_dir), "--all"]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{save_dir}/step={step}.ckpt: sound" for step in (2, 1)
    ]
    flip(save_dir / "step=1.ckpt" / "trainer.pt", 100)
    assert main(["verify", str(save_dir), "--all"]) == 1
    out = capsys.readouterr().out
    assert "step=2.ckpt: sound" in out
    assert "step=1.ckpt/trainer.pt: " in out
    assert main(["verify", str(save_dir), "--all", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["sound"]
    assert [tag["sound"] for tag in found["tags"]] == [True, False]
    with pytest.raises(SystemExit, match="2"):
        main(["verify", str(save_dir), "--all", "--tag", "step=1.ckpt"])


def test_export_writes_what_torch_loads(save_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(save_dir), str(tmp_path / "m.ckpt"), "--tag", "step=1.ckpt", "--exclude-frozen"]) == 0
    loaded = torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert torch.equal(loaded["state_dict"]["bias"], Sample(step=1).masters["bias"])
    assert "frozen" not in loaded["state_dict"]
    capsys.readouterr()
    assert main(["export", str(save_dir), str(tmp_path / "hf"), "--max-shard-size", "1KB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] > 0
    assert "model.safetensors.index.json" in os.listdir(tmp_path / "hf")
    assert main(["export", str(save_dir), str(tmp_path / "m.ckpt"), "--dtype", "bf16", "--submodule", "layer"]) == 0
    loaded = torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert torch.equal(loaded["state_dict"]["weight"], Sample(step=2).masters["layer.weight"].bfloat16())
    assert main(["export", str(save_dir), str(tmp_path / "m.ckpt"), "--with-optimizer"]) == 0
    loaded = torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert torch.equal(loaded["optimizer_states"][0]["state"][0]["exp_avg"], Sample(step=2).moments["embed.weight"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["ls"],
        ["ls", "nosuch://bucket/ckpts"],
        ["verify", "DIR", "--tag", "../x"],
        ["export", "DIR"],
        ["export", "DIR", "OUT", "--max-shard-size", "huge"],
        ["export", "DIR", "OUT", "--dtype", "int8"],
        ["export", "DIR", "OUT.safetensors", "--with-optimizer"],
        ["export", "DIR", ""],
        ["export", "DIR", "DIR"],
        ["export", "DIR", "DIR/latest", "--max-shard-size", "1GB"],
        ["export", "DIR", "s3://bucket"],
        ["export", "DIR", "nosuch://bucket/m.ckpt"],
        ["inspect", "DIR", "--plot", "owners.gif"],
        ["diff", "DIR"],
        ["prune", "DIR"],
        ["prune", "DIR", "--keep-last", "0"],
        ["prune", "DIR", "--keep-last", "1", "--keep-every-n-steps", "x"],
        ["import-fsdp", "DIR", "OUT", "--submodule", "net."],
    ],
)
def test_a_wrong_use_is_2(save_dir: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([argument.replace("DIR", str(save_dir)) for argument in arguments])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    name = "lightning-zero" if arguments in ([], ["dance"]) else f"lightning-zero {arguments[0]}"
    assert line.startswith(f"{name}: ")
    assert line.endswith(f" (see {name} --help)")


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls", "nowhere"],
        ["verify", "nowhere"],
        ["verify", "DIR", "--tag", "gone"],
        ["export", "nowhere", "OUT"],
        ["inspect", "nowhere"],
        ["inspect", "DIR", "--tag", "gone"],
        ["diff", "DIR", "nowhere"],
        ["prune", "nowhere", "--keep-last", "1"],
        ["prune", "DIR/step=1.ckpt", "--keep-last", "1"],
        ["import-fsdp", "nowhere", "OUT"],
    ],
)
def test_an_error_is_1_and_one_line(save_dir: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument.replace("DIR", str(save_dir)) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "DIR/step=1.ckpt", "--tag", "step=2.ckpt"], "is one checkpoint already"),
        (["verify", "DIR/notes"], "is not a checkpoint of lightning_zero"),
        (["ls", "DIR/notes"], "is not a checkpoint of lightning_zero"),
        (["export", "DIR", "DIR/notes/model.ckpt"], "notes is no directory; give another place"),
        (["import-deepspeed", "DIR/../notes", "OUT"], "notes is no file of a DeepSpeed checkpoint's"),
        (["import-fsdp", "DIR/../notes", "OUT"], "a full checkpoint needs no import: pass it as ckpt_path"),
        (["import-deepspeed", "DIR", "OUT"], "needs no import"),
        (["import-deepspeed", "DIR/step=1.ckpt", "OUT"], "needs no import"),
        (["import-fsdp", "DIR", "OUT"], "needs no import"),
    ],
)
def test_a_path_that_is_something_else_is_told_from_one_without_a_checkpoint(
    save_dir: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (save_dir / "notes").touch()
    (save_dir.parent / "notes").touch()
    assert main([argument.replace("DIR", str(save_dir)) for argument in arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_directory_above_names_the_save_directories_in_it(
    save_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    above = save_dir.parent
    (above / "logs").mkdir()
    for command, *more in ("ls",), ("verify",), ("inspect",), ("export", str(above / "model.ckpt")):
        main([command, str(above), *more])
        said = "".join(capsys.readouterr())
        assert said.endswith(f"; there are some in {save_dir}\n"), said


def test_a_file_of_a_checkpoint_stands_for_it(save_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, tag in (("latest", "step=2.ckpt"), ("step=1.ckpt/manifest.json", "step=1.ckpt")):
        assert main(["verify", str(save_dir / file)]) == 0
        assert f"{tag}: sound" in capsys.readouterr().out
        assert main(["ls", str(save_dir / file)]) == 0
        assert f"\n{tag} " in capsys.readouterr().out


def test_a_tag_that_lost_its_manifest_is_told_from_a_save_directory(
    save_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tag = save_dir / "step=2.ckpt"
    (tag / "manifest.json").unlink()
    for command, *more in ("verify",), ("inspect",), ("export", "OUT"), ("diff", str(tag)):
        assert main([command, str(tag), *more]) == 1
        said = "".join(capsys.readouterr())
        assert f"{tag / 'manifest.json'} can't be read: No such file or directory" in said, said
        assert "latest" not in said, said
    assert main(["ls", str(tag)]) == 0
    assert "INCOMPLETE" in capsys.readouterr().out


def test_ls_says_that_latest_names_what_is_not_there(save_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (save_dir / "latest").write_text("step=9.ckpt")
    assert main(["ls", str(save_dir)]) == 0
    said = capsys.readouterr()
    assert said.err == f"lightning-zero: {save_dir / 'latest'} names 'step=9.ckpt', which is not there\n"
    assert "step=2.ckpt" in said.out


def test_a_wrong_value_is_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--params", "many"], ["--params", "7B", "--world-size", "x"], ["--model-args", "{"]):
        with pytest.raises(SystemExit):
            main(["plan", *arguments])
        assert "invalid" not in capsys.readouterr().err  # that would be argparse, with a function's name


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"lightning_zero {__version__}\n")


def command(*arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own, which fails if torch, NumPy or Lightning is imported."""
    script = (
        "import sys; sys.argv = ['lightning-zero', *sys.argv[1:]]\n"
        "from lightning_zero.cli import main; status = main()\n"
        "assert not {'torch', 'lightning', 'numpy'} & sys.modules.keys(); sys.exit(status)"
    )
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], text=True, **options)


def test_what_a_stores_own_package_says_is_one_line_too(tmp_path: Path) -> None:
    quiet = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    alone = {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    done = command("ls", "s3://bucket/ckpts", capture_output=True, env=quiet | alone)
    assert (done.returncode, done.stderr) == (1, "lightning-zero: Unable to locate credentials\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls", "DIR"],
        ["verify", "DIR"],
        ["inspect", "DIR"],
        ["diff", "DIR", "DIR"],
        ["prune", "DIR", "--keep-last", "1"],
        ["plan", "--params", "7e9", "--world-size", "64"],
    ],
)
def test_to_look_needs_neither_torch_nor_lightning(save_dir: Path, arguments: list[str]) -> None:
    commit.write_latest(save_dir, "step=1.ckpt")
    done = command(*(argument.replace("DIR", str(save_dir)) for argument in arguments), capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_to_draw_needs_neither_torch_nor_lightning(save_dir: Path) -> None:
    script = (
        "import sys; from lightning_zero.cli import main; status = main()\n"
        "assert not {'torch', 'lightning'} & sys.modules.keys(); sys.exit(status)"
    )
    arguments = ["inspect", save_dir / "step=1.ckpt", "--plot", save_dir / "owners.svg"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["ls", "inspect", "verify", "diff", "export", "prune", "plan"])
def test_the_help_of_each_command_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    _, example = capsys.readouterr().out.split("example:\n")
    assert all(line.startswith(f"  lightning-zero {name} ") for line in example.strip("\n").splitlines())


def test_names_in_any_script_are_printed_where_they_have_no_letters(tmp_path: Path) -> None:
    save_dir = tmp_path / "gewichte_für_später"
    Sample(shapes={"重み": (3,)}).save(save_dir / "tag")
    limited = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for name in ("ls", "inspect", "verify"):
        done = command(name, save_dir, capture_output=True, env=limited)
        assert (done.returncode, done.stderr) == (0, "")
    assert r"f\xfcr" in done.stdout


def test_nobody_who_stops_reading_is_complained_to(save_dir: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for arguments in (
        ["ls", save_dir],
        ["inspect", save_dir, "--json"],
        ["plan", "--params", "1", "--world-size", "2"],
    ):
        done = command(*arguments, stdout=writing, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (141, "")
    assert command("--help", stdout=writing, stderr=subprocess.PIPE).stderr == ""
    os.close(writing)


def test_where_there_is_nothing_to_print_to_nothing_is_printed(save_dir: Path) -> None:
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "lightning_zero"]
    for arguments in (["ls", save_dir], ["--version"]):
        assert subprocess.run([*closed, *arguments], text=True, stderr=subprocess.PIPE).returncode == 0
    done = subprocess.run([*closed, "ls", save_dir / "no"], text=True, stderr=subprocess.PIPE)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_control_c_ends_quietly(
    save_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commit, "list_tags", interrupt)
    assert main(["ls", str(save_dir)]) == 130
    assert capsys.readouterr() == ("", "")


def test_long_work_shows_its_rate_on_a_terminal_and_nowhere_else() -> None:
    pytest.importorskip("rich")
    script = (
        "import time; from lightning_zero.cli.progress import progress_bar\n"
        "with progress_bar('verifying', 10**9, quiet=False) as advance:\n"
        "    for _ in range(5): advance(2 * 10**8); time.sleep(0.05)"
    )
    terminal, slave = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = [sys.executable, "-c", "import sys; sys.argv[0] = 'lightning-zero'\n" + script]
    subprocess.run(process, stderr=slave, check=True, env=environment)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # Linux says so where all is read
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    assert b"verifying" in shown
    assert b"GB/s" in shown
    assert not subprocess.run(process, capture_output=True, check=True).stderr
