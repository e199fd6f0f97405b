"""Paths that lead out: in tags, in `latest`, in the manifest, and by links. What lies outside is neither read nor
touched, although a sound checkpoint waits there."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.commit import InvalidTagError
from lightning_zero.checkpoint.export import convert_zero_checkpoint_to_fp32_state_dict
from lightning_zero.checkpoint.resolution import is_checkpoint, resolve
from lightning_zero.checkpoint.retention import Retention
from lightning_zero.checkpoint.state_dict import (
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)
from lightning_zero.errors import CheckpointNotFoundError, CorruptCheckpointError, ZeroError
from tests.attacks.entrances import command, module, refused_everywhere, unchanged
from tests.attacks.forge import edit_manifest, read_json, replace
from tests.checkpoint.sample import Sample

TAGS = [
    "../outside/evil",
    "..",
    ".",
    "",
    "../ckpts/tag",
    "tag/",
    "tag/../../outside/evil",
    "./tag",
    "/etc",
    "/",
    "..\\outside\\evil",
    "C:\\x",
    "latest",
    ".hidden",
    ".staging-x",
    ".trash-x",
    "tag\n",
    "tag\0",
    "\x1b[2J",
    "a\u202eb",
    "\ud800",
    "x" * 201,
    "ü" * 101,
]

BY_TAG: dict[str, Callable[[Path, str], object]] = {
    "resolve": resolve,
    "get_fp32_state_dict": get_fp32_state_dict_from_zero_checkpoint,
    "load_state_dict": lambda save_dir, tag: load_state_dict_from_zero_checkpoint(module(), save_dir, tag),
    "convert": lambda save_dir, tag: convert_zero_checkpoint_to_fp32_state_dict(
        save_dir, save_dir.parent / "exported" / "x.ckpt", tag
    ),
    "remove_tag": commit.remove_tag,
    "save": lambda save_dir, tag: commit.commit(save_dir / ".staging-mine", save_dir, tag),
}


@pytest.mark.parametrize("name", TAGS, ids=ascii)
def test_a_tag_that_is_no_plain_name_is_refused_by_everything_that_takes_one(name: str, tag: Path) -> None:
    save_dir = tag.parent
    (save_dir / ".staging-mine").mkdir()
    with unchanged(save_dir.parent):
        for what, enter in BY_TAG.items():
            if what == "remove_tag" and name == ".hidden":
                continue  # a caller's own, which lies in the save directory
            with pytest.raises(InvalidTagError):
                enter(save_dir, name)
        for words in (["verify", save_dir], ["export", save_dir, save_dir / "out.ckpt"]):
            status, out, err = command(*words, f"--tag={name}")
            assert (status, out) == (2, "")
            assert "Traceback" not in err


def latest(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


LATESTS: dict[str, Callable[[Path], object]] = {
    **{f"{name!a}": latest(name.encode(errors="surrogatepass")) for name in TAGS if name.strip() != "tag"},
    "a name of a megabyte": latest(b"x" * 2**20),
    "nothing but zeros": latest(bytes(4096)),
    "bytes that are no text": latest(b"\xff\xfe"),
    "two lines": latest(b"tag\n../outside/evil\n"),
    "a tag that isn't there": latest(b"gone"),
    "a link to a file outside": lambda path: path.symlink_to("../outside/latest"),
    "an absolute link": lambda path: path.symlink_to(path.parent.parent / "outside" / "latest"),
    "a link to itself": lambda path: path.symlink_to("latest"),
    "a link to the tag": lambda path: path.symlink_to("tag"),
    "a directory": lambda path: path.mkdir(),
    "a pipe that nobody writes to": os.mkfifo,
}


@pytest.mark.parametrize("what", LATESTS)
def test_a_latest_is_not_believed_that_is(what: str, tag: Path, outside: Path) -> None:
    (outside / "latest").write_text("tag")
    (tag.parent / "latest").unlink()
    LATESTS[what](tag.parent / "latest")
    with unchanged(tag.parent.parent):
        assert is_checkpoint(tag.parent)
        with pytest.warns(UserWarning, match="newest sound checkpoint is taken instead"):
            assert resolve(tag.parent) == tag
        assert command("verify", tag.parent)[0] == 1
        status, out, _ = command("ls", tag.parent)
        assert (status, "latest" in out) == (0, False)
    (tag / "manifest.json").unlink()
    with unchanged(tag.parent.parent), pytest.raises(CheckpointNotFoundError):
        resolve(tag.parent)


def test_a_new_latest_takes_the_place_of_a_link_and_not_of_what_it_leads_to(tag: Path, outside: Path) -> None:
    (tag.parent / "latest").unlink()
    (tag.parent / "latest").symlink_to(outside / "sentinel")
    with unchanged(outside):
        commit.write_latest(tag.parent, "tag")
    assert not (tag.parent / "latest").is_symlink()
    assert resolve(tag.parent) == tag


FILES = ["manifest.json", "trainer.pt", "rank-00001-of-00002.safetensors", "frozen-00001-of-00002.safetensors"]

IN_PLACE_OF_A_FILE: dict[str, Callable[[Path, Path], object]] = {
    "an absolute link to the very bytes": lambda path, copy: path.symlink_to(copy),
    "a relative link to the very bytes": lambda path, copy: path.symlink_to(os.path.relpath(copy, path.parent)),
    "a link to a device": lambda path, copy: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path, copy: path.symlink_to(path.name),
    "a link to nothing": lambda path, copy: path.symlink_to("nothing"),
    "a directory": lambda path, copy: path.mkdir(),
    "a pipe that nobody writes to": lambda path, copy: os.mkfifo(path),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", IN_PLACE_OF_A_FILE)
def test_no_entrance_reads_a_file_that_is(what: str, name: str, tag: Path, outside: Path) -> None:
    copy = outside / name
    os.rename(tag / name, copy)
    IN_PLACE_OF_A_FILE[what](tag / name, copy)
    refused_everywhere(tag)


def test_a_socket_is_no_shard(tag: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tag)  # a socket's path is short
    (tag / FILES[2]).unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(FILES[2])
        refused_everywhere(tag)


LINKED_TAGS: dict[str, Callable[[Path, Path], object]] = {
    "absolutely": lambda link, evil: link.symlink_to(evil),
    "relatively": lambda link, evil: link.symlink_to("../outside/evil"),
    "by way of a link in the save directory": lambda link, evil: (
        (link.parent / ".hop").symlink_to(evil),
        link.symlink_to(".hop"),
    ),
    "by way of a tag": lambda link, evil: link.symlink_to("tag/../../outside/evil"),
}


@pytest.mark.parametrize("how", LINKED_TAGS)
def test_a_tag_is_not_followed_that_leads_out(how: str, tag: Path, outside: Path) -> None:
    save_dir, link = tag.parent, tag.parent / "link"
    LINKED_TAGS[how](link, outside / "evil")
    commit.write_latest(save_dir, "link")
    with unchanged(save_dir.parent):
        with pytest.raises(CorruptCheckpointError, match="leaves the save directory"):
            resolve(save_dir, "link")
        with pytest.warns(UserWarning, match="leaves the save directory"):
            assert resolve(save_dir) == tag
        assert [info.name for info in commit.list_tags(save_dir) if info.complete] == ["tag"]
        assert command("verify", save_dir, "--tag", "link")[0] == 1
        assert command("export", save_dir, save_dir / "x.ckpt", "--tag", "link")[0] == 1
    with unchanged(outside):
        assert Retention(1).apply(save_dir) == []
        commit.remove_tag(save_dir, "link")
    assert not os.path.lexists(link)
    assert resolve(save_dir) == tag


@pytest.mark.parametrize("target", [".", "..", "link", "latest", "tag/manifest.json", "/", "nothing"])
def test_a_tag_that_is_a_link_in_a_circle_or_to_no_checkpoint_is_refused(target: str, tag: Path) -> None:
    (tag.parent / "link").symlink_to(target)
    with unchanged(tag.parent.parent):
        with pytest.raises(ZeroError):
            get_fp32_state_dict_from_zero_checkpoint(tag.parent, "link")
        assert "link" not in [info.name for info in commit.list_tags(tag.parent) if info.complete]
        assert resolve(tag.parent) == tag


def test_a_save_under_the_name_of_a_link_replaces_the_link_alone(tag: Path, outside: Path) -> None:
    (tag.parent / "link").symlink_to(outside / "evil")
    with unchanged(outside, tag):
        Sample(step=9).save(tag.parent / "link")
    assert not (tag.parent / "link").is_symlink()
    assert resolve(tag.parent) == tag.parent / "link"


def test_what_is_removed_goes_without_what_its_links_lead_to(tag: Path, outside: Path) -> None:
    for step in (4, 5):
        Sample(step=step).save(tag.parent / f"s{step}")
    for link in ("into", "evil"):
        (tag / link).symlink_to(outside / "evil" if link == "evil" else outside)
    (tag.parent / ".trash-link").symlink_to(outside)
    (tag.parent / ".staging-link").symlink_to(outside)
    (tag.parent / ".trash-tree").mkdir()
    (tag.parent / ".trash-tree" / "link").symlink_to(outside)
    with unchanged(outside):
        assert Retention(1).apply(tag.parent) == ["s4", "tag"]
        commit.clean_leftovers(tag.parent)
    assert not tag.exists()
    assert not os.path.lexists(tag.parent / ".trash-link")


def test_leftovers_that_are_pipes_hold_no_save_up(tag: Path) -> None:
    for name in (".staging-pipe", ".trash-pipe"):
        os.mkfifo(tag.parent / name)
    commit.clean_leftovers(tag.parent)
    Sample(step=9).save(tag.parent / "next")
    assert resolve(tag.parent) == tag.parent / "next"


def test_the_model_of_the_sample_is_what_a_sound_tag_gives(tag: Path) -> None:
    """The scene itself is sound: otherwise every attack would seem to be refused."""
    filled = load_state_dict_from_zero_checkpoint(module(), tag)
    for name, tensor in Sample(world_size=2).state_dict.items():
        assert torch.equal(filled.state_dict()[name], tensor.to(filled.state_dict()[name].dtype))


@pytest.mark.parametrize("name", ["../../outside/evil/rank-00000-of-00002.safetensors", "/etc/passwd", "latest/../x"])
def test_a_shard_that_a_manifest_places_elsewhere_is_not_opened(name: str, tag: Path) -> None:
    edit_manifest(tag, lambda manifest: manifest["files"][0].update(name=name))
    refused_everywhere(tag)


def test_a_shard_may_not_be_another_file_of_the_checkpoint(tag: Path) -> None:
    for name in ("manifest.json", "trainer.pt", read_json(tag)["files"][1]["name"]):
        whole = (tag / "manifest.json").read_bytes()
        edit_manifest(tag, lambda manifest, name=name: manifest["files"][0].update(name=name))
        refused_everywhere(tag)
        replace(tag / "manifest.json", whole)
