"""Segments: the one idea that everything here is said in.

A segment `(name, start, stop)` is a range of a parameter's flattened elements. Partitioning is a pure function
from (names, shapes, dtypes, world size, policy) to the segments that each rank owns; a shard file is a list of
segments; resuming on another world size is the intersection of two lists of segments.

No process group, no file and no torch here: whatever this module says can be checked by a property test.

[Note: the layout of a bucket]
A bucket is a run of parameters that travels as one message. Its parameters lie one behind the other in a flat
buffer, and the buffer is cut into shards, one for each rank that owns a part of it (`Shards`).
Each parameter begins on a multiple of `ALIGNMENT_BYTES`, as a tensor of its own would, so that a kernel that
looks at a pointer's alignment does the same arithmetic on it; and each cut is a multiple of it too, so that the
vectorised part of an element-wise kernel falls on the same elements as for the whole parameter. Offsets, padding
and bucket sizes are runtime matters: a checkpoint knows only names and ranges of elements.

[Note: rounds]
If every bucket had a shard for every rank, there would be as many segments as buckets times ranks: a thousand
matrices on a thousand ranks are a million segments, each with a handful of tensors, and a manifest of a gigabyte that
every rank reads when it resumes. So the buckets are cut in *rounds*: runs of buckets whose buffers, laid one behind the
other, are cut into one shard of equal length for every rank. A round of one bucket is cut as if there were no rounds.
In a longer one each bucket has but a few owners, and each rank owns a part of a few buckets. Either way every rank owns
an equal share of every round, and so of the whole.

Rounds are as short as `MOST_CUTS` allows: all buckets together are cut in that many places at most, so that there are
no more segments than parameters and cuts. While buckets times ranks don't exceed it (on 8 ranks a model of 50 GB in
buckets of 25 MB, on 64 one of 6 GB), every round is one bucket, which is best for the network: each message ends on all
ranks alike. In a longer round few ranks receive a message, and each a larger part of it. A ring or a tree (NCCL) takes
about as long for it; the direct exchange (gloo) takes longer, and an owner has memory for its part from every rank.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Generic, Literal, TypeVar

from lightning_zero.errors import CorruptCheckpointError, IncompleteCheckpointError

ALIGNMENT_BYTES = 64

MOST_CUTS = 16384
"""In how many places all buckets of a partition are cut at most (one round's where that is more): [Note: rounds]."""

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
class Shards:
    """Who owns what of a flat buffer.

    Attributes:
        owners: ranks, in ascending order; whoever is not among them owns nothing.
        bounds: one cut more than owners, in elements: `owners[i]` has `[bounds[i], bounds[i + 1])`, perhaps nothing.
    """

    owners: Sequence[int]
    bounds: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The length of the buffer in elements."""
        return self.bounds[-1]

    def of(self, rank: int) -> tuple[int, int]:
        """Where a rank's shard begins and ends, in elements."""
        place = bisect_left(self.owners, rank)
        if place < len(self.owners) and self.owners[place] == rank:
            return self.bounds[place], self.bounds[place + 1]
        return 0, 0

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """The shards that aren't empty: whose each is, where it begins and where it ends."""
        for owner, (start, stop) in zip(self.owners, pairwise(self.bounds), strict=True):
            if start < stop:
                yield owner, start, stop


@dataclass(frozen=True, slots=True)
class Bucket:
    """A run of parameters that is reduced and gathered as one message: see [Note: the layout of a bucket].

    Attributes:
        parameters: the parameters, in the order in which they lie in the buffer.
        offsets: where each of them begins, in elements.
        shards: who owns what of the buffer.
    """

    parameters: tuple[ParameterSpec, ...]
    offsets: tuple[int, ...]
    shards: Shards

    @property
    def numel(self) -> int:
        """The length of the flat buffer in elements, padding included."""
        return self.shards.numel

    def owned(self, rank: int) -> Iterator[tuple[Segment, int]]:
        """The segments of one rank's shard, each with its offset in the flat buffer (in elements)."""
        low, high = self.shards.of(rank)
        for parameter, offset in zip(self.parameters, self.offsets, strict=True) if low < high else ():
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
    most_cuts: int = MOST_CUTS,
) -> list[Bucket]:
    """Partition parameters of one dtype over the ranks, bucket by bucket.

    Every element is owned by exactly one rank. With `policy="element"` the shards of a round (of a bucket, while they
    are few: see [Note: rounds]) differ by one alignment unit at most; with `policy="parameter"` whole parameters go to
    the rank that has least so far, the largest first (Graham's LPT rule), over all buckets together.

    Args:
        parameters: in the order in which their gradients are expected; all of one element size.
        world_size: the number of ranks.
        policy: see `Policy`.
        bucket_bytes: a bucket is closed before it grows beyond this; a larger parameter gets one of its own.
        equal_shards: pad every bucket that has a shard for each rank so that all are of one length, which NCCL's
            reduce-scatter and all-gather want. Has no effect on `policy="parameter"`.
        most_cuts: see [Note: rounds]. There is one round at least.

    Raises:
        ValueError: the world size or the bucket size is not positive, or a name stands twice.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if bucket_bytes < 1:
        raise ValueError(f"the bucket size must be positive, got {bucket_bytes} bytes")
    if len({parameter.name for parameter in parameters}) != len(parameters):
        raise ValueError("a parameter name stands twice in the list to partition")
    runs = _runs(parameters, bucket_bytes)
    if policy == "parameter":
        owners = _balance(parameters, world_size)
        return [_give_away(run, owners) for run in runs]
    layouts = [_lay_out(run) for run in runs]
    return [
        bucket
        for one_round in _rounds(layouts, max(1, most_cuts // world_size))
        for bucket in _cut(one_round, world_size, equal_shards)
    ]


def _runs(parameters: Iterable[ParameterSpec], bucket_bytes: int) -> list[list[ParameterSpec]]:
    runs: list[list[ParameterSpec]] = []
    run_bytes = 0
    for parameter in parameters:
        parameter_bytes = parameter.numel * parameter.element_bytes
        if not runs or run_bytes + parameter_bytes > bucket_bytes:
            runs.append([])
            run_bytes = 0
        runs[-1].append(parameter)
        run_bytes += parameter_bytes
    return runs


@dataclass(frozen=True, slots=True)
class _Layout:
    """A bucket that nobody owns yet: its parameters, where they begin, where they end, and in alignment units."""

    parameters: tuple[ParameterSpec, ...]
    offsets: tuple[int, ...]
    end: int
    units: int
    unit: int


def _lay_out(run: Sequence[ParameterSpec]) -> _Layout:
    unit = max(1, ALIGNMENT_BYTES // run[0].element_bytes)
    offsets, end, units = [], 0, 0
    for parameter in run:
        offsets.append(units * unit)
        end = units * unit + parameter.numel
        units += -(-parameter.numel // unit)
    return _Layout(tuple(run), tuple(offsets), end, units, unit)


def _balance(parameters: Sequence[ParameterSpec], world_size: int) -> dict[str, int]:
    """The owner of each parameter: the largest first, always to the rank that has least."""
    loads = [(0, rank) for rank in range(world_size)]  # a heap
    owners = {}
    for numel, name in sorted(((p.numel, p.name) for p in parameters), key=lambda sized: -sized[0]):
        load, owner = loads[0]
        owners[name] = owner
        heapq.heapreplace(loads, (load + numel, owner))
    return owners


def _give_away(run: Sequence[ParameterSpec], owners: Mapping[str, int]) -> Bucket:
    """Whole parameters, each to its owner; what one rank owns lies together."""
    layout = _lay_out(sorted(run, key=lambda parameter: owners[parameter.name]))
    begins: dict[int, int] = {}
    for parameter, offset in zip(layout.parameters, layout.offsets, strict=True):
        begins.setdefault(owners[parameter.name], offset)
    return Bucket(layout.parameters, layout.offsets, Shards(tuple(begins), (*begins.values(), layout.end)))


def _rounds(layouts: Sequence[_Layout], most: int) -> Iterator[list[_Layout]]:
    """Runs of buckets of about the same number of bytes each, `most` of them at most: see [Note: rounds]."""
    if len(layouts) <= most:
        yield from ([layout] for layout in layouts)
        return
    total = max(1, sum(layout.units for layout in layouts))
    before, numbers = 0, []
    for layout in layouts:
        numbers.append((2 * before + layout.units) * most // (2 * total))  # where its middle falls
        before += layout.units
    for _, numbered in groupby(zip(numbers, layouts, strict=True), key=lambda numbered: numbered[0]):
        yield [layout for _, layout in numbered]


def _cut(layouts: Sequence[_Layout], world_size: int, equal_shards: bool) -> Iterator[Bucket]:
    """The buckets of one round, cut over the ranks."""
    total = sum(layout.units for layout in layouts)
    cuts = [rank * total // world_size for rank in range(world_size + 1)]
    if equal_shards and len(layouts) == 1:
        cuts = [rank * -(-total // world_size) for rank in range(world_size + 1)]
    begin = 0
    for layout in layouts:
        unit, owners, end = layout.unit, range(world_size), layout.end
        if len(layouts) > 1:
            owners = range(bisect_right(cuts, begin) - 1, bisect_left(cuts, begin + layout.units))
        elif equal_shards:
            end = cuts[-1] * unit
        bounds = [min(max(cuts[rank] - begin, 0) * unit, end) for rank in owners]
        yield Bucket(layout.parameters, layout.offsets, Shards(owners, (*bounds, end)))
        begin += layout.units


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
            ranges.sort(key=itemgetter(0, 1))

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
