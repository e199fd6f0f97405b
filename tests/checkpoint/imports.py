"""What the tests of both importers do alike."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_zero.errors import ZeroError

Errors = type[ZeroError] | tuple[type[ZeroError], ...]


def assert_refused(run: Callable[..., object], source: Path, error: Errors, match: str, **options: Any) -> None:
    """The error, which is one line for a person; and the save directory has nothing new in it."""
    ours = source.parent.parent / "ours"
    with pytest.raises(error, match=match) as raised:
        run(source, ours, **options)
    assert len(str(raised.value)) < 2000
    assert not ours.exists() or not os.listdir(ours)


def memory_of(name: str, source: Path, ours: Path) -> float:
    """The MiB that an import takes, in a process of its own, as the kernel counts them."""
    script = (
        "import sys\n"
        f"from lightning_zero import {name}\n"
        "peak = lambda: next(int(line.split()[1]) for line in open('/proc/self/status') if 'VmHWM' in line) / 1024\n"
        "base = peak()\n"
        f"{name}(*sys.argv[1:])\n"
        "print(peak() - base)\n"
    )
    command = [sys.executable, "-c", script, str(source), str(ours)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def state_of(folder: Path) -> dict[Path, tuple[int, ...]]:
    """What would be another if anything in a folder was written, moved or replaced."""
    found = ((path, path.stat()) for path in sorted(folder.rglob("*")))
    return {path: (s.st_ino, s.st_mode, s.st_nlink, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in found}
