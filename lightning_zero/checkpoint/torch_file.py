"""The file that `torch.save` writes, read and written without torch, and without its tensors ever being in memory.

It is a zip archive: a pickle (`data.pkl`), and the memory of each storage that the pickle refers to by a persistent id
(`data/0`, `data/1`, …). Sources: PKWARE's APPNOTE.TXT, by whose sections the headers below are named, and torch's
"Serialization semantics" (docs/source/notes/serialization.rst).

[Note: a torch file without its tensors in memory]
Every record's size is known beforehand, so every offset is. A record is written as torch's own writer does it: its CRC
stands behind its data and not before it, so the whole file goes out from its beginning to its end; and its data begin
at a multiple of 64 bytes, where `torch.load(mmap=True)` maps them. That is torch's layout to the byte, which it can be
told to rely on (`torch.utils.serialization.config.load.calculate_storage_offsets`).

Whoever reads a file trusts nothing in it. What the pickle names is never imported (see `pickled`); a name that torch
doesn't allow whatever the program (`_ALWAYS_ALLOWED`) is refused, unless torch has been told to allow it
(`torch.serialization.add_safe_globals`): for that question, torch is imported.
"""

from __future__ import annotations

import io
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from pickle import REDUCE, UnpicklingError
from typing import Any

from lightning_zero.checkpoint.elements import NAMES, Elements
from lightning_zero.checkpoint.manifest import ITEM_BYTES
from lightning_zero.checkpoint.pickled import Global, Object, Ordered, read_pickle, write_pickle
from lightning_zero.checkpoint.read_ahead import read_ahead
from lightning_zero.checkpoint.storage import create_file
from lightning_zero.errors import CorruptCheckpointError, ZeroError

_TYPED = {
    "F64": "Double",
    "F32": "Float",
    "F16": "Half",
    "BF16": "BFloat16",
    "C128": "ComplexDouble",
    "C64": "ComplexFloat",
    "I64": "Long",
    "I32": "Int",
    "I16": "Short",
    "I8": "Char",
    "U8": "Byte",
    "BOOL": "Bool",
}
"""torch's typed storages; tensors of younger dtypes have an untyped one, and are pickled in a way of their own."""

_UNTYPED = Global("torch.storage", "UntypedStorage")
_STORAGES = {Global("torch", f"{name}Storage"): ITEM_BYTES[code] for code, name in _TYPED.items()} | {_UNTYPED: 1}
"""The bytes of an element of each."""

_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_UNTYPED = Global("torch._utils", "_rebuild_tensor_v3")
_ALWAYS_ALLOWED = frozenset(
    (
        Global("collections", "OrderedDict"),
        Global("_codecs", "encode"),
        Global("__builtin__", "set"),
        Global("__builtin__", "bytearray"),
        Global("torch", "Size"),
        Global("torch", "device"),
        Global("torch.nn.parameter", "Parameter"),
        Global("torch.serialization", "_get_layout"),
        Global("torch._utils", "_rebuild_parameter"),
        Global("torch._utils", "_rebuild_sparse_tensor"),
        _REBUILD,
        _REBUILD_UNTYPED,
        *_STORAGES,
        *(Global("torch", name) for name in NAMES.values()),
    )
)
"""What `torch.load(weights_only=True)` allows in every torch from 2.6 on, as far as it is to be expected."""


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """The memory of one tensor, or of several.

    Attributes:
        kind: its class.
        numel: of its elements, as that class counts them.
        content: its bytes, or where they are read.
    """

    kind: Global
    numel: int
    content: Elements | memoryview


# --------------------------------------------------------------------------------------------------------- read


def read_torch_file(content: bytes, where: str, *, weights_only: bool) -> dict[Any, Any]:
    """The dict that `torch.save` was given, in the terms of `pickled`, with a `Storage` for each of torch's.

    Args:
        content: of the file; the storages refer to it.
        where: for the messages.
        weights_only: refuse whatever would run code when it is loaded.

    Raises:
        UntrustedContentError: there is such a thing in it.
        CorruptCheckpointError: it is something else.
    """
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        tag, kind, key, _, numel = pid
        if tag != "storage" or type(kind) is not Global or type(key) is not str or type(numel) is not int:
            raise UnpicklingError("a persistent id is none of a storage")
        record = records[f"data/{key}"]
        if kind in _STORAGES and numel * _STORAGES[kind] != len(record):
            raise UnpicklingError(f"the storage {key!r:.20} is of another size than is said")
        return storages.setdefault(key, Storage(kind, numel, record))

    try:
        records = _records(content, where)
        pickle = bytes(records["data.pkl"])
        found = read_pickle(pickle, storage)
    except ZeroError:
        raise
    except Exception as error:
        raise CorruptCheckpointError(
            f"{where} is not what torch.save writes: {type(error).__name__}, {str(error)!r:.200}"
        ) from error
    if weights_only and (found.unusual or not found.names <= _ALWAYS_ALLOWED):
        from lightning_zero.checkpoint.trust import require_allowed

        require_allowed(content, pickle, where, unusual=found.unusual)
    return require_dict(found.value, where)


def require_dict(value: object, what: str) -> dict[Any, Any]:
    """The same value, if it is a dict.

    Raises:
        CorruptCheckpointError: it isn't.
    """
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{what} is no dict, but {type(value).__name__}")
    return value


def _records(file: bytes, where: str) -> dict[str, memoryview]:
    """The records by name, without the archive's own folder. APPNOTE.TXT: 4.3.7."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        found = archive.infolist()
    content = memoryview(file)
    if sum(info.file_size for info in found) > len(content):
        raise CorruptCheckpointError(f"{where} would be larger when unpacked; torch.save doesn't compress")
    records = {}
    for info in found:
        name_bytes, extra_bytes = struct.unpack_from("<HH", content, info.header_offset + 26)
        begin = info.header_offset + 30 + name_bytes + extra_bytes
        record = content[begin : begin + info.file_size]
        if info.header_offset < 0 or info.compress_type != zipfile.ZIP_STORED or len(record) != info.file_size:
            raise zipfile.BadZipFile("a record is compressed, or leaves the archive")
        records[info.filename.partition("/")[2]] = record
    if len(records) != len(found):
        raise zipfile.BadZipFile("two records have one name")
    return records


# -------------------------------------------------------------------------------------------------------- write


def write_torch_file(
    path: Path,
    content: Mapping[str, Any],
    name: str,
    progress: Callable[[int], None],
    overflows: set[Elements] | None = None,
) -> None:
    """Write what `torch.save` would: see [Note: a torch file without its tensors in memory].

    Args:
        path: of the file; it is durable when this returns.
        content: in the terms of `read_torch_file`, with unread tensors in it; one that is in it twice is stored once.
        name: that the file is going to have.
        progress: is told of the unread tensors' bytes as they are written.
        overflows: where to note what became infinite.
    """
    numbers: dict[Storage, int] = {}

    def persistent_id(value: object) -> tuple[object, ...] | None:
        if not isinstance(value, Storage):
            return None
        number = numbers.setdefault(value, len(numbers))
        return "storage", value.kind, str(number), "cpu", value.numel

    pickle = write_pickle(content, persistent_id, _rebuilt)
    folder = Path(name).stem if name.isascii() else "archive"  # as torch.save names it
    small = {"data.pkl": pickle, ".format_version": b"1", ".storage_alignment": b"64"}
    small["byteorder"] = sys.byteorder.encode()
    contents = [
        *((name, memoryview(record)) for name, record in small.items()),
        *((f"data/{number}", storage.content) for storage, number in numbers.items()),
        ("version", memoryview(b"3\n")),
        # Of the same pickle, the same: whoever writes the same checkpoint twice gets the same bytes
        (".data/serialization_id", memoryview(f"{zlib.crc32(pickle):020d}{len(pickle):020d}".encode())),
    ]
    records: list[_Record] = []
    for record_name, record in contents:
        offset = records[-1].end if records else 0
        records.append(_Record(f"{folder}/{record_name}".encode(), offset, record.nbytes))
    checksums = [0] * len(records)

    def add(number: int, chunk: memoryview) -> None:
        checksums[number] = zlib.crc32(chunk, checksums[number])

    nbytes = records[-1].end + len(_directory(records, checksums))
    with create_file(path, nbytes) as file:
        chunks = read_ahead([record for _, record in contents], add, overflows)
        for number, of_record in groupby(chunks, key=itemgetter(0)):
            file.write(records[number].head)
            for _, chunk in of_record:
                file.write(chunk)
                if isinstance(contents[number][1], Elements):
                    progress(len(chunk))
            file.write(records[number].tail(checksums[number]))
        file.write(_directory(records, checksums))


def _rebuilt(value: object) -> Object:
    """How torch pickles a tensor."""
    if not isinstance(value, Elements):
        raise TypeError(f"{type(value).__name__} is nothing that a checkpoint holds")
    code, sizes = value.shown, [max(1, size) for size in value.shape]
    strides = tuple(math.prod(sizes[dimension + 1 :]) for dimension in range(len(sizes)))
    place = (0, value.shape, strides, False, Ordered())
    if code in _TYPED:
        storage = Storage(Global("torch", f"{_TYPED[code]}Storage"), value.numel, value)
        return Object(REDUCE, _REBUILD, (storage, *place))
    storage = Storage(_UNTYPED, value.nbytes, value)
    return Object(REDUCE, _REBUILD_UNTYPED, (storage, *place, Global("torch", NAMES[code])))


# ------------------------------------------------------------------------------------------------- the archive

_ALIGNMENT = 64
_LIMIT = 0xFFFFFFFF
"""What stands in a field of 32 bits whose value is in the extra field, in 64 bits (4.5.3)."""
_MOST_RECORDS = 0xFFFF
_UTF8 = 1 << 11
_CRC_BEHIND = 1 << 3


@dataclass(frozen=True, slots=True)
class _Record:
    """One record of the archive.

    Attributes:
        name: of it.
        offset: where it begins in the file.
        nbytes: of its data.
    """

    name: bytes
    offset: int
    nbytes: int

    @property
    def head(self) -> bytes:
        """What stands before the data (4.3.7), with an extra field that aligns them."""
        extra = self._sizes
        padding = -(self.offset + 30 + len(self.name) + len(extra) + 4) % _ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        fields = (self._flags, 0, 0, 0, 0, 0, 0, len(self.name), len(extra))
        return struct.pack("<4sH4H3I2H", b"PK\3\4", 0, *fields) + self.name + extra

    def tail(self, checksum: int) -> bytes:
        """What stands behind the data (4.3.9)."""
        if not self.nbytes:
            return b""
        return struct.pack("<4sIQQ" if self._sizes else "<4sIII", b"PK\7\10", checksum, self.nbytes, self.nbytes)

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.offset + len(self.head) + self.nbytes + len(self.tail(0))

    def entry(self, checksum: int) -> bytes:
        """What stands in the directory (4.3.12)."""
        nbytes, extra = min(self.nbytes, _LIMIT), self._sizes
        about = (checksum, nbytes, nbytes, len(self.name), len(extra), 0, 0, 0, 0, min(self.offset, _LIMIT))
        return struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, self._flags, 0, 0, 0, *about) + self.name + extra

    @property
    def _flags(self) -> int:
        return _UTF8 | (_CRC_BEHIND if self.nbytes else 0)

    @property
    def _sizes(self) -> bytes:
        """The extra field of what doesn't fit in 32 bits (4.5.3)."""
        large = [self.nbytes] * 2 if self.nbytes >= _LIMIT else []
        large += [self.offset] if self.offset >= _LIMIT else []
        return struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""


def _directory(records: list[_Record], checksums: list[int]) -> bytes:
    """What stands at the end of the archive: the directory, its place and its size (4.3.12 to 4.3.16)."""
    entries = b"".join(record.entry(checksum) for record, checksum in zip(records, checksums, strict=True))
    begin, count = records[-1].end, len(records)
    end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, len(entries), begin)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, begin + len(entries), 1)
    short = min(count, _MOST_RECORDS)
    end += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, short, short, min(len(entries), _LIMIT), min(begin, _LIMIT), 0)
    return entries + end
