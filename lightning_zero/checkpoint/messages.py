"""What ranks tell each other in a word: one message each, which travels while they do something else."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

_SHORT_BYTES, _LENGTH_BYTES = 4096, 8


def tell_all(group: dist.ProcessGroup, content: bytes) -> Callable[[], list[bytes]]:
    """Begin to tell all ranks of a gloo group something. Collective, and so is what it gives.

    It is one message each, if all of it is short; else all send as much as the longest, in a second one. Each may take
    milliseconds, where all processors are busy.

    Returns:
        What waits for it: every rank's content, in their order.

    Raises:
        RuntimeError: the others didn't come within the group's time-out. So does what is returned.
    """
    head = len(content).to_bytes(_LENGTH_BYTES, "little") + content
    arrive = _begin_gather(group, head[:_SHORT_BYTES].ljust(_SHORT_BYTES))

    def wait() -> list[bytes]:
        heads = arrive()
        lengths = [int.from_bytes(head[:_LENGTH_BYTES], "little") for head in heads]
        contents = [head[_LENGTH_BYTES:] for head in heads]
        if max(lengths) > _SHORT_BYTES - _LENGTH_BYTES:
            contents = _begin_gather(group, content.ljust(max(lengths)))()
        return [content[:length] for content, length in zip(contents, lengths, strict=True)]

    return wait


def _begin_gather(group: dist.ProcessGroup, content: bytes) -> Callable[[], list[bytes]]:
    """Every rank's bytes, as many of each."""
    own = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    everyones = [torch.empty_like(own) for _ in range(group.size())]
    work = dist.all_gather(everyones, own, group=group, async_op=True)

    def wait() -> list[bytes]:
        work.wait()
        return [one.numpy().tobytes() for one in everyones]

    return wait
