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

import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import xxhash

from lightning_zero.checkpoint.manifest import (
    FORMAT_VERSION,
    ITEM_BYTES,
    TRAINER_NAME,
    FileEntry,
    Kind,
    StoredTensor,
    StoredValue,
    is_trainer_name,
    key,
    label,
)
from lightning_zero.checkpoint.storage import Location, ReadableFile, create_file, open_file
from lightning_zero.errors import IncompleteCheckpointError

_VERIFY_BYTES = 1 << 20
_HEADER_ALIGNMENT = 4096
"""So that the tensors begin with a page of the file: what goes past the page cache needs that, and a map likes it."""
_TENSOR_ALIGNMENT = 64


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
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def key(self) -> str:
        """Its name within the file."""
        return key(label(self.kind, self.name, self.optimizer, self.state), self.kind, self.start, self.stop)


def shard_name(rank: int, world_size: int, *, frozen: bool = False, save_id: str = "") -> str:
    """The name of a rank's file; with the save's id in it where files of two saves may lie side by side."""
    kind, of_save = "frozen" if frozen else "rank", f"-{save_id}" if save_id else ""
    return f"{kind}-{rank:05d}-of-{world_size:05d}{of_save}.safetensors"


def is_shard_name(name: str) -> bool:
    """Whether `shard_name` gives such names."""
    return re.fullmatch(r"(rank|frozen)-\d+-of-\d+(-[0-9a-f]+)?\.safetensors", name) is not None


def trainer_name(save_id: str = "") -> str:
    """The name of `trainer.pt`, likewise."""
    return f"trainer-{save_id}.pt" if save_id else TRAINER_NAME


def is_ours(name: str, *, with_save_id: bool = False) -> bool:
    """Whether a checkpoint's files, but for its manifest, have such names; with the save's id in them, if so asked."""
    has_id = re.search(r"-[0-9a-f]{16}\.(safetensors|pt)$", name) is not None
    return (is_shard_name(name) or is_trainer_name(name)) and (has_id or not with_save_id)


def place_in_file(element_bytes: int, nbytes: int) -> tuple[int, bool]:
    """What a file's tensors are sorted by: then each begins at a multiple of its element, whatever precedes it.

    And of 64 bytes, but for a few small ones at the end.
    """
    return -element_bytes, nbytes % _TENSOR_ALIGNMENT != 0


def write_shard(
    path: Location,
    items: Iterable[Item],
    values: Sequence[StoredValue],
    *,
    rank: int,
    step: int,
    save_id: str = "",
    frozen: bool = False,
    fsync: bool = True,
    direct: bool = False,
) -> FileEntry:
    """Write one rank's file, and say what is in it; `fsync` and `direct` are `create_file`'s.

    Raises:
        OSError: the disk is full, or otherwise refuses.
        FileExistsError: there is a file of that name; nothing is ever overwritten in place.
    """
    ordered = sorted(items, key=lambda item: place_in_file(ITEM_BYTES[item.dtype], item.nbytes))
    about = {"format": "lightning_zero", "format_version": str(FORMAT_VERSION)}
    header = safetensors_header(
        about | {"rank": str(rank), "step": str(step), "save_id": save_id},
        ((item.key, item.dtype, item.shape, item.nbytes) for item in ordered),
        _HEADER_ALIGNMENT,
    )
    tensors = []
    with create_file(path, len(header) + sum(item.nbytes for item in ordered), fsync=fsync, direct=direct) as file:
        file.write(header)
        offset = len(header)
        for item in ordered:
            digest = xxhash.xxh3_64()
            begin = offset
            for chunk in item.chunks():
                digest.update(chunk)
                file.write(chunk)
                offset += len(chunk)
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
    return FileEntry(
        name=path.name,
        rank=rank,
        step=step,
        frozen=frozen,
        nbytes=offset,
        header_nbytes=len(header),
        header_xxh3=xxhash.xxh3_64_hexdigest(header),
        tensors=tuple(tensors),
        values=tuple(values),
    )


def safetensors_header(
    about: Mapping[str, str], tensors: Iterable[tuple[str, str, tuple[int, ...], int]], alignment: int
) -> bytes:
    """What any safetensors file begins with: the header's length in 8 bytes, JSON, and blanks.

    Args:
        about: its `__metadata__`.
        tensors: of each, as they lie one behind the other, the name, the dtype's code, the shape and the bytes.
        alignment: the tensors begin at a multiple of so many bytes.

    Raises:
        ValueError: a name stands twice.
    """
    table: dict[str, object] = {"__metadata__": about}
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        if name in table:
            raise ValueError(f"{name!r} was to be stored twice")
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset := offset + nbytes]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a checkpoint that is not as it was written.

    Attributes:
        file: its name.
        tensor: its key within the file, if one tensor is concerned.
        start: the first byte in the file of what is concerned.
        stop: one past the last; 0 where it can't be told.
        text: what is wrong.
    """

    file: str
    tensor: str | None
    start: int
    stop: int
    text: str

    def __str__(self) -> str:
        """One line for a person."""
        tensor = f"{self.tensor!r}, " if self.tensor else ""
        return f"{self.file}: {tensor}{f'bytes {self.start} to {self.stop}: ' if self.stop else ''}{self.text}"


def check_header(path: Location, entry: FileEntry) -> Iterator[Problem]:
    """Whether the file is there, has its exact size, and begins with the header that it was given.

    That finds a file that is missing, cut short, or another save's, without reading the tensors.
    """
    try:
        file = open_file(path)
        if file.nbytes != entry.nbytes:
            text = f"the file has {file.nbytes} bytes"
            yield Problem(entry.name, None, min(file.nbytes, entry.nbytes), entry.nbytes, text)
        if file.nbytes >= entry.header_nbytes:
            header = bytearray(entry.header_nbytes)
            file.read_into(0, memoryview(header))
            if xxhash.xxh3_64_hexdigest(header) != entry.header_xxh3:
                text = "the header is damaged, or the file is another save's"
                yield Problem(entry.name, None, 0, entry.header_nbytes, text)
    except IncompleteCheckpointError as error:
        yield Problem(entry.name, None, 0, entry.nbytes, str(error))


def verify_tensors(
    file: ReadableFile,
    entry: FileEntry,
    tensors: Iterable[StoredTensor],
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Iterator[Problem]:
    """Compare every byte of some of a shard file's tensors with their checksums.

    Args:
        file: to read.
        entry: what it should hold.
        tensors: some of them.
        progress: is told of the bytes as they are read.
    """
    buffer = _buffer()
    for tensor in tensors:
        digest = xxhash.xxh3_64()
        text = ""
        for begin in range(0, tensor.nbytes, len(buffer)):
            part = buffer[: min(len(buffer), tensor.nbytes - begin)]
            try:
                file.read_into(tensor.offset + begin, part)
            except IncompleteCheckpointError as error:
                text = str(error)
                break
            digest.update(part)
            progress(len(part))
        if not text and digest.hexdigest() != tensor.xxh3:
            text = "the checksum doesn't match"
        if text:
            yield Problem(entry.name, tensor.key, tensor.offset, tensor.offset + tensor.nbytes, text)


_buffers = threading.local()


def _buffer() -> memoryview:
    """This thread's: large enough for the disk, small enough for the processor's cache."""
    if not hasattr(_buffers, "memory"):
        _buffers.memory = memoryview(bytearray(_VERIFY_BYTES))
    memory: memoryview = _buffers.memory
    return memory
