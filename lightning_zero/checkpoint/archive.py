"""The zip archive that `torch.save` writes: its records, never compressed, as they are found and as they are written.

Source: PKWARE's APPNOTE.TXT, by whose sections the headers below are named. Whoever reads one trusts nothing: a record
lies within the file, and no two have one name.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

from typing_extensions import override

from lightning_zero.checkpoint.storage import Location, ReadableFile
from lightning_zero.errors import CorruptCheckpointError

# --------------------------------------------------------------------------------------------------------- read

_CHUNK_BYTES = 4 << 20

Open: TypeAlias = Callable[[Location], ReadableFile]
"""Opens a file; perhaps one that it has opened before."""


@dataclass(frozen=True, slots=True)
class Found:
    """Where one record's data are in a file: from `offset` to `end`; and their CRC."""

    offset: int
    end: int
    checksum: int


def find_records(file: BinaryIO, nbytes: int) -> dict[str, Found]:
    """The records by name, without the archive's own folder (4.3.7).

    Args:
        file: the archive.
        nbytes: its size.

    Raises:
        zipfile.BadZipFile: it is none, or one that `torch.save` doesn't write.
    """
    with zipfile.ZipFile(file) as archive:
        found = archive.infolist()
    if sum(info.file_size for info in found) > nbytes:
        raise zipfile.BadZipFile("it would be larger when unpacked; torch.save doesn't compress")
    records = {}
    for info in found:
        if info.header_offset < 0 or info.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile("a record is compressed, or leaves the archive")
        file.seek(info.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
        begin = info.header_offset + 30 + name_bytes + extra_bytes
        if begin + info.file_size > nbytes:
            raise zipfile.BadZipFile("a record leaves the archive")
        records[info.filename.partition("/")[2]] = Found(begin, begin + info.file_size, info.CRC)
    if len(records) != len(found):
        raise zipfile.BadZipFile("two records have one name")
    return records


class Stream(io.RawIOBase):
    """The bytes `[begin, end)` of a file that is read by position, as `zipfile` reads one."""

    def __init__(self, file: ReadableFile, begin: int, end: int) -> None:
        self._file = file
        self._begin = begin
        self._nbytes = end - begin
        self._position = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._nbytes}[whence]
        if begin + offset < 0:
            raise OSError("there is nothing before the beginning of a file")
        self._position = begin + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer as far as they go."""
        target = memoryview(buffer).cast("B")[: max(0, self._nbytes - self._position)]
        self._file.read_into(self._begin + self._position, target)
        self._position += len(target)
        return len(target)


@dataclass(frozen=True, slots=True)
class Record:
    """The data of a record, in a file that stays where it is (an `elements.Source` of bytes).

    Attributes:
        open: opens the file.
        path: of the file.
        name: of the record.
        place: where they are.
        progress: is told of bytes as they are read.
    """

    open: Open
    path: Location
    name: str
    place: Found
    progress: Callable[[int], object]

    @property
    def nbytes(self) -> int:
        """How many there are."""
        return self.place.end - self.place.offset

    def require(self) -> None:
        """Make sure that the file is there."""
        self.open(self.path)

    def read(self, start: int, stop: int, target: memoryview) -> None:
        """Fill `target` with the bytes `[start, stop)`."""
        self.open(self.path).read_into(self.place.offset + start, target[: stop - start])
        self.progress(stop - start)

    def verify(self) -> None:
        """Compare every byte with the checksum.

        Raises:
            CorruptCheckpointError: it doesn't match.
        """
        buffer, checksum = memoryview(bytearray(min(self.nbytes, _CHUNK_BYTES))), 0
        for start in range(0, self.nbytes, _CHUNK_BYTES):
            stop = min(start + _CHUNK_BYTES, self.nbytes)
            self.read(start, stop, buffer)
            checksum = zlib.crc32(buffer[: stop - start], checksum)
        if checksum != self.place.checksum:
            raise CorruptCheckpointError(
                f"{self.path}: {self.name!r}, bytes {self.place.offset} to {self.place.end}: "
                "the checksum doesn't match: the file is damaged, or was saved without checksums (verify=False)"
            )


# -------------------------------------------------------------------------------------------------------- write

_ALIGNMENT = 64
_LIMIT = 0xFFFFFFFF
"""What stands in a field of 32 bits whose value is in the extra field, in 64 bits (4.5.3)."""
_MOST_RECORDS = 0xFFFF
_UTF8 = 1 << 11
_CRC_BEHIND = 1 << 3


@dataclass(frozen=True, slots=True)
class NewRecord:
    """One record of an archive that is being written.

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


def directory(records: list[NewRecord], checksums: list[int]) -> bytes:
    """What stands at the end of the archive: the directory, its place and its size (4.3.12 to 4.3.16)."""
    entries = b"".join(record.entry(checksum) for record, checksum in zip(records, checksums, strict=True))
    begin, count = records[-1].end, len(records)
    end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, len(entries), begin)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, begin + len(entries), 1)
    short = min(count, _MOST_RECORDS)
    end += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, short, short, min(len(entries), _LIMIT), min(begin, _LIMIT), 0)
    return entries + end
