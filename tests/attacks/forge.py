"""The attacker's tools: whoever wrote the checkpoint knows the format, and seals what was forged with right checksums.

So an attack meets the validation behind the checksum. Nothing here is of use for anything but a forgery.
"""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash

Json = dict[str, Any]
Edit = Callable[[Json], object]


def seal(content: object) -> str:
    """The text of a manifest, with a checksum that is right."""
    return seal_text(json.dumps(content)[:-1])


def seal_text(body: str) -> str:
    digest = xxhash.xxh3_64_hexdigest(body.encode(errors="surrogatepass"))
    return f'{body},\n"manifest_xxh3": "{digest}"\n}}\n'


def read_json(tag: Path) -> Json:
    """A manifest's content, without its seal."""
    content: Json = json.loads((tag / "manifest.json").read_text())
    del content["manifest_xxh3"]
    return content


def edit_manifest(tag: Path, edit: Edit) -> None:
    content = read_json(tag)
    edit(content)
    replace(tag / "manifest.json", seal(content).encode())


def replace(path: Path, content: bytes) -> None:
    """Another file under the name: a hard link to the old one is not written through."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    replace(path, bytes(content))


def sparse(path: Path, nbytes: int) -> None:
    """A file of that size that takes no room on the disk: what is there, and zeros behind it."""
    content = path.read_bytes() if path.exists() else b""
    replace(path, content)
    os.truncate(path, nbytes)


def set_trainer(tag: Path, content: bytes) -> None:
    """Another `trainer.pt`, and its size and checksum in the manifest."""
    replace(tag / "trainer.pt", content)
    digest = xxhash.xxh3_64_hexdigest(content)
    edit_manifest(tag, lambda manifest: manifest["trainer"].update(nbytes=len(content), xxh3=digest))


def set_header(tag: Path, rank: int, header: bytes) -> None:
    """Another header of as many bytes in a rank's shard, and its checksum in the manifest."""
    entry = read_json(tag)["files"][rank]
    shard = tag / entry["name"]
    assert len(header) == entry["header_nbytes"]
    replace(shard, header + shard.read_bytes()[len(header) :])
    digest = xxhash.xxh3_64_hexdigest(header)
    edit_manifest(tag, lambda manifest: manifest["files"][rank].update(header_xxh3=digest))


def set_rank_state(tag: Path, rank: int, content: bytes) -> None:
    """Another state of a rank's own, which is moved to the end of its shard, and the manifest with it."""

    def edit(manifest: Json) -> None:
        file = manifest["files"][rank]
        stored = next(tensor for tensor in file["tensors"] if tensor["kind"] == "rank")
        assert stored is file["tensors"][-1], "bytes come last"
        shard = tag / file["name"]
        replace(shard, shard.read_bytes()[: stored["offset"]] + content)
        digest = xxhash.xxh3_64_hexdigest(content)
        size = len(content)
        stored.update(nbytes=size, shape=[size], stop=size, xxh3=digest)
        file.update(nbytes=stored["offset"] + size)

    edit_manifest(tag, edit)


def saved(content: object) -> bytes:
    """By `torch.save`."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


class Bomb:
    """Unpickled, it makes a directory: the sign that what a file says was executed."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.sign),)


class Calls:
    """Unpickled, it is the result of any call."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def archive(records: dict[str, bytes], *, compressed: bool = False) -> bytes:
    """A zip file like torch's own, which are never compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
        for name, content in records.items():
            file.writestr(f"archive/{name}", content)
    return stream.getvalue()


def archived_pickle(content: bytes, *, compressed: bool = False) -> bytes:
    """The archive that `torch.save` would have made around a pickle."""
    return archive({"data.pkl": content, "version": b"3", "byteorder": b"little"}, compressed=compressed)


def pickled(content: object, protocol: int = 2) -> bytes:
    return pickle.dumps(content, protocol)
