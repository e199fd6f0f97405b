"""Exports that go on behind training: of committed checkpoints, by one process, one after the other, in a thread.

[Note: an export holds what it reads]
Training goes on, and the next save's retention may remove the checkpoint. So its files get second names (hard links) in
a hidden directory beside it, which outlive the first. The directory is locked as a save's staging directory is: if the
process is killed, the next save removes it (see [Note: what is stale]). Where there are no links (behind a URL), the
export isn't put off: it is done at once, before anything else can be done to the checkpoint.

| meanwhile | what happens |
|---|---|
| another export begins | it waits for this one; one that waits to write the same file is dropped |
| one fails | a warning at once, and its error is raised by `join`, at the end of fit; the others go on |
| the process ends in order | Python waits for the thread |
| it is killed | a hidden torn file beside the output, and the links |
"""

from __future__ import annotations

import secrets
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.background import start_aside
from lightning_zero.checkpoint.integrity import read_manifest
from lightning_zero.checkpoint.manifest import Manifest
from lightning_zero.checkpoint.storage import Location, is_remote, link, names_in


@dataclass(frozen=True, slots=True)
class _Held:
    """A checkpoint's files under second names."""

    directory: Path
    staging: commit.Staging


@dataclass(frozen=True, slots=True)
class _Export:
    output: Location
    held: _Held
    action: Callable[[Location, Location], object]


class BackgroundExport:
    """The exports that are under way, or wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[_Export] = []
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(
        self, directory: Location, name: Callable[[Manifest], Location], action: Callable[[Location, Location], object]
    ) -> None:
        """Export a checkpoint, which may be removed as soon as this returns. Raises nothing: see `join`.

        Args:
            directory: the tag's, of a committed checkpoint.
            name: what is to be written.
            action: writes it, from a directory that holds the checkpoint.
        """
        try:
            output = name(read_manifest(directory))
            held = _hold(directory)
        except Exception as error:
            self._note(f"the export of {directory}", error)
            return
        if held is None:
            self._attempt(output, action, directory)
            return
        with self._lock:
            dropped = [export for export in self._waiting if export.output == output]
            self._waiting = [export for export in self._waiting if export.output != output]
            self._waiting.append(_Export(output, held, action))
            if self._thread is None:
                self._thread = start_aside(self._run, "lightning_zero-export")
            without_thread = self._thread is None
        for export in dropped:
            export.held.staging.abandon()
        if without_thread:
            self._run()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                export = self._waiting.pop(0)
            try:
                self._attempt(export.output, export.action, export.held.directory)
            finally:
                export.held.staging.abandon()

    def _attempt(self, output: Location, action: Callable[[Location, Location], object], directory: Location) -> None:
        try:
            action(directory, output)
        except Exception as error:
            self._note(str(output), error)

    def _note(self, what: str, error: Exception) -> None:
        self._error = self._error or error
        with suppress(UserWarning):  # where warnings are made errors, that would end the thread; `join` raises this one
            warnings.warn(f"{what} was not written: {error}. Training goes on, and fails at its end", stacklevel=2)

    def wait(self) -> None:
        """Wait until nothing is under way."""
        while (thread := self._thread) is not None:
            thread.join()

    def join(self) -> None:
        """Wait, and raise what went wrong first; a second call doesn't raise it again."""
        self.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error


def _hold(directory: Location) -> _Held | None:
    """See [Note: an export holds what it reads]; None where it can't be done."""
    if is_remote(directory):
        return None
    token = secrets.token_hex(8)
    held = commit.staging_directory(directory.parent, directory.name, token)
    assert not is_remote(held)
    staging = commit.Staging(held, token)
    with ExitStack() as undo:
        undo.callback(staging.abandon)
        if all(link(directory / name, held / name) for name in names_in(directory)):
            undo.pop_all()
            return _Held(held, staging)
    return None
