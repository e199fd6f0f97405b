"""A file that `torch.load` reads, written without its tensors ever being in memory.

[Note: a torch file without its tensors in memory]
`torch.save` lays out the archive from stand-ins whose bytes it leaves empty (`skip_data`); then each storage's bytes
are written at their place in the file, and the CRC, which is only known then, is patched into the two records that hold
it. So the layout is torch's own: `torch.load(weights_only=True, mmap=True)` reads it like any other file, and so does
`unzip -t`. FakeTensors would do for stand-ins, but the first one costs two seconds of imports.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_zero.checkpoint import kernel
from lightning_zero.checkpoint.read_ahead import Overflows, read_ahead
from lightning_zero.checkpoint.storage import WRITEBACK_BYTES
from lightning_zero.checkpoint.tensors import LazyTensor


def write_torch_file(
    path: Path,
    content: Mapping[str, Any],
    unread_under: Collection[str],
    progress: Callable[[int], None],
    overflows: Overflows | None = None,
) -> None:
    """Write what `torch.save(content, path)` would: see [Note: a torch file without its tensors in memory].

    Args:
        path: of the file; it is durable when this returns.
        content: what to save; an unread tensor that is in it twice is stored once.
        unread_under: the keys whose dicts, lists and tuples have unread tensors in them.
        progress: is told of the unread tensors' bytes as they are written.
        overflows: where to note what became infinite.
    """
    stand_ins: dict[int, _StandIn] = {}
    laid_out = {
        key: _with_stand_ins(value, stand_ins) if key in unread_under else value for key, value in content.items()
    }
    with torch.serialization.skip_data():
        torch.save(laid_out, path)
    unread = {stand_in.storage._cdata: stand_in.tensor for stand_in in stand_ins.values()}
    storages = _storages(laid_out)
    tensors = [unread[s._cdata] if s._cdata in unread else _elements(s) for s in storages]
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        by_name = _places(file, archive)
    places = [by_name[f"data/{number}"] for number in range(len(storages))]
    checksums = [0] * len(tensors)

    def add(number: int, chunk: memoryview) -> None:
        checksums[number] = zlib.crc32(chunk, checksums[number])

    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        kernel.reserve(fd, os.fstat(fd).st_size)
        written = [0] * len(tensors)
        begun = 0
        for number, chunk in read_ahead(tensors, add, overflows):
            end = _write_at(fd, places[number].data + written[number], chunk)
            written[number] += len(chunk)
            if end - begun >= WRITEBACK_BYTES:  # the records lie one behind the other
                kernel.start_writeback(fd, begun, end - begun)
                begun = end
            if isinstance(tensors[number], LazyTensor):
                progress(len(chunk))
        for place, checksum in zip(places, checksums, strict=True):
            for offset in place.checksums if place.nbytes else ():
                _write_at(fd, offset, memoryview(struct.pack("<I", checksum)))
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_at(fd: int, offset: int, chunk: memoryview) -> int:
    """Write a chunk, and say where it ends."""
    while len(chunk):
        count = os.pwrite(fd, chunk, offset)
        chunk, offset = chunk[count:], offset + count
    return offset


class _StandIn:
    """Pickled, it is a tensor on the CPU; its storage has a size, and no memory."""

    def __init__(self, tensor: LazyTensor) -> None:
        self.tensor = tensor
        self._meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        self.storage = self._meta.untyped_storage()

    def __reduce__(self) -> tuple[Any, ...]:
        meta = self._meta
        place: tuple[Any, ...] = (0, tuple(meta.shape), meta.stride(), False, OrderedDict())
        # Dtypes that are younger than torch's typed storages are pickled in a way of their own
        typed = meta.dtype in torch.storage._dtype_to_storage_type_map()
        storage: Any = meta._typed_storage() if typed else self.storage  # type: ignore[no-untyped-call]
        storage._fake_device = torch.device("cpu")  # where it pretends to be: torch.save asks, for FakeTensors' sake
        if typed:
            return torch._utils._rebuild_tensor_v2, (storage, *place)
        return torch._utils._rebuild_tensor_v3, (storage, *place, meta.dtype)


def _with_stand_ins(content: Any, stand_ins: dict[int, _StandIn]) -> Any:
    """The same, with one stand-in for each unread tensor."""
    if isinstance(content, LazyTensor):
        return stand_ins.setdefault(id(content), _StandIn(content))
    if type(content) in (dict, OrderedDict):
        return type(content)((key, _with_stand_ins(value, stand_ins)) for key, value in content.items())
    if type(content) in (list, tuple):
        return type(content)(_with_stand_ins(value, stand_ins) for value in content)
    return content


def _storages(laid_out: object) -> list[torch.UntypedStorage]:
    """The storages in the order in which `torch.save` numbers them: that in which the pickler meets them first."""
    found: dict[int, torch.UntypedStorage] = {}

    class Recorder(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            if isinstance(item, torch.storage.TypedStorage):
                item = item._untyped_storage
            if isinstance(item, torch.UntypedStorage):
                found.setdefault(item._cdata, item)
                return item._cdata
            return None

    Recorder(io.BytesIO(), protocol=torch.serialization.DEFAULT_PROTOCOL).dump(laid_out)
    return list(found.values())


def _elements(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a record of the archive has its bytes, and where its CRC stands (offsets from the file's beginning)."""

    data: int
    nbytes: int
    checksums: tuple[int, int]


def _places(file: BinaryIO, archive: zipfile.ZipFile) -> dict[str, _Place]:
    """The records by name, without the archive's own folder. APPNOTE.TXT of PKWARE: 4.3.7, 4.3.9 and 4.3.12."""
    places = {}
    entry = archive.start_dir
    for info in archive.infolist():
        file.seek(info.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
        data = info.header_offset + 30 + name_bytes + extra_bytes
        # Behind the data stands the data descriptor: a signature, the CRC, the sizes
        places[info.filename.split("/", 1)[1]] = _Place(data, info.file_size, (data + info.file_size + 4, entry + 16))
        file.seek(entry + 28)
        entry += 46 + sum(struct.unpack("<HHH", file.read(6)))
    return places
