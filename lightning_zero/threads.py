"""A thread that does one thing beside everything else, where there can be one."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  # registers its end first, and so comes after ours: see `_finish`
import threading
import weakref
from collections.abc import Callable

_started: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def start_thread(work: Callable[[], object], name: str) -> threading.Thread | None:
    """Begin something in a thread; None, if there can be no more threads.

    It is no daemon: a process that ends in order finishes what it has begun, and one that ended while torch is at work
    in a daemon would be aborted.
    """
    thread = threading.Thread(target=work, name=name, daemon=False)
    try:
        thread.start()
    except RuntimeError:
        return None
    _started.add(thread)
    return thread


def _finish() -> None:
    """Wait for all of them when the process ends.

    Python would do it too, but only after it has closed every `ThreadPoolExecutor`, which they may still need.
    """
    for thread in list(_started):
        thread.join()


threading._register_atexit(_finish)  # type: ignore[attr-defined]
