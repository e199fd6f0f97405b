"""A thread that does one thing beside everything else, where there can be one."""

from __future__ import annotations

import threading
from collections.abc import Callable


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
    return thread
