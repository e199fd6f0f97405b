"""Pickles that would run something, or wear something out: in `trainer.pt` and in a rank's own state.

All are sealed with right checksums. Whether a bomb went off is seen by the directory that it makes.
"""

import argparse
import contextlib
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict

from lightning_zero.checkpoint.export import convert_zero_checkpoint_to_fp32_state_dict
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.state_dict import get_fp32_state_dict_from_zero_checkpoint
from lightning_zero.errors import CorruptCheckpointError, UntrustedContentError, ZeroError
from lightning_zero.plugin.checkpoint_io import LoadedCheckpoint, ZeroCheckpointIO
from lightning_zero.plugin.resume import Resume
from tests.attacks.entrances import READING, command, enter_all
from tests.attacks.forge import Bomb, Calls, archive, archived_pickle, pickled, saved, set_rank_state, set_trainer
from tests.checkpoint.sample import Sample

TRAINER = dict(Sample(world_size=2).shared.trainer)


def legacy(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def tar(content: bytes) -> bytes:
    """The oldest of torch's formats."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def global_pickle(module: str, name: str, argument: str) -> bytes:
    """`module.name(argument)`, by the opcodes alone: the name need not exist where the file is forged."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickled(argument)[2:-1] + b"\x85R."


BOMBS: dict[str, Callable[[Path], bytes]] = {
    "in the hyper-parameters": lambda sign: saved(TRAINER | {"hyper_parameters": {"x": Bomb(sign)}}),
    "in place of the dict": lambda sign: saved(Bomb(sign)),
    "for a key": lambda sign: saved(TRAINER | {"callbacks": [Bomb(sign)]}),
    "in an optimizer's state": lambda sign: saved(TRAINER | {"optimizer_states": [Bomb(sign)]}),
    "in torch's older format": lambda sign: legacy(TRAINER | {"x": Bomb(sign)}),
    "in torch's oldest format": lambda sign: tar(pickled(Bomb(sign))),
    "in a bare pickle": lambda sign: pickled(Bomb(sign)),
    "in a bare pickle of the newest protocol": lambda sign: pickled(Bomb(sign), pickle.HIGHEST_PROTOCOL),
    "in an archive of another writer's": lambda sign: archived_pickle(pickled(Bomb(sign))),
    "in an archive of TorchScript": lambda sign: archive(
        {"data.pkl": pickled(Bomb(sign)), "constants.pkl": pickled(Bomb(sign)), "version": b"3"}
    ),
    "by the name of eval": lambda sign: archived_pickle(
        global_pickle("builtins", "eval", f"__import__('os').mkdir({str(sign)!r})")
    ),
    "by a name within a name": lambda sign: archived_pickle(global_pickle("os", "path.os.mkdir", str(sign))),
    "by torch's own importer": lambda sign: archived_pickle(
        global_pickle("torch.package", "PackageImporter", str(sign))
    ),
    "by torch's own loader": lambda sign: saved({"x": Calls(torch.load, str(sign))}),
}


@pytest.mark.parametrize("where", BOMBS)
def test_a_bomb_in_the_trainer_file_does_not_go_off(where: str, tag: Path, tmp_path: Path) -> None:
    sign = tmp_path / "went off"
    set_trainer(tag, BOMBS[where](sign))
    outcomes = enter_all(tag)
    for name in ("Checkpoint(verify='none')", "Checkpoint(verify='full')", "convert to .ckpt", "lightning-zero export"):
        assert outcomes[name] is not None, name
    with pytest.raises(ZeroError):
        ZeroCheckpointIO().load_checkpoint(tag)
    assert not sign.exists()


@pytest.mark.parametrize("where", BOMBS)
def test_a_bomb_in_a_ranks_own_state_does_not_go_off(where: str, tag: Path, tmp_path: Path) -> None:
    sign = tmp_path / "went off"
    for rank in (0, 1):
        set_rank_state(tag, rank, BOMBS[where](sign))
    assert not any(enter_all(tag).values())  # it is given back as it is
    checkpoint = ZeroCheckpointIO(verify="full").load_checkpoint(tag)
    assert isinstance(checkpoint, LoadedCheckpoint)
    for world_size in (1, 2, 3):
        with pytest.raises((UntrustedContentError, CorruptCheckpointError), match="the state of rank 0"):
            Resume(checkpoint, rank=0, world_size=world_size, by_steps=True, weights_only=True)
    assert not sign.exists()


def test_a_bomb_is_named_with_the_way_to_trust_it(tag: Path, tmp_path: Path) -> None:
    set_trainer(tag, saved(TRAINER | {"hyper_parameters": Bomb(tmp_path / "went off")}))
    with pytest.raises(UntrustedContentError, match=r"trainer\.pt holds objects of posix\.mkdir.*weights_only=False"):
        Checkpoint(tag).trainer()
    status, _, error = command("export", tag, tmp_path / "x.ckpt")
    assert (status, error.count("\n")) == (1, 1)
    assert "posix.mkdir" in error
    assert "--unsafe" in error


@pytest.mark.parametrize("where", BOMBS)
def test_a_bomb_does_not_go_off_in_an_export_that_trusts_it(where: str, tag: Path, tmp_path: Path) -> None:
    """It is written as it is, for whoever loads the export."""
    sign = tmp_path / "went off"
    set_trainer(tag, BOMBS[where](sign))
    status, _, error = command("export", tag, tmp_path / "x.ckpt", "--unsafe")
    assert status == 0 or error.count("\n") == 1
    assert not sign.exists()
    if where == "in the hyper-parameters":
        with pytest.raises(pickle.UnpicklingError, match="mkdir"):
            torch.load(tmp_path / "x.ckpt", weights_only=True)
        torch.load(tmp_path / "x.ckpt", weights_only=False)
        assert sign.exists()


def test_classes_that_torch_was_told_of_are_exported(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Namespace"):
        Sample(trainer={"hyper_parameters": {"args": argparse.Namespace(lr=0.1)}}).save(tmp_path / "tag")
    with pytest.raises(UntrustedContentError, match=r"argparse\.Namespace"):
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "x.ckpt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "x.ckpt")
        loaded = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert loaded["hyper_parameters"]["args"].lr == 0.1


@pytest.mark.parametrize(
    "value", [AttributeDict(a=1), defaultdict(list, a=[1]), deque([1]), {"x": frozenset((1,))}, {"x": Path("a")}]
)
def test_classes_that_torch_refuses_are_named(value: object, tmp_path: Path) -> None:
    name = type(value["x"] if isinstance(value, dict) and "x" in value else value).__name__
    with pytest.warns(UserWarning, match=name):
        Sample(trainer={"hyper_parameters": {"value": value}}).save(tmp_path / "tag")
    for read in (Checkpoint(tmp_path / "tag").trainer, Checkpoint(tmp_path / "tag").trainer_content):
        with pytest.raises(UntrustedContentError, match=name):
            read()
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "x.ckpt", weights_only=False)
    assert torch.load(tmp_path / "x.ckpt", weights_only=False)["hyper_parameters"]["value"] == value


def test_a_bomb_touches_neither_the_model_nor_its_export_to_safetensors(tag: Path, tmp_path: Path) -> None:
    set_trainer(tag, saved(Bomb(tmp_path / "went off")))
    assert get_fp32_state_dict_from_zero_checkpoint(tag)["bias"].shape == (19,)
    assert command("export", tag, tmp_path / "x.safetensors")[0] == 0
    assert not (tmp_path / "went off").exists()


def test_what_the_offender_is_called_does_not_reach_the_terminal_raw(tag: Path, tmp_path: Path) -> None:
    for module in ("\x1b]0;owned\x07\x1b[2J", "x" * 10**6):
        set_trainer(tag, archived_pickle(global_pickle(module, "\x1b[31m", "")))
        status, _, error = command("export", tag, tmp_path / "x.ckpt")
        assert (status, error.count("\n")) == (1, 1)
        assert "\x1b" not in error
        assert len(error) < 2000


def nested(depth: int) -> Any:
    made: Any = []
    for _ in range(depth):
        made = [made]
    return made


def laughs() -> Any:
    """A billion of them, in a hundred bytes."""
    made: Any = ["ha"]
    for _ in range(40):
        made = [made, made]
    return made


def circle() -> Any:
    made: dict[str, Any] = {}
    made["itself"] = made
    return made


def holding_itself(count: int) -> bytes:
    """A tuple of lists, each of which holds it, and which no pickler of Python's own could go through."""
    numbers = [struct.pack("<I", number) for number in range(1, count + 2)]
    *lists, whole = numbers
    empty = b"".join(b"]r" + number for number in lists)
    filled = b"".join(b"j" + number + b"j" + whole + b"a" for number in lists)  # and left on the stack
    return b"\x80\x02}q\x00K\x01(" + empty + b"tr" + whole + b"s" + filled + b"h\x00."


def deep_pickle(depth: int) -> bytes:
    """Lists within lists, deeper than the pickler would go."""
    return b"\x80\x02}X\x01\x00\x00\x00x" + b"]" * depth + b"a" * (depth - 1) + b"s."


def doctored(old: bytes, new: bytes) -> bytes:
    """A trainer with a tensor of seven elements, and something else in its pickle."""
    with zipfile.ZipFile(io.BytesIO(saved(TRAINER | {"x": torch.ones(7)}))) as whole:
        records = {name.partition("/")[2]: whole.read(name) for name in whole.namelist()}
    assert old in records["data.pkl"]
    return archive(records | {"data.pkl": records["data.pkl"].replace(old, new)})


NOT_A_TRAINER: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "one byte": lambda: b"\x80",
    "text": lambda: b"hello",
    "zeros": lambda: bytes(1000),
    "an empty archive": lambda: archive({}),
    "an archive of other things": lambda: archive({"x": b"y"}),
    "an archive with a pickle of nothing": lambda: archived_pickle(b""),
    "an archive with a pickle without an end": lambda: archived_pickle(b"\x80\x02}"),
    "an archive of a future version": lambda: archive({"data.pkl": pickled({}), "version": b"9" * 30}),
    "an archive cut short": lambda: saved(TRAINER)[:-100],
    "a pickle that pops what isn't there": lambda: archived_pickle(b"\x80\x020000."),
    "a pickle with a memo that isn't there": lambda: archived_pickle(b"\x80\x02h\x05."),
    "a pickle of an unknown storage": lambda: archived_pickle(b"\x80\x02K\x05Q."),
    "a list": lambda: saved([1, 2]),
    "a tensor": lambda: saved(torch.zeros(3)),
    "None": lambda: saved(None),
    "a number": lambda: saved(7),
    "no optimizers": lambda: saved({"state_dict": {}}),
    "fewer optimizers": lambda: saved(TRAINER | {"optimizer_states": []}),
    "optimizers in a dict": lambda: saved(TRAINER | {"optimizer_states": {0: {"state": {}}}}),
    "an optimizer that is a list": lambda: saved(TRAINER | {"optimizer_states": [[1]]}),
    "an optimizer without a state": lambda: saved(TRAINER | {"optimizer_states": [{"param_groups": []}]}),
    "an optimizer with a list for a state": lambda: saved(TRAINER | {"optimizer_states": [{"state": [1, 2]}]}),
    "a state that is a number": lambda: saved(TRAINER | {"optimizer_states": [{"state": {0: 1}}]}),
    "a state dict that is a list": lambda: saved(TRAINER | {"state_dict": [1]}),
    "a state dict that is None": lambda: saved(TRAINER | {"state_dict": None}),
    "keys that are numbers": lambda: saved({0: 1, None: 2, (1, 2): 3}),
    "a storage that is larger than its record": lambda: doctored(b"K\x07t", b"M\xff\xfft"),
    "a storage that is smaller than its record": lambda: doctored(b"K\x07t", b"K\x06t"),
    "a storage of a negative size": lambda: doctored(b"K\x07t", b"J\xff\xff\xff\xfft"),
    "a storage without a record": lambda: doctored(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007"),
    "a storage beside its folder": lambda: doctored(b"X\x01\x00\x00\x000", b"X\x07\x00\x00\x00../../x"),
    "a storage of no class": lambda: doctored(b"ctorch\nFloatStorage\n", b"X\x01\x00\x00\x00x"),
    "two pickles": lambda: archive({"data.pkl": pickled({}), "../x/data.pkl": b"x", "version": b"3"}).replace(
        b"archive/../x/data.pkl", b"archi/" + b"x" * 6 + b"/data.pkl"
    ),
    "a room of a terabyte": lambda: saved({"x": Calls(bytearray, 2**40)}),
    "a tensor of a terabyte": lambda: saved({"x": Calls(torch.empty, 2**38)}),
}

ODD_TRAINERS: dict[str, Callable[[], bytes]] = {
    "lists as deep as the pickler goes": lambda: saved(TRAINER | {"x": nested(400)}),
    "lists that are deeper": lambda: archived_pickle(deep_pickle(20_000)),
    "a billion laughs": lambda: saved(TRAINER | {"x": laughs()}),
    "a circle": lambda: saved(TRAINER | {"x": circle()}),
    "a tensor of a terabyte on four bytes": lambda: saved(TRAINER | {"x": torch.zeros(1).expand(2**38)}),
    "a tensor on no device": lambda: saved(TRAINER | {"x": torch.zeros(2**38, device="meta")}),
    "a sparse tensor": lambda: saved(TRAINER | {"x": torch.eye(3).to_sparse()}),
    "a state dict that is ordered": lambda: saved(TRAINER | {"state_dict": OrderedDict(x=1)}),
    "a state dict with keys that are numbers": lambda: saved(TRAINER | {"state_dict": {0: 1}}),
    "a state dict with another tensor": lambda: saved(TRAINER | {"state_dict": {"bias": torch.zeros(2)}}),
    "records that were compressed": lambda: archived_pickle(pickled({"x": "y" * 10_000}), compressed=True),
    "a pickle that was compressed from 100 megabytes": lambda: archived_pickle(
        b"\x80\x02}." + bytes(100 << 20), compressed=True
    ),
}


NEEDS_THE_TRAINER = {name for name in READING if name.startswith(("Checkpoint", "resolve", "convert to .ckpt"))}


@pytest.mark.parametrize("what", NOT_A_TRAINER)
def test_a_trainer_file_is_refused_that_holds(what: str, tag: Path) -> None:
    set_trainer(tag, NOT_A_TRAINER[what]())
    outcomes = enter_all(tag)
    assert outcomes["Checkpoint(verify='sizes')"] is not None
    assert {name for name, error in outcomes.items() if error} <= NEEDS_THE_TRAINER | {"lightning-zero export"}
    with pytest.raises(ZeroError):
        ZeroCheckpointIO().load_checkpoint(tag)


@pytest.mark.parametrize("what", NOT_A_TRAINER)
def test_a_ranks_own_state_is_refused_or_a_dict_that_holds(what: str, tag: Path) -> None:
    set_rank_state(tag, 0, NOT_A_TRAINER[what]() or b"\0")
    checkpoint = ZeroCheckpointIO().load_checkpoint(tag)
    assert isinstance(checkpoint, LoadedCheckpoint)
    with contextlib.suppress(ZeroError):
        Resume(checkpoint, rank=0, world_size=2, by_steps=True, weights_only=True)


WEARING: dict[str, Callable[[], bytes]] = {
    "makes a terabyte": lambda: saved(TRAINER | {"x": Calls(bytearray, 2**40)}),
    "sets a state of what has none": lambda: archived_pickle(b"\x80\x02}K\x00c__builtin__\nset\n]\x85R}K\x01K\x02sbs."),
    "holds itself in many ways": lambda: archived_pickle(holding_itself(20_000)),
}


@pytest.mark.parametrize("what", WEARING)
def test_nothing_is_exported_that(what: str, tag: Path, tmp_path: Path) -> None:
    set_trainer(tag, WEARING[what]())
    with pytest.raises(CorruptCheckpointError, match=r"trainer\S*\.pt can't be"):
        convert_zero_checkpoint_to_fp32_state_dict(tag, tmp_path / "model.ckpt")
    assert not list(tmp_path.glob("*model*"))


@pytest.mark.filterwarnings("ignore:Serializing tensors on the meta device")
@pytest.mark.parametrize("what", ODD_TRAINERS)
def test_nothing_but_a_named_error_comes_of_a_trainer_file_that_holds(what: str, tag: Path) -> None:
    set_trainer(tag, ODD_TRAINERS[what]())
    enter_all(tag)


def test_the_bombs_are_armed(tmp_path: Path) -> None:
    """Whoever trusts them has what they do."""
    for number, make in enumerate((saved, legacy, pickled)):
        sign = tmp_path / str(number)
        content = io.BytesIO(make({"x": Bomb(sign)}))
        if make is pickled:
            pickle.load(content)
        else:
            torch.load(content, weights_only=False)
        assert os.path.isdir(sign)
