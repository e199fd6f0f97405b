"""The file that `torch.save` writes, read and written without torch, and without its tensors ever being in memory.

It is a zip archive (`archive`): a pickle (`data.pkl`), and the memory of each storage that the pickle refers to by a
persistent id (`data/0`, `data/1`, …). Source: torch's "Serialization semantics" (docs/source/notes/serialization.rst).

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
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from pickle import REDUCE, UnpicklingError
from typing import Any, BinaryIO, TypeAlias

from lightning_zero.checkpoint.archive import Found, NewRecord, Open, Record, Stream, directory, find_records
from lightning_zero.checkpoint.elements import NAMES, Elements
from lightning_zero.checkpoint.manifest import ITEM_BYTES
from lightning_zero.checkpoint.pickled import Global, Object, Ordered, Pickled, read_pickle, write_pickle
from lightning_zero.checkpoint.read_ahead import read_ahead
from lightning_zero.checkpoint.storage import Location, create_file
from lightning_zero.errors import (
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsupportedModelError,
    ZeroError,
)

Progress: TypeAlias = Callable[[int], object]

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
_CODES = {Global("torch", f"{name}Storage"): code for code, name in _TYPED.items()}
_CODES_BY_NAME = {Global("torch", name): code for code, name in NAMES.items()}

_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_UNTYPED = Global("torch._utils", "_rebuild_tensor_v3")
_REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_REBUILD_WITH_STATE = Global("torch._utils", "_rebuild_parameter_with_state")
_REBUILD_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
_TYPES = (Global("torch", "Tensor"), Global("torch.nn.parameter", "Parameter"))
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How the format begins that torch had before the archives."""
_MOST_DIMENSIONS = 64
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
        _REBUILD_PARAMETER,
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
    found, pickle = _describe(
        io.BytesIO(content), len(content), where, lambda name, place: memoryview(content)[place.offset : place.end]
    )
    if weights_only and (found.unusual or not found.names <= _ALWAYS_ALLOWED):
        from lightning_zero.checkpoint.trust import require_allowed

        require_allowed(content, pickle, where, unusual=found.unusual)
    return require_dict(found.value, where)


def describe_torch_file(
    path: Location, open_file: Open, progress: Progress, *, verify: bool, within: tuple[int, int] | None = None
) -> Pickled:
    """The same of a file that is too large for memory: what a storage holds is read when it is wanted.

    Nothing in it is refused: that is for whoever knows what is to be done with it.

    Args:
        path: of the file.
        open_file: opens it, now and whenever something is read.
        progress: is told of the storages' bytes as they are read.
        verify: compare the description with its checksum; for a storage, `Record.verify` is there.
        within: the bytes of a file of several that are this one.

    Raises:
        IncompleteCheckpointError: there is no such file, or it ends before.
        CorruptCheckpointError: it is something else, or the checksum doesn't match.
    """
    file = open_file(path)
    begin, end = within or (0, file.nbytes)
    if end > file.nbytes:
        raise IncompleteCheckpointError(f"{path} was cut short: it has {file.nbytes} bytes of at least {end}")

    def unread(name: str, place: Found) -> Elements:
        record = Record(open_file, path, name, Found(begin + place.offset, begin + place.end, place.checksum), progress)
        return Elements(record, (record.nbytes,), "U8", "U8")

    stream: Any = Stream(file, begin, end)
    where = f"{path}, bytes {begin} to {end}," if within else str(path)
    return _describe(io.BufferedReader(stream), end - begin, where, unread, verify=verify)[0]


def _describe(
    file: BinaryIO,
    nbytes: int,
    where: str,
    take: Callable[[str, Found], Elements | memoryview],
    *,
    verify: bool = False,
) -> tuple[Pickled, bytes]:
    """What the pickle describes, and the pickle; `take` gives what is in a storage's record."""
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        tag, kind, key, _, numel = pid
        if tag != "storage" or type(kind) is not Global or type(key) is not str or type(numel) is not int:
            raise UnpicklingError("a persistent id is none of a storage")
        content = take(f"data/{key}", records[f"data/{key}"])
        if kind in _STORAGES and numel * _STORAGES[kind] != content.nbytes:
            raise UnpicklingError(f"the storage {key!r:.20} is of another size than is said")
        return storages.setdefault(key, Storage(kind, numel, content))

    try:
        if file.read(len(_LEGACY)) == _LEGACY:
            raise CorruptCheckpointError(
                f"{where} is in torch's format of before 1.6: load it with torch, and torch.save it again"
            )
        records = find_records(file, nbytes)
        place = records["data.pkl"]
        file.seek(place.offset)
        pickle = file.read(place.end - place.offset)
        if verify and zlib.crc32(pickle) != place.checksum:
            raise CorruptCheckpointError(
                f"{where}: 'data.pkl': the checksum doesn't match: the file is damaged, or was saved without checksums "
                "(verify=False)"
            )
        return read_pickle(pickle, storage), pickle
    except ZeroError:
        raise
    except Exception as error:
        raise CorruptCheckpointError(
            f"{where} is not what torch.save writes: {type(error).__name__}, {str(error)!r:.200}"
        ) from error


def require_dict(value: object, what: str) -> dict[Any, Any]:
    """The same value, if it is a dict.

    Raises:
        CorruptCheckpointError: it isn't.
    """
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{what} is no dict, but {type(value).__name__}")
    return value


# ------------------------------------------------------------------------------------------------------ tensors


@dataclass(frozen=True, slots=True)
class View:
    """Elements that lie one behind the other in a record (`elements.Source`).

    Attributes:
        record: that they lie in.
        begin: the first one's place in there, in elements.
        item_bytes: of an element.
    """

    record: Record
    begin: int
    item_bytes: int

    def require(self) -> None:
        """Make sure that the file is there."""
        self.record.require()

    def read(self, start: int, stop: int, target: memoryview) -> None:
        """Fill `target` with the elements `[start, stop)`."""
        begin, item_bytes = self.begin, self.item_bytes
        self.record.read((begin + start) * item_bytes, (begin + stop) * item_bytes, target)


def harmless(names: frozenset[Global]) -> frozenset[Global]:
    """Those of the names in a pickle that are just values', tensors' and parameters'."""
    return names & (_ALWAYS_ALLOWED | {_REBUILD_WITH_STATE, _REBUILD_TYPE, *_TYPES})


def is_tensor(value: object) -> bool:
    """Whether a description is that of a tensor, or of a parameter."""
    return type(value) is Object and _plain(value).function in (_REBUILD, _REBUILD_UNTYPED)


def _plain(value: Object) -> Object:
    """Of a parameter, and of a tensor that was given attributes: the tensor alone."""
    function, arguments = value.function, value.arguments
    if function in (_REBUILD_PARAMETER, _REBUILD_WITH_STATE) and arguments and type(arguments[0]) is Object:
        return arguments[0]
    if function == _REBUILD_TYPE and len(arguments) == 4 and arguments[1] in _TYPES and type(arguments[2]) is tuple:
        return Object(value.opcode, arguments[0], arguments[2])
    return value


def unread_tensor(value: object, where: str) -> Elements:
    """The tensor that `describe_torch_file` has described.

    Args:
        value: its description.
        where: for the messages.

    Raises:
        CorruptCheckpointError: it is something else, or leaves its storage.
        UnsupportedModelError: it doesn't lie in its storage in the order of its elements.
    """
    try:
        if type(value) is not Object or not is_tensor(value):
            raise UnpicklingError(f"it is {type(value).__name__}")
        value = _plain(value)
        storage, begin, shape, strides, *rest = value.arguments
        code = _CODES[storage.kind] if value.function == _REBUILD else _CODES_BY_NAME[rest[2]]
        record, item_bytes = storage.content.source, ITEM_BYTES[code]
        if any(type(size) is not int or not 0 <= size < 1 << 63 for size in (begin, *shape, *strides)):
            raise UnpicklingError("a tensor's sizes are none")
        numel = math.prod(shape[:_MOST_DIMENSIONS])
        flags = rest[2 if value.function == _REBUILD else 3 :]  # of a view: conjugated, or negated
        if len(shape) > _MOST_DIMENSIONS or len(strides) != len(shape):
            raise UnpicklingError("a tensor has too many dimensions, or strides of others")
        if numel and (begin + numel) * item_bytes > record.nbytes:
            raise UnpicklingError("a tensor leaves its storage")
    except Exception as error:
        raise CorruptCheckpointError(f"{where} is no tensor: {type(error).__name__}, {str(error)!r:.200}") from error
    dense = zip(shape, strides, _strides(shape), strict=True)
    if any(flags) or any(size > 1 and stride != expected for size, stride, expected in dense):
        raise UnsupportedModelError(
            f"{where} is a view, whose elements aren't in memory as they are (strides {strides}); "
            "save a copy (tensor.contiguous())"
        )
    return Elements(View(record, begin, item_bytes), tuple(shape), code, code)


def part_of(elements: Elements, start: int, stop: int) -> Elements:
    """The flattened elements `[start, stop)` of what `unread_tensor` gave."""
    view = elements.source
    assert isinstance(view, View)
    return Elements(
        View(view.record, view.begin + start, view.item_bytes), (stop - start,), elements.stored, elements.shown
    )


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    sizes = [max(1, size) for size in shape]
    return tuple(math.prod(sizes[dimension + 1 :]) for dimension in range(len(sizes)))


# -------------------------------------------------------------------------------------------------------- write


def write_torch_file(
    path: Location,
    content: Mapping[str, Any],
    name: str,
    progress: Progress,
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
    nbytes, chunks = _chunks(content, name, progress, overflows)
    with create_file(path, nbytes) as file:
        for chunk in chunks:
            file.write(chunk)


def torch_file_bytes(content: Mapping[str, Any], name: str) -> bytes:
    """The bytes that `write_torch_file` would write, of what is small."""
    stream = io.BytesIO()
    for chunk in _chunks(content, name, lambda nbytes: None, None)[1]:
        stream.write(chunk)
    return stream.getvalue()


def _chunks(
    content: Mapping[str, Any], name: str, progress: Progress, overflows: set[Elements] | None
) -> tuple[int, Iterator[bytes | memoryview]]:
    """How many bytes there are in a file, and these; a chunk is gone when the next is asked for."""
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
    records: list[NewRecord] = []
    for record_name, record in contents:
        offset = records[-1].end if records else 0
        records.append(NewRecord(f"{folder}/{record_name}".encode(), offset, record.nbytes))
    checksums = [0] * len(records)

    def add(number: int, chunk: memoryview) -> None:
        checksums[number] = zlib.crc32(chunk, checksums[number])

    def chunks() -> Iterator[bytes | memoryview]:
        read = read_ahead([record for _, record in contents], add, overflows)
        for number, of_record in groupby(read, key=itemgetter(0)):
            yield records[number].head
            for _, chunk in of_record:
                yield chunk
                if isinstance(contents[number][1], Elements):
                    progress(len(chunk))
            yield records[number].tail(checksums[number])
        yield directory(records, checksums)

    return records[-1].end + len(directory(records, checksums)), chunks()


def _rebuilt(value: object) -> Object:
    """How torch pickles a tensor, and Python a deque, as some optimizers keep them."""
    if isinstance(value, deque):
        return Object(REDUCE, Global("collections", "deque"), ([*value], value.maxlen))
    if not isinstance(value, Elements):
        raise TypeError(f"{type(value).__name__} is nothing that a checkpoint holds")
    code, place = value.shown, (0, value.shape, _strides(value.shape), False, Ordered())
    if code in _TYPED:
        storage = Storage(Global("torch", f"{_TYPED[code]}Storage"), value.numel, value)
        return Object(REDUCE, _REBUILD, (storage, *place))
    storage = Storage(_UNTYPED, value.nbytes, value)
    return Object(REDUCE, _REBUILD_UNTYPED, (storage, *place, Global("torch", NAMES[code])))
