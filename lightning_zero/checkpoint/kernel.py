"""What the kernel can do for a checkpoint and Python has no name for.

Each function does nothing, or says that it can't, where the system lacks the call, for no checkpoint needs one to be
right: `reserve`, `start_writeback` and `write_directly` make a save faster, `yield_to_others` keeps it from slowing
training, and `exchange` replaces a tag in one step in place of several.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # sys/stdio.h on macOS
_SYNC_FILE_RANGE_WRITE = 2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> int:
    """Call a function of the C library: 0, or the errno."""
    function = getattr(_libc(), name, None)
    if function is None:
        return errno.ENOSYS
    return 0 if function(*arguments) == 0 else ctypes.get_errno()


def reserve(fd: int, nbytes: int) -> None:
    """Reserve a file's space: a full disk fails now and not gigabytes later, and the file gets few, long extents.

    Not `os.posix_fallocate`: where a file system can't reserve, that one writes zeros into every block instead.

    Raises:
        OSError: there is no room for so many bytes.
    """
    if sys.platform == "linux" and nbytes:
        error = _call("fallocate", fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))
        if error in _NO_ROOM:
            raise OSError(error, os.strerror(error))


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Have the disk begin on these bytes while the next are computed, so that fsync finds little left to do."""
    if sys.platform == "linux":
        _call("sync_file_range", fd, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)


def write_directly(fd: int, *, on: bool = True) -> bool:
    """Have writes to an open file go past the page cache, or through it again; say whether the file system can."""
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return True


_NICE = 10
"""A tenth of the weight of others: where all processors are busy, training loses about a tenth of one's time."""


def yield_to_others() -> None:
    """Have this thread, and no other of the process, run where there is time, if the system knows such a thing."""
    if sys.platform == "linux":
        try:
            os.setpriority(
                os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, os.getpid()) + _NICE
            )
        except OSError:  # forbidden here
            return


def exchange(one: Path, other: Path) -> bool:
    """Exchange what two names stand for, in one atomic step; or return False where the file system can't.

    Raises:
        OSError: it can, and refuses.
    """
    first, second = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux":
        error = _call("renameat2", _AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
    elif sys.platform == "darwin":
        error = _call("renamex_np", first, second, _RENAME_SWAP)
    else:
        return False
    if error and error not in _CANNOT_EXCHANGE:
        raise OSError(error, os.strerror(error), str(one), None, str(other))
    return error == 0
