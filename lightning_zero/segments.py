"""Segments: the one idea that everything here is said in.

A segment `(name, start, stop)` is a range of a parameter's flattened elements. Partitioning is a pure function
from (names, shapes, dtypes, world size, policy) to the segments that each rank owns; a shard file is a list of
segments; resuming on another world size is the intersection of two lists of segments.

No process group, no file and no torch here: whatever this module says can be checked by a property test.

[Note: the layout of a bucket]
A bucket is a run of parameters that travels as one message. Its parameters lie one behind the other in a flat
buffer, and the buffer is cut into one shard for every rank, shard `r` being `[bounds[r], bounds[r + 1])`.
Each parameter begins on a multiple of `ALIGNMENT_BYTES`, as a tensor of its own would, so that a kernel that
looks at a pointer's alignment does the same arithmetic on it; and each cut is a multiple of it too, so that the
vectorised part of an element-wise kernel falls on the same elements as for the whole parameter. Offsets, padding
and bucket sizes are runtime matters: a checkpoint knows only names and ranges of elements.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from lightning_zero.errors import CorruptCheckpointError, IncompleteCheckpointError

ALIGNMENT_BYTES = 64

Policy = Literal["element", "parameter"]
"""`element`: flat slices, for element-wise optimizers. `parameter`: whole parameters, for any optimizer."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """What partitioning needs to know of a parameter: its name, its shape and the bytes of one element."""

    name: str
    shape: tuple[int, ...]
    element_bytes: int

    @property
    def numel(self) -> int:
        """The number of elements; 1 for a 0-d parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """The elements `[start, stop)` of the flattened parameter `name`."""

    name: str
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Bucket:
    """A run of parameters that is reduced and gathered as one message: see [Note: the layout of a bucket].

    Attributes:
        parameters: the parameters, in the order in which they lie in the buffer.
        offsets: where each of them begins, in elements.
        bounds: `world_size + 1` cuts, in elements; `bounds[-1]` is the length of the buffer.
    """

    parameters: tuple[ParameterSpec, ...]
    offsets: tuple[int, ...]
    bounds: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The length of the flat buffer in elements, padding included."""
        return self.bounds[-1]

    def owned(self, rank: int) -> Iterator[tuple[Segment, int]]:
        """The segments of one rank's shard, each with its offset in the flat buffer (in elements)."""
        low, high = self.bounds[rank], self.bounds[rank + 1]
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            start, stop = max(low - offset, 0), min(high - offset, parameter.numel)
            if start < stop:
                yield Segment(parameter.name, start, stop), offset + start


def plan_buckets(
    parameters: Sequence[ParameterSpec],
    world_size: int,
    policy: Policy,
    bucket_bytes: int,
    *,
    equal_shards: bool = False,
) -> list[Bucket]:
    """Partition parameters of one dtype over the ranks, bucket by bucket.

    Every element is owned by exactly one rank. With `policy="element"` the shards of a bucket differ by one
    alignment unit at most; with `policy="parameter"` whole parameters go to the rank that has least so far,
    the largest first (Graham's LPT rule), over all buckets together.

    Args:
        parameters: in the order in which their gradients are expected; all of one element size.
        world_size: the number of ranks.
        policy: see `Policy`.
        bucket_bytes: a bucket is closed before it grows beyond this; a larger parameter gets one of its own.
        equal_shards: pad every bucket so that all shards are of one length, which NCCL's reduce-scatter and
            all-gather want. Has no effect on `policy="parameter"`.

    Raises:
        ValueError: the world size or the bucket size is not positive, or a name stands twice.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if bucket_bytes < 1:
        raise ValueError(f"the bucket size must be positive, got {bucket_bytes} bytes")
    if len({parameter.name for parameter in parameters}) != len(parameters):
        raise ValueError("a parameter name stands twice in the list to partition")
    owners = _balance(parameters, world_size) if policy == "parameter" else {}

    buckets: list[Bucket] = []
    run: list[ParameterSpec] = []
    run_bytes = 0
    for parameter in parameters:
        parameter_bytes = parameter.numel * parameter.element_bytes
        if run and run_bytes + parameter_bytes > bucket_bytes:
            buckets.append(_lay_out(run, world_size, owners, equal_shards))
            run, run_bytes = [], 0
        run.append(parameter)
        run_bytes += parameter_bytes
    if run:
        buckets.append(_lay_out(run, world_size, owners, equal_shards))
    return buckets


def _balance(parameters: Sequence[ParameterSpec], world_size: int) -> dict[str, int]:
    """The owner of each parameter: the largest first, always to the rank that has least."""
    loads = [0] * world_size
    owners = {}
    for parameter in sorted(parameters, key=lambda parameter: -parameter.numel):
        owner = loads.index(min(loads))
        owners[parameter.name] = owner
        loads[owner] += parameter.numel
    return owners


def _lay_out(run: Sequence[ParameterSpec], world_size: int, owners: Mapping[str, int], equal_shards: bool) -> Bucket:
    unit = max(1, ALIGNMENT_BYTES // run[0].element_bytes)
    if owners:
        run = sorted(run, key=lambda parameter: owners[parameter.name])
    offsets, end, units = [], 0, 0
    bounds = [0]
    for parameter in run:
        while owners and len(bounds) <= owners[parameter.name]:
            bounds.append(units * unit)
        offsets.append(units * unit)
        end = units * unit + parameter.numel
        units += -(-parameter.numel // unit)
    if owners:
        bounds += [end] * (world_size + 1 - len(bounds))
    elif equal_shards:
        bounds = [rank * unit * -(-units // world_size) for rank in range(world_size + 1)]
    else:
        bounds = [min(rank * units // world_size * unit, end) for rank in range(world_size + 1)]
        bounds[-1] = end
    return Bucket(tuple(run), tuple(offsets), tuple(bounds))


class SegmentIndex(Generic[_T]):
    """Finds, among stored segments, those that hold a range of a parameter.

    Args:
        stored: segments, each with whatever is to be found by it (a place in a file).
    """

    def __init__(self, stored: Iterable[tuple[Segment, _T]]) -> None:
        self._by_name: dict[str, list[tuple[int, int, _T]]] = {}
        for segment, payload in stored:
            self._by_name.setdefault(segment.name, []).append((segment.start, segment.stop, payload))
        for ranges in self._by_name.values():
            ranges.sort(key=lambda item: item[:2])

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def payloads(self, name: str) -> list[_T]:
        """Everything that is stored of one parameter, in the order of its elements."""
        return [payload for _, _, payload in self._by_name.get(name, [])]

    def find(self, wanted: Segment) -> Iterator[tuple[Segment, _T, int]]:
        """The parts of `wanted`, in order: the overlap, what it was stored with, and its offset in there.

        Raises:
            IncompleteCheckpointError: a part of `wanted` is stored nowhere.
        """
        ranges = self._by_name.get(wanted.name, [])
        position = wanted.start
        first = max(bisect_right(ranges, position, key=lambda item: item[0]) - 1, 0)
        for start, stop, payload in ranges[first:]:
            if position >= wanted.stop or start > position:
                break
            if stop > position:
                end = min(stop, wanted.stop)
                yield Segment(wanted.name, position, end), payload, position - start
                position = end
        if position < wanted.stop:
            raise IncompleteCheckpointError(
                f"elements {position} to {wanted.stop} of {wanted.name!r} are stored nowhere; "
                "the checkpoint lacks a shard, or was saved from another model"
            )

    def check_cover(self, name: str, numel: int) -> None:
        """Make sure that each of `numel` elements is stored exactly once.

        Raises:
            IncompleteCheckpointError: an element is stored nowhere.
            CorruptCheckpointError: an element is stored twice, or outside the parameter.
        """
        position = 0
        for start, stop, _ in self._by_name.get(name, []):
            if not 0 <= start < stop <= numel:
                raise CorruptCheckpointError(
                    f"the manifest lists elements {start} to {stop} of {name!r}, which has {numel}"
                )
            if start < position:
                raise CorruptCheckpointError(f"element {start} of {name!r} is stored twice")
            if start > position:
                break
            position = stop
        if position < numel:
            raise IncompleteCheckpointError(f"elements from {position} of {name!r} are stored nowhere")
