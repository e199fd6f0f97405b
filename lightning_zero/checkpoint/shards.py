"""One rank's shard file: an ordinary safetensors file, written as a stream and read by position.

Writing hashes each chunk and hands it to the kernel while it is still in the processor's cache, so that checksums cost
next to nothing, and copies no tensor. Reading goes by `pread` straight into the memory that wants the bytes. Neither
allocates in proportion to a tensor, knows torch, or holds the interpreter's lock while bytes move: several threads at
once are welcome.

A write that fails leaves a torn file behind; it lies in a staging directory, which goes as a whole (see `commit`).
A read that meets the end of a file, or no file, raises IncompleteCheckpointError and names it.

The header's `__metadata__` says which save the file belongs to (`save_id`, the step, the rank), and the manifest has
the header's checksum: so a shard of another save doesn't pass for this one's, even where every size is the same.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from lightning_zero.checkpoint import kernel
from lightning_zero.checkpoint.manifest import (
    DTYPES,
    FORMAT_VERSION,
    FileEntry,
    Kind,
    StoredTensor,
    StoredValue,
    key,
    label,
)
from lightning_zero.errors import IncompleteCheckpointError

CHUNK_BYTES = 8 << 20
_BUFFER_BYTES = 1 << 20
_HEADER_ALIGNMENT = 64
_ITEM_BYTES = dict(DTYPES.values())


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor that is to be written: a `StoredTensor` that doesn't know its place yet, and its bytes.

    Attributes:
        chunks: gives the bytes, in order; a chunk is written before the next one is asked for, so that all can share
            one buffer.
    """

    kind: Kind
    name: str
    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[memoryview]]
    optimizer: int | None = None
    state: str | None = None

    @property
    def nbytes(self) -> int:
        """The number of bytes that `chunks` is to give."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def shard_name(rank: int, world_size: int) -> str:
    """The name of a rank's shard file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_shard(
    path: Path,
    items: Iterable[Item],
    values: Sequence[StoredValue],
    *,
    rank: int,
    step: int,
    save_id: str = "",
    fsync: bool = True,
) -> FileEntry:
    """Write one rank's file, and say what is in it.

    Raises:
        OSError: the disk is full, or otherwise refuses.
        FileExistsError: there is a file of that name; nothing is ever overwritten in place.
    """
    # The widest elements first: then each tensor begins at a multiple of its element, whatever precedes it
    ordered = sorted(items, key=lambda item: -_ITEM_BYTES[item.dtype])
    header = _header(ordered, {"rank": str(rank), "step": str(step), "save_id": save_id})
    tensors = []
    with open(path, "xb", buffering=_BUFFER_BYTES) as file:
        end = len(header) + sum(item.nbytes for item in ordered)
        kernel.reserve(file.fileno(), end)
        file.write(header)
        offset = written_back = len(header)
        for item in ordered:
            digest = xxhash.xxh3_64()
            begin = offset
            for chunk in item.chunks():
                digest.update(chunk)
                file.write(chunk)
                offset += len(chunk)
                if fsync and offset - written_back >= CHUNK_BYTES:
                    file.flush()
                    kernel.start_writeback(file.fileno(), written_back, offset - written_back)
                    written_back = offset
            if offset - begin != item.nbytes:
                raise ValueError(f"{item.name!r} gave {offset - begin} bytes in place of {item.nbytes}")
            tensors.append(
                StoredTensor(
                    item.kind,
                    item.name,
                    item.start,
                    item.stop,
                    item.dtype,
                    item.shape,
                    begin,
                    item.nbytes,
                    digest.hexdigest(),
                    item.optimizer,
                    item.state,
                )
            )
        file.flush()
        if fsync:
            os.fsync(file.fileno())
    digest_of_header = xxhash.xxh3_64_hexdigest(header)
    return FileEntry(
        path.name, offset, len(header), digest_of_header, tuple(tensors), tuple(values), rank=rank, step=step
    )


def _header(items: Iterable[Item], about: dict[str, str]) -> bytes:
    """Safetensors' header: its length in 8 bytes, JSON, and spaces up to a multiple of 64 bytes."""
    table: dict[str, object] = {
        "__metadata__": {"format": "lightning_zero", "format_version": str(FORMAT_VERSION)} | about
    }
    offset = 0
    for item in items:
        name = key(label(item.kind, item.name, item.optimizer, item.state), item.kind, item.start, item.stop)
        if name in table:
            raise ValueError(f"{name!r} was to be stored twice")
        table[name] = {
            "dtype": item.dtype,
            "shape": item.shape,
            "data_offsets": [offset, offset := offset + item.nbytes],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def open_shard(path: Path) -> int:
    """Open a file of a checkpoint for reading; the caller closes it.

    Raises:
        IncompleteCheckpointError: it is not there, or is no plain file. A link is not followed: whatever a checkpoint
            names lies within its own directory.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise IncompleteCheckpointError(f"{path} can't be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise IncompleteCheckpointError(f"{path} is not a plain file")
    return fd


def read_into(fd: int, offset: int, target: memoryview, where: Path) -> None:
    """Fill `target` with the bytes that begin at `offset`.

    Raises:
        IncompleteCheckpointError: the file `where` ends before.
    """
    while len(target):
        count = os.preadv(fd, [target], offset)
        if count == 0:
            raise IncompleteCheckpointError(f"{where} was cut short: it ends before byte {offset + len(target)}")
        target = target[count:]
        offset += count


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a checkpoint that is not as it was written.

    Attributes:
        file: its name.
        tensor: its key within the file, if one tensor is concerned.
        start: the first byte in the file of what is concerned.
        stop: one past the last.
        text: what is wrong.
    """

    file: str
    tensor: str | None
    start: int
    stop: int
    text: str

    def __str__(self) -> str:
        """One line for a person."""
        return (
            f"{self.file}: {f'{self.tensor!r}, ' if self.tensor else ''}bytes {self.start} to {self.stop}: {self.text}"
        )


def check_header(path: Path, entry: FileEntry) -> Iterator[Problem]:
    """Whether the file is there, has its exact size, and begins with the header that it was given.

    That finds a file that is missing, cut short, or another save's, without reading the tensors.
    """
    try:
        fd = open_shard(path)
    except IncompleteCheckpointError as error:
        yield Problem(entry.name, None, 0, entry.nbytes, str(error))
        return
    try:
        size = os.fstat(fd).st_size
        if size != entry.nbytes:
            yield Problem(entry.name, None, min(size, entry.nbytes), entry.nbytes, f"the file has {size} bytes")
        if size >= entry.header_nbytes:
            header = bytearray(entry.header_nbytes)
            read_into(fd, 0, memoryview(header), path)
            if xxhash.xxh3_64_hexdigest(header) != entry.header_xxh3:
                text = "the header is damaged, or the file is another save's"
                yield Problem(entry.name, None, 0, entry.header_nbytes, text)
    finally:
        os.close(fd)


def verify_file(
    path: Path, entry: FileEntry, progress: Callable[[int], None] = lambda nbytes: None
) -> Iterator[Problem]:
    """Compare every byte of a shard file with its checksum.

    Args:
        path: the file.
        entry: what it should hold.
        progress: is told of the bytes as they are read.
    """
    yield from check_header(path, entry)
    try:
        file = io.BufferedReader(io.FileIO(open_shard(path)), _BUFFER_BYTES)
    except IncompleteCheckpointError:
        return  # check_header has said so
    with file:
        file.seek(entry.header_nbytes)
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for tensor in entry.tensors:
            digest = xxhash.xxh3_64()
            left = tensor.nbytes
            while left and (count := file.readinto(buffer[:left])):
                digest.update(buffer[:count])
                progress(count)
                left -= count
            if left:
                text = "missing: the file was cut short"
            elif digest.hexdigest() != tensor.xxh3:
                text = "the checksum doesn't match"
            else:
                continue
            yield Problem(entry.name, tensor.key, tensor.offset, tensor.offset + tensor.nbytes, text)
