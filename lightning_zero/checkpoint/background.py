"""A save that goes on behind training: one at a time, and none is forgotten.

| meanwhile | what happens |
|---|---|
| another save begins | it waits for this one: memory never grows, and commits keep their order |
| a deletion is asked for | it waits for this one's commit, and is dropped if there is none: it may be the only copy |
| this one fails | its error is raised by the next `join`: at the next save, a load, or the end of fit |
| the process ends in order | Python waits for the thread |
| it is killed | what a synchronous save would leave: see [Note: the commit, step by step] |
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from lightning_zero.checkpoint.report import SaveReport


class BackgroundSave:
    """The save that is under way, if there is one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._afterwards: list[Callable[[], object]] | None = None  # None: nothing is under way
        self._error: BaseException | None = None
        self._report: SaveReport | None = None

    def begin(self, save: Callable[[], SaveReport]) -> None:
        """Begin a save in a thread; the one before has been joined."""
        if self._thread is not None:
            raise RuntimeError("a save is under way; join it first")
        self._afterwards = []
        # Not a daemon: a process that ends in order finishes what it has begun to save
        self._thread = threading.Thread(target=self._run, args=(save,), name="lightning_zero-save", daemon=False)
        self._thread.start()

    def _run(self, save: Callable[[], SaveReport]) -> None:
        try:
            report = save()
            while (action := self._next()) is not None:
                action()
        except BaseException as error:
            with self._lock:
                self._error, self._afterwards = error, None
        else:
            self._report = report

    def _next(self) -> Callable[[], object] | None:
        with self._lock:
            assert self._afterwards is not None
            if self._afterwards:
                return self._afterwards.pop(0)
            self._afterwards = None
            return None

    def after_commit(self, action: Callable[[], object]) -> None:
        """Do something when what is being saved is there; at once, if nothing is."""
        with self._lock:
            if self._afterwards is not None:
                self._afterwards.append(action)
                return
        action()

    def take_report(self) -> SaveReport | None:
        """What the last save did, once it is done, and once only."""
        report, self._report = self._report, None
        return report

    def join(self) -> None:
        """Wait for the save that is under way.

        Raises:
            CheckpointWriteError: it failed; a second call doesn't raise it again.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
