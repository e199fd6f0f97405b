"""Every way by which a user's process comes to read a checkpoint, each going in as far as it leads.

An entrance gives None, or raises. The command is an entrance too: what it says with its exit status is raised again, so
that one table of attacks serves all. None of them may change anything but the export that it was asked for: `enter_all`
compares everything in and around the save directory before and after.

The attacked lie as the fixture `tag` lays them out: `…/ckpts/tag`, named by `latest`, and beside `ckpts` a sound
checkpoint that nobody asked for, `…/outside/evil`.
"""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.export import convert_zero_checkpoint_to_fp32_state_dict
from lightning_zero.checkpoint.integrity import Depth
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.resolution import is_checkpoint, resolve
from lightning_zero.checkpoint.state_dict import (
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)
from lightning_zero.checkpoint.tensors import LazyTensor
from lightning_zero.cli import main
from lightning_zero.errors import ZeroError
from tests.checkpoint.sample import SHAPES

Entrance = Callable[[Path], object]


class RefusedByTheCommand(ZeroError):
    """The command ended in 1 and said why in one line, or, `verify`, listed what is wrong."""


def command(*arguments: object) -> tuple[int, str, str]:
    """The exit status, stdout and stderr of `lightning-zero`."""
    out, err, show = io.StringIO(), io.StringIO(), warnings.showwarning
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = int(error.code or 0)
    finally:
        warnings.showwarning = show
    return status, out.getvalue(), err.getvalue()


def read_all(values: Iterable[object]) -> None:
    """Whatever of a loaded checkpoint is still in the shards."""
    for value in values:
        if isinstance(value, LazyTensor):
            value.contiguous()


def _open(verify: Depth) -> Entrance:
    def enter(tag: Path) -> None:
        checkpoint = Checkpoint(tag, verify=verify)
        read_all(checkpoint.state_dict().values())
        whole = checkpoint.lightning_checkpoint()
        read_all(whole["state_dict"].values())
        for state in whole["optimizer_states"]:
            for parameter in state["state"].values():
                read_all(parameter.values())
        for rank in range(min(checkpoint.manifest.world_size, 9)):
            checkpoint.rank_state(rank)

    return enter


def _by_tag(tag: Path) -> None:
    assert is_checkpoint(tag.parent)
    _open("sizes")(resolve(tag.parent, tag.name))


def _by_latest(verify: Depth) -> Entrance:
    def enter(tag: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = resolve(tag.parent, verify=verify)
        if found != tag:
            raise RefusedByTheCommand(f"{found} was taken instead")
        _open(verify)(tag)

    return enter


def module() -> nn.Module:
    """With the names and shapes of the sample."""
    root = nn.Module()
    for name, shape in SHAPES.items():
        *path, last = name.split(".")
        owner: Any = root
        for part in path:
            owner.add_module(part, getattr(owner, part, nn.Module()))
            owner = getattr(owner, part)
        owner.register_parameter(last, nn.Parameter(torch.zeros(shape)))
    root.frozen = nn.Parameter(torch.zeros(11, 3), requires_grad=False)
    root.register_buffer("counter", torch.tensor(0))
    root.head = nn.Module()
    root.head.weight = root.get_parameter("embed.weight")
    return root


def _fp32(tag: Path) -> None:
    get_fp32_state_dict_from_zero_checkpoint(tag)


def _fp32_lazy(tag: Path) -> None:
    for tensor in get_fp32_state_dict_from_zero_checkpoint(tag.parent, tag.name, lazy_mode=True).values():
        tensor.contiguous()


def _fill(tag: Path) -> None:
    load_state_dict_from_zero_checkpoint(module(), tag)


def _convert(name: str, max_shard_size: int | None = None) -> Entrance:
    def enter(tag: Path) -> None:
        output = tag.parent.parent / "exported" / f"to_{name}" / name
        try:
            convert_zero_checkpoint_to_fp32_state_dict(tag, output, max_shard_size=max_shard_size)
        except BaseException:
            assert not output.parent.exists() or not any(output.parent.iterdir()), "half an export was left behind"
            raise

    return enter


def _command(name: str, *after: str, by_tag: bool = False) -> Entrance:
    def enter(tag: Path) -> None:
        where = [tag.parent, *after, "--tag", tag.name] if by_tag else [tag, *after]
        output = [tag.parent.parent / "exported" / "by_command.ckpt"] if name == "export" else []
        status, out, err = command(name, where[0], *output, *where[1:])
        assert "Traceback" not in err
        assert (out + err).replace("\n", "").isprintable(), "control codes for the terminal"
        if name == "inspect" and status == 0:
            if not any(text in out for text in ("INCOMPLETE", '"complete": false')):
                return
        elif name == "ls":
            assert status == 0
            if not any(text in out for text in ("INCOMPLETE", '"complete": false', "no checkpoints in", "[]")):
                return
        elif status == 0:
            return
        else:
            assert status == 1
            assert name == "verify" or (err.startswith("lightning-zero: ") and err.count("\n") == 1), err
        raise RefusedByTheCommand(out + err)

    return enter


def _with_itself(tag: Path) -> None:
    _command("diff", str(tag), "--all")(tag)


def _list(tag: Path) -> None:
    found = {info.name: info for info in commit.list_tags(tag.parent)}
    if tag.name not in found:
        raise RefusedByTheCommand("not listed")
    if not found[tag.name].complete:
        raise RefusedByTheCommand(found[tag.name].problem)


READING: dict[str, Entrance] = {
    "Checkpoint(verify='none')": _open("none"),
    "Checkpoint(verify='sizes')": _open("sizes"),
    "Checkpoint(verify='full')": _open("full"),
    "resolve by the tag": _by_tag,
    "resolve by latest": _by_latest("sizes"),
    "resolve by latest, verify='full'": _by_latest("full"),
    "get_fp32_state_dict": _fp32,
    "get_fp32_state_dict, lazy": _fp32_lazy,
    "load_state_dict": _fill,
    "convert to .safetensors": _convert("model.safetensors"),
    "convert to .ckpt": _convert("model.ckpt"),
    "convert to a folder": _convert("model", 4000),
    "list_tags": _list,
    "lightning-zero ls": _command("ls"),
    "lightning-zero ls --json": _command("ls", "--json"),
    "lightning-zero inspect": _command("inspect"),
    "lightning-zero inspect --json": _command("inspect", "--json", by_tag=True),
    "lightning-zero diff": _with_itself,
    "lightning-zero verify": _command("verify"),
    "lightning-zero verify --tag": _command("verify", "--json", by_tag=True),
    "lightning-zero export": _command("export", by_tag=True),
}
"""By what a user types, the way in: a function of the tag's directory."""


def enter_all(tag: Path) -> dict[str, ZeroError | None]:
    """Go in everywhere: what each entrance raised, if anything. What is no ZeroError comes out as it is."""
    outcomes: dict[str, ZeroError | None] = {}
    with unchanged(tag.parent.parent):
        for name, enter in READING.items():
            try:
                enter(tag)
            except ZeroError as error:
                outcomes[name] = error
            except Exception as error:
                raise AssertionError(f"through {name} came {type(error).__name__}: {error}") from error
            else:
                outcomes[name] = None
    assert all(str(error) for error in outcomes.values() if error), "an error that says nothing"
    return outcomes


def refused_everywhere(tag: Path) -> None:
    """No entrance lets this checkpoint in."""
    outcomes = enter_all(tag)
    assert all(outcomes.values()), f"let in by {[name for name, error in outcomes.items() if error is None]}"


@contextlib.contextmanager
def unchanged(*places: Path) -> Iterator[None]:
    """What lies in these places is afterwards what it was before, but for what was exported."""
    before = [snapshot(place) for place in places]
    yield
    assert [snapshot(place) for place in places] == before


def snapshot(place: Path) -> dict[str, tuple[object, ...]]:
    """Every name below, and what can be told of it without following it; what is small, with its content."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(place):
        if "exported" in folders:
            folders.remove("exported")
        for name in [*folders, *files]:
            path = Path(folder, name)
            about = path.lstat()
            content: object = None
            if stat.S_ISLNK(about.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(about.st_mode) and about.st_size < 1 << 20:
                content = path.read_bytes()
            found[str(path)] = (about.st_mode, about.st_ino, about.st_size, about.st_mtime_ns, content)
    return found
