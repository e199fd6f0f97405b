"""Where the files of a checkpoint lie, and how one of them is read and written.

A `Location` is a `pathlib.Path` where something is mounted, and a `UPath` for every other URL that fsspec knows
(`s3://`, `gs://`, `memory://`). Both join by `/`, and list, and open; what differs in earnest is here and in `remote`.

A file is written from its beginning to its end and never changed: it is durable when `create_file` is left, or, if
something was raised, torn (mounted) or not there at all (remote). It is read by position, several threads at once.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from typing_extensions import TypeIs

from lightning_zero.checkpoint import kernel
from lightning_zero.errors import CheckpointWriteError, CorruptCheckpointError, IncompleteCheckpointError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from upath import UPath

Location: TypeAlias = "Path | UPath"
PathOrUrl: TypeAlias = "str | os.PathLike[str] | Path | UPath"
"""What users give; `locate` makes a `Location` of it."""

WRITEBACK_BYTES = 8 << 20
_BUFFER_BYTES = 1 << 20
_BLOCK_BYTES = 8 << 20
_PART_BYTES = 4 << 20
"""Read by one request, where a file is behind a URL."""
_REQUESTS = 16
"""How many of them a process has under way at once."""
_SMALL_BYTES, _BLOCK_OF_SMALL_BYTES, _CACHED_BLOCKS = 256 << 10, 1 << 20, 16
"""A read of up to `_SMALL_BYTES` goes through a cache of blocks, as its neighbours are likely to be wanted next; a
larger one doesn't: its neighbours would come twice."""
DIRECT_ALIGNMENT = 4096
"""Of a file's offsets and of the memory, where a write goes past the page cache."""
_LEAST_WITHOUT_COPY = 256 << 10
_OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "hf"))
"""Where an object is there as a whole or not at all; elsewhere (in memory too) a file is renamed when complete."""
_MOUNTED = ("file", "local")
_SHORTENED_URL = re.compile(r"([a-z][a-z0-9+.-]+):/(?!/)")
_PARTS = 9000
"""S3 takes no more than 10000 parts of one object."""


def locate(path: PathOrUrl) -> Location:
    """What a user gives as a path or a URL; `~` is their home, as it is wherever Lightning takes a path.

    Raises:
        ValueError: it was a URL, of which `pathlib.Path` has left `s3:/bucket`: that would be a directory named `s3:`.
    """
    text = str(path)
    if "://" not in text:
        shortened = _SHORTENED_URL.match(text)
        if shortened and shortened[1] in _MOUNTED:
            return Path(text[shortened.end() - 1 :])  # what Lightning leaves of a `default_root_dir`
        if shortened:
            raise ValueError(
                f"{text!r} is no path; as a URL it is a string, '{shortened[1]}://{text[shortened.end() :]}'"
            )
        return Path(os.path.expanduser(cast("str | os.PathLike[str]", path)))
    protocol, rest = text.split("://", 1)
    if protocol in _MOUNTED:
        return Path(os.path.expanduser(rest))
    from upath import UPath

    options = path.storage_options if isinstance(path, UPath) else {}
    url: UPath = UPath(text, **{**options, "use_listings_cache": False})  # other ranks, and other runs, write there too
    return url


def is_remote(location: Location) -> TypeIs[UPath]:
    """Whether it is a URL, where nothing can be renamed, linked or locked."""
    return not isinstance(location, Path)


def absolute(location: Location) -> Location:
    """The same place, whatever the working directory will be."""
    return location if is_remote(location) else Path(os.path.abspath(location))


def require_writable(directory: Location) -> None:
    """Look whether a directory that may not be there yet can be made and written to. A store tells when it is asked to.

    Raises:
        CheckpointWriteError: it can't.
    """
    if is_remote(directory):
        return
    there = Path(os.path.abspath(directory))
    while not os.path.lexists(there):
        there = there.parent
    problem = None if os.access(there, os.W_OK | os.X_OK) else "is closed to this user, or read-only"
    problem = problem if there.is_dir() else "is no directory"
    if problem is not None:
        raise CheckpointWriteError(f"nothing can be written to {directory}: {there} {problem}; give another place")


def names_in(directory: Location) -> list[str]:
    """The names of what is in a directory, or under a URL; none where there is no such thing."""
    try:
        if not is_remote(directory):
            return os.listdir(directory)
        return [path.name for path in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove_file(location: Location) -> None:
    """Remove one file; that it isn't there is no error."""
    try:
        if is_remote(location):
            location.fs.rm_file(location.path)  # not `unlink`: for fsspec's `rm` a name may be a pattern
        else:
            location.unlink()
    except FileNotFoundError:
        pass


def link(source: Location, new: Location) -> bool:
    """Give a file that never changes a second name, which outlives the first; or say that it can't be done here.

    Behind a URL the store makes a copy, for itself.
    """
    try:
        if is_remote(source) and is_remote(new):
            if source.fs != new.fs:
                return False
            new.fs.cp_file(source.path, new.path)
        elif is_remote(source) or is_remote(new):
            return False
        else:
            os.link(source, new, follow_symlinks=False)
    except OSError:
        return False
    return True


# -------------------------------------------------------------------------------------------------------- read


class ReadableFile(Protocol):
    """A file of a checkpoint, open for reading; several threads may use it at once.

    It is closed with the last reference to it, so never under a thread that reads from it.
    """

    nbytes: int

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes that begin at `offset`.

        Raises:
            IncompleteCheckpointError: the file ends before, or the disk, or the store, refuses.
        """
        ...


def open_file(location: Location) -> ReadableFile:
    """Open a file for reading.

    Raises:
        IncompleteCheckpointError: it is not there (then the cause is a FileNotFoundError), or is no plain file. A link
            is not followed: whatever a checkpoint names lies within its own directory.
    """
    return _RemoteFile(location) if is_remote(location) else _MountedFile(location)


def read_file(location: Location, limit: int | None = None) -> bytes:
    """The content of a small file, or no more than its first `limit` bytes.

    Raises:
        IncompleteCheckpointError: see `open_file`.
        CorruptCheckpointError: it is larger than this machine's memory.
    """
    file = open_file(location)
    try:
        content = bytearray(file.nbytes if limit is None else min(file.nbytes, limit))
    except MemoryError:  # it may be sparse
        raise CorruptCheckpointError(f"{location} has {file.nbytes} bytes, for which there is no memory") from None
    file.read_into(0, memoryview(content))
    return bytes(content)


class _MountedFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise IncompleteCheckpointError(f"{path} can't be read: {error.strerror}") from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise IncompleteCheckpointError(f"{path} is not a plain file")
        self.nbytes = status.st_size

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def read_into(self, offset: int, target: memoryview) -> None:
        while len(target):
            try:
                count = os.preadv(self._fd, [target], offset)
            except OSError as error:
                raise IncompleteCheckpointError(f"{self._path} can't be read: {error.strerror}") from error
            if count == 0:
                raise IncompleteCheckpointError(
                    f"{self._path} was cut short: it ends before byte {offset + len(target)}"
                )
            target = target[count:]
            offset += count


class _RemoteFile:
    """What is small comes with its neighbours, by one request for a block; what is large by several, at once."""

    def __init__(self, url: UPath) -> None:
        self._url = url
        self._lock = threading.Lock()
        try:
            self._file: Any = url.fs.open(
                url.path,
                "rb",
                block_size=_BLOCK_OF_SMALL_BYTES,
                cache_type="blockcache",
                cache_options={"maxblocks": _CACHED_BLOCKS},
            )
            self.nbytes = int(url.fs.size(url.path))
        except OSError as error:
            raise IncompleteCheckpointError(f"{url} can't be read: {error}") from error

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read_into(self, offset: int, target: memoryview) -> None:
        try:
            self._read_into(offset, target)
        except OSError as error:
            raise IncompleteCheckpointError(f"{self._url} can't be read: {error}") from error

    def _read_into(self, offset: int, target: memoryview) -> None:
        if len(target) <= _SMALL_BYTES:
            with self._lock:
                self._file.seek(offset)
                self._fill(offset, target, self._file.read(len(target)))
            return
        begins = range(0, len(target), _PART_BYTES)
        parts = [(offset + begin, target[begin : begin + _PART_BYTES]) for begin in begins]
        if not self._url.fs.async_impl:  # perhaps one connection, which does one thing at a time
            for part in parts:
                self._request(*part)
            return
        under_way = [_requests().submit(self._request, *part) for part in parts]
        wait(under_way)  # whichever fails, none writes to the target any more
        for one in under_way:
            one.result()

    def _request(self, offset: int, target: memoryview) -> None:
        self._fill(offset, target, self._url.fs.cat_file(self._url.path, offset, offset + len(target)))

    def _fill(self, offset: int, target: memoryview, content: bytes) -> None:
        if len(content) != len(target):
            raise IncompleteCheckpointError(f"{self._url} was cut short: it ends before byte {offset + len(target)}")
        target[:] = content


@cache
def _requests() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_REQUESTS, "lightning_zero-requests")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_requests.cache_clear)  # a fork has no threads but its own


# ------------------------------------------------------------------------------------------------------- write


class WritableFile(Protocol):
    """A file that is being written."""

    def write(self, chunk: bytes | memoryview, /) -> object:
        """Append a chunk; it may be overwritten when this returns."""
        ...


@contextmanager
def create_file(location: Location, nbytes: int, *, fsync: bool = True, direct: bool = False) -> Iterator[WritableFile]:
    """Write a new file; it is whole, and durable, when the context is left.

    Args:
        location: of the file.
        nbytes: that it is going to have.
        fsync: make it durable. What is remote is so in any case.
        direct: where it is to be durable, write past the page cache if the file system can. That takes a tenth of the
            processor's time, and leaves what is in the cache there; a reader will have to go to the disk.

    Raises:
        FileExistsError: there is a mounted file of that name; none is ever overwritten in place.
        OSError: the disk is full, or otherwise refuses.
    """
    if is_remote(location):
        yield from _write_remote(location, nbytes)
        return
    with open(location, "xb", buffering=_BUFFER_BYTES) as mounted:
        kernel.reserve(mounted.fileno(), nbytes)
        if fsync and direct and kernel.write_directly(mounted.fileno()):
            past_the_cache = _Direct(mounted.fileno())
            yield past_the_cache
            past_the_cache.finish()
        else:
            yield _WrittenBack(mounted) if fsync else mounted
            mounted.flush()
        if fsync:
            os.fsync(mounted.fileno())


def _write_remote(url: UPath, nbytes: int) -> Iterator[WritableFile]:
    in_one_step = not _OBJECT_STORES.isdisjoint(
        [url.fs.protocol] if isinstance(url.fs.protocol, str) else url.fs.protocol
    )
    path = url.path if in_one_step else f"{url.path}.{secrets.token_hex(4)}.tmp"
    try:
        file: Any = url.fs.open(path, "wb", block_size=max(2 * _BLOCK_BYTES, nbytes // _PARTS))
    except NotImplementedError as error:
        raise OSError(errno.EROFS, f"{url} can't be written to") from error
    try:
        yield file
        file.close()
        if not in_one_step:
            url.fs.mv(path, url.path)
    except BaseException:
        if hasattr(file, "discard"):
            file.discard()
        if in_one_step:
            file.closed = True  # or it would be uploaded, as far as it goes, when it is collected
        else:
            with suppress(OSError):  # what went wrong first is what counts
                file.close()
                url.fs.rm_file(path)
        raise


class _WrittenBack:
    """Has the disk begin with what was written, so that the final fsync finds little left to do."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._written = 0
        self._begun = 0

    def write(self, chunk: bytes | memoryview, /) -> None:
        self._file.write(chunk)
        self._written += len(chunk)
        if self._written - self._begun >= WRITEBACK_BYTES:
            self._file.flush()
            kernel.start_writeback(self._file.fileno(), self._begun, self._written - self._begun)
            self._begun = self._written


class _Direct:
    """Writes past the page cache: whole blocks, from memory that is aligned as they are in the file.

    A large chunk that is so itself, as a `Snapshot`'s are, is written from where it is; others are copied together.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._past_the_cache = True
        self._block = _direct_block()
        self._filled = 0
        self._offset = 0

    def write(self, chunk: bytes | memoryview, /) -> None:
        import numpy as np

        source = np.frombuffer(chunk, np.uint8)
        begin = -(self._offset + self._filled) % DIRECT_ALIGNMENT
        if len(source) >= _LEAST_WITHOUT_COPY and (source.ctypes.data + begin) % DIRECT_ALIGNMENT == 0:
            end = len(source) - (len(source) - begin) % DIRECT_ALIGNMENT
            self._copy(source[:begin])
            self._put(memoryview(self._block)[: self._filled])
            self._filled = 0
            self._put(source[begin:end].data)
            source = source[end:]
        self._copy(source)

    def _copy(self, source: npt.NDArray[np.uint8]) -> None:
        import numpy as np

        block, taken = np.frombuffer(self._block, np.uint8), 0
        while taken < len(source):
            count = min(len(source) - taken, len(block) - self._filled)
            # Not by slices of a memoryview: NumPy lets go of the interpreter's lock while it copies
            np.copyto(block[self._filled : self._filled + count], source[taken : taken + count])
            taken += count
            self._filled += count
            if self._filled == len(block):
                self._put(memoryview(self._block))
                self._filled = 0

    def _put(self, left: memoryview) -> None:
        while left:
            try:
                count = os.pwrite(self._fd, left, self._offset)
            except OSError as error:
                # Some file systems open a file for direct writing and then refuse
                refused, self._past_the_cache = self._past_the_cache and error.errno == errno.EINVAL, False
                if not refused or not kernel.write_directly(self._fd, on=False):
                    raise
                continue
            left = left[count:]
            self._offset += count

    def finish(self) -> None:
        """Write the rest: padded to a block, and then cut off."""
        nbytes = self._offset + self._filled
        if self._filled:
            self._put(memoryview(self._block)[: self._filled + -self._filled % DIRECT_ALIGNMENT])
        os.ftruncate(self._fd, nbytes)


_blocks = threading.local()


def _direct_block() -> mmap.mmap:
    """This thread's block of memory, aligned to a page."""
    if not hasattr(_blocks, "block"):
        _blocks.block = mmap.mmap(-1, _BLOCK_BYTES)
    block: mmap.mmap = _blocks.block
    return block
