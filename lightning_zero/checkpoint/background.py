"""A save that goes on behind training: one at a time, and none is forgotten.

| meanwhile | what happens |
|---|---|
| another save begins | it waits for this one: memory never grows, and commits keep their order |
| a deletion is asked for | it waits for this one's commit, and is dropped if there is none: it may be the only copy |
| this one fails | its error is given by the next `join`: at the next save, a load, or the end of fit |
| a deletion fails | a warning: the checkpoint is there, and no rank may be left alone with an error |
| the process ends in order | Python waits for the thread |
| it is killed | what a synchronous save would leave: see [Note: the commit, step by step] |
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Literal

from lightning_zero.checkpoint import kernel
from lightning_zero.threads import start_thread

_State = Literal["idle", "running", "failed"]


class BackgroundSave:
    """The save that is under way, if there is one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._state: _State = "idle"
        self._afterwards: list[Callable[[], object]] = []
        self._error: BaseException | None = None

    def begin(self, save: Callable[[], object]) -> None:
        """Begin a save in a thread; the one before has been joined."""
        if self._state != "idle":
            raise RuntimeError("a save is under way, or has failed; join it first")
        self._state = "running"
        self._thread = start_aside(partial(self._run, save), "lightning_zero-save")
        if self._thread is None:  # the other ranks wait for this one
            self._run(save)

    def _run(self, save: Callable[[], object]) -> None:
        try:
            save()
        except BaseException as error:
            with self._lock:
                self._state, self._error, self._afterwards = "failed", error, []
            return
        while (action := self._next()) is not None:
            _quietly(action)

    def _next(self) -> Callable[[], object] | None:
        with self._lock:
            if self._afterwards:
                return self._afterwards.pop(0)
            self._state = "idle"
            return None

    @property
    def is_running(self) -> bool:
        """Whether one is under way that hasn't been committed yet."""
        return self._state == "running"

    def after_commit(self, action: Callable[[], object]) -> None:
        """Do something when what is being saved is there; at once, if nothing is; not at all, if it has failed."""
        with self._lock:
            if self._state == "running":
                self._afterwards.append(action)
            if self._state != "idle":
                return
        _quietly(action)

    def join(self) -> BaseException | None:
        """Wait for the save that is under way; its error, if it failed, and only once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._lock:
            error, self._error = self._error, None
            self._state = "idle"
        return error


def start_aside(work: Callable[[], object], name: str) -> threading.Thread | None:
    """Begin something in a thread that runs where there is time; None, if there can be no more threads."""

    def run() -> None:
        kernel.yield_to_others()
        work()

    return start_thread(run, name)


def _quietly(action: Callable[[], object]) -> None:
    """One rank alone does this: an error of its own would have the others wait for it."""
    try:
        action()
    except Exception as error:
        with suppress(UserWarning):  # it may be raised (python -W error)
            warnings.warn(f"after a checkpoint was saved: {type(error).__name__}: {error}", stacklevel=2)
