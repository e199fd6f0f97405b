"""What differs between two checkpoints: of whatever stages and numbers of ranks, and without either in memory.

Compared is what a model and its optimizers are: every entry of the state dict, every optimizer state, the tied names,
the optimizers and their settings, the schedulers, the hyper-parameters, the step and the epoch. Not compared is where
and how it was trained: the number of ranks, the stage, their random states, the positions of loops and callbacks.

Pieces that are cut alike in both and have the same checksum are the same, and aren't read. (So what is compared is what
was written; that it still lies there as it was written is for `verify`.) The others are read range by range, two
megabytes at a time. Elements differ if a bit of them does: 0.0 from -0.0, and a NaN from another, not from itself.

torch is imported when there is something to read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from lightning_zero.checkpoint.integrity import THREADS
from lightning_zero.checkpoint.manifest import Role, Stored, StoredTensor, StoredValue, label
from lightning_zero.checkpoint.reader import Reader
from lightning_zero.checkpoint.storage import Location
from lightning_zero.errors import ZeroError
from lightning_zero.segments import Segment, SegmentIndex

_CHUNK_BYTES = 2 << 20
_MOST_AT_ONCE = 64
"""Of many small things: to hand one to a thread takes longer than to compare what has the same checksum."""
_SETTINGS = ("hyper_parameters", "datamodule_hyper_parameters", "lr_schedulers")
"""What is compared of `trainer.pt`, besides the optimizers' param groups."""

Verdict = Literal["same", "different", "only in A", "only in B"]
Kind: TypeAlias = "Role | Literal['state']"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One entry, or one optimizer state of one parameter.

    Attributes:
        name: of the entry.
        kind: the entry's role (in A, if it is in both), or `state`.
        optimizer: the index of the state's optimizer.
        state: the state's name.
        verdict: whether it is the same in both.
        reason: what differs, where it isn't just elements: a shape, a dtype, a role.
        numel: how many elements were compared.
        differing: how many of them differ.
        max_difference: the largest absolute difference of two elements; NaN where one of them is.
    """

    name: str
    kind: Kind
    optimizer: int | None = None
    state: str | None = None
    verdict: Verdict = "same"
    reason: str = ""
    numel: int = 0
    differing: int = 0
    max_difference: float = 0.0


@dataclass(frozen=True, slots=True)
class Difference:
    """Two checkpoints, compared.

    Attributes:
        settings: what differs apart from tensors: a name, and the values in A and B as text.
        comparisons: the entries in A's order, then those only in B, each with its optimizer states behind it.
    """

    settings: list[tuple[str, str, str]]
    comparisons: list[Comparison]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.settings and all(comparison.verdict == "same" for comparison in self.comparisons)


class Side(Reader):
    """One of the two checkpoints; several threads may read from it at once.

    Args:
        directory: the tag's; see `Reader` for what is raised.
    """

    def __init__(self, directory: Location) -> None:
        super().__init__(directory)
        self.entries = {entry.name: entry for entry in self.manifest.entries}
        self.states: dict[str, list[str]] = {}
        """The labels of each parameter's states, by the parameter's name."""
        for of_optimizer in self._states:
            for name, labels in of_optimizer.items():
                self.states.setdefault(name, []).extend(labels)

    def first(self, of: str) -> Stored:
        """The first piece of what has a label."""
        return self.manifest.index.payloads(of)[0]

    def nbytes(self, of: str) -> int:
        """The bytes of what has a label."""
        pieces = (item for _, item in self.manifest.index.payloads(of))
        return sum(item.nbytes for item in pieces if isinstance(item, StoredTensor))


def compare(a: Side, b: Side, progress: Callable[[int], None] = lambda nbytes: None) -> Difference:
    """Compare two checkpoints.

    Args:
        a: one.
        b: the other.
        progress: is told, from several threads, of A's bytes that were dealt with.
    """
    todo = list(_things(a, b))
    several = max(1, min(_MOST_AT_ONCE, len(todo) // (_MOST_AT_ONCE * THREADS)))

    def compare_some(first: int) -> list[Comparison]:
        return [_compare(a, b, thing, of, progress) for thing, of in todo[first : first + several]]

    with ThreadPoolExecutor(THREADS, "lightning_zero-diff") as pool:
        compared = list(pool.map(compare_some, range(0, len(todo), several)))
    return Difference(list(_settings(a, b)), [comparison for some in compared for comparison in some])


def bytes_to_compare(a: Side, b: Side) -> int:
    """What `progress` is told of, all together."""
    return sum(a.nbytes(of) for _, of in _things(a, b) if of in a.manifest.index)


# ------------------------------------------------------------------------------------------------------ tensors


def _things(a: Side, b: Side) -> Iterator[tuple[Comparison, str]]:
    """Everything that is in either: what there is to say of it in any case, and its label."""
    names = dict.fromkeys((*a.entries, *b.entries, *a.states, *b.states))
    for name in names:
        if name in a.entries or name in b.entries:
            role = (a.entries.get(name) or b.entries[name]).role
            yield Comparison(name, role), label("model", name)
        for of in dict.fromkeys((*a.states.get(name, ()), *b.states.get(name, ()))):
            _, first = (a if of in a.manifest.index else b).first(of)
            yield Comparison(name, "state", first.optimizer, first.state), of


def _compare(a: Side, b: Side, thing: Comparison, of: str, progress: Callable[[int], None]) -> Comparison:
    of_entry = thing.kind != "state"
    there = [thing.name in side.entries if of_entry else of in side.manifest.index for side in (a, b)]
    if not all(there):
        return _with(thing, verdict="only in A" if there[0] else "only in B")
    reasons = []
    if of_entry:
        ours, theirs = a.entries[thing.name], b.entries[thing.name]
        for what in ("shape", "dtype", "role"):
            if getattr(ours, what) != getattr(theirs, what):
                reasons.append(f"{what} {getattr(ours, what)} and {getattr(theirs, what)}")
        if ours.shape != theirs.shape:
            return _with(thing, verdict="different", reason=", ".join(reasons))
        if not ours.numel:
            return _with(thing, verdict="different" if reasons else "same", reason=", ".join(reasons))
    measured = _measure(a, b, of, progress)
    if isinstance(measured, str):
        return _with(thing, verdict="different", reason=", ".join([*reasons, measured]))
    numel, differing, most = measured
    return _with(
        thing,
        verdict="different" if differing or reasons else "same",
        reason=", ".join(reasons),
        numel=numel,
        differing=differing,
        max_difference=most,
    )


def _with(thing: Comparison, **changes: Any) -> Comparison:
    return Comparison(thing.name, thing.kind, thing.optimizer, thing.state, **changes)


_Measured: TypeAlias = "tuple[int, int, float]"
"""How many elements there are, how many of them differ, and by how much at most."""


def _measure(a: Side, b: Side, of: str, progress: Callable[[int], None]) -> _Measured | str:
    """Compare what both store under a label, or say why it can't be compared."""
    pieces, others = a.manifest.index.payloads(of), b.manifest.index.payloads(of)
    form, other_form = (side.manifest.forms[of] for side in (a, b))
    (_, first), (_, other) = pieces[0], others[0]
    if isinstance(first, StoredValue) or isinstance(other, StoredValue):
        ours, theirs = (_value_text(item) for item in (first, other))
        return (1, 0, 0.0) if ours == theirs else f"{ours} and {theirs}"
    if form != other_form:
        return f"stored {form} and {other_form}"
    if form == "whole" and first.shape != other.shape:
        return f"shape {first.shape} and {other.shape}"
    total, other_total = (stored[-1][1].stop for stored in (pieces, others))
    if form == "whole":
        total = math.prod(first.shape)
        index_a, index_b = _whole(of, pieces[0], total), _whole(of, others[0], total)
    elif total != other_total:
        return f"{total} and {other_total} elements"
    else:
        index_a, index_b = a.manifest.index, b.manifest.index
    differing, most = 0, 0.0
    for file, piece in index_a.payloads(of):
        tensor = cast("StoredTensor", piece)
        start, stop = (0, total) if form == "whole" else (tensor.start, tensor.stop)
        for segment, found, skipped in index_b.find(Segment(of, start, stop)):
            if not _is_same(tensor, cast("StoredTensor", found[1]), segment, start, stop):
                more, by = _count(a, b, (file, tensor), found, segment.numel, segment.start - start, skipped)
                differing, most = differing + more, _larger(most, by)
            progress(segment.numel * (tensor.nbytes // max(1, math.prod(tensor.shape))))
    return total, differing, most


def _whole(of: str, stored: Stored, numel: int) -> SegmentIndex[Stored]:
    """[Note: whole and element-wise tensors]: the first piece's copy stands for all."""
    return SegmentIndex([(Segment(of, 0, numel), stored)])


def _value_text(item: StoredTensor | StoredValue) -> str:
    return repr(item.value) if isinstance(item, StoredValue) else f"a tensor of shape {item.shape}"


def _is_same(ours: StoredTensor, theirs: StoredTensor, overlap: Segment, start: int, stop: int) -> bool:
    """Whether the checksums say so: they are of the pieces, so the overlap has to be all of both."""
    return (
        (overlap.start, overlap.stop) == (start, stop)
        and ours.nbytes == theirs.nbytes
        and ours.shape == theirs.shape
        and ours.dtype == theirs.dtype
        and ours.xxh3 == theirs.xxh3
    )


def _larger(one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _count(a: Side, b: Side, ours: Stored, theirs: Stored, numel: int, skip_a: int, skip_b: int) -> tuple[int, float]:
    """Read `numel` elements of both: how many differ, and by how much at most."""
    import torch

    from lightning_zero.checkpoint.tensors import DTYPES_BY_CODE, tensor_bytes

    dtypes = [DTYPES_BY_CODE[cast("StoredTensor", stored[1]).dtype] for stored in (ours, theirs)]
    common = dtypes[0] if dtypes[0] == dtypes[1] else None
    chunk = max(1, _CHUNK_BYTES // max(dtype.itemsize for dtype in dtypes))
    buffers = [torch.empty(min(chunk, numel), dtype=dtype) for dtype in dtypes]
    differing, most = 0, 0.0
    for begin in range(0, numel, chunk):
        count = min(chunk, numel - begin)
        parts = [buffer[:count] for buffer in buffers]
        for side, stored, skip, part in zip((a, b), (ours, theirs), (skip_a, skip_b), parts, strict=True):
            side.read(stored, (skip + begin) * part.dtype.itemsize, tensor_bytes(part))
        wide = torch.complex128 if any(dtype.is_complex for dtype in dtypes) else torch.float64
        if common is not None:
            rows = [part.view(torch.uint8).view(count, common.itemsize) for part in parts]
            unlike = (rows[0] != rows[1]).any(dim=1)
        else:
            unlike = parts[0].to(wide) != parts[1].to(wide)
        if unlike.any():
            ours_wide, theirs_wide = (part.to(wide)[unlike] for part in parts)
            differing += int(unlike.sum())
            most = _larger(most, float((ours_wide - theirs_wide).abs().max()))
    return differing, most


# ----------------------------------------------------------------------------------------------------- settings


def _settings(a: Side, b: Side) -> Iterator[tuple[str, str, str]]:
    ours, theirs = a.manifest, b.manifest
    classes, other_classes = (", ".join(o.class_name for o in m.optimizers) for m in (ours, theirs))
    yield from _unlike("step", ours.step, theirs.step)
    yield from _unlike("epoch", ours.epoch, theirs.epoch)
    yield from _unlike("tied", ours.aliases, theirs.aliases)
    yield from _unlike("optimizers", classes, other_classes)
    for index, (one, other) in enumerate(zip(ours.optimizers, theirs.optimizers, strict=False)):
        sizes, other_sizes = ([len(group) for group in o.parameters] for o in (one, other))
        if sizes != other_sizes:
            yield f"optimizers.{index}.sizes of groups", str(sizes), str(other_sizes)
        else:
            yield from _unlike(f"optimizers.{index}.parameters", one.parameters, other.parameters)
    if (ours.trainer.nbytes, ours.trainer.xxh3) == (theirs.trainer.nbytes, theirs.trainer.xxh3):
        return
    try:
        found = list(_unlike("", _of_trainer(a), _of_trainer(b)))
    except ZeroError as error:
        found = [("settings", f"can't be compared: {error}", "")]
    yield from found


def _of_trainer(side: Side) -> dict[str, Any]:
    from lightning_zero.checkpoint.load import Checkpoint

    settings, groups = Checkpoint(side.directory, "none", side.manifest).settings(*_SETTINGS)
    return {**settings, "optimizers": groups}


_MISSING = "nothing"


def _unlike(path: str, ours: Any, theirs: Any) -> Iterator[tuple[str, str, str]]:
    """The leaves of nested dicts and lists that differ, each with its path, as text."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys((*ours, *theirs)):
            yield from _unlike(f"{path}.{key}".lstrip("."), ours.get(key, _MISSING), theirs.get(key, _MISSING))
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _unlike(f"{path}.{index}".lstrip("."), one, other)
    elif (exact := (_exact(ours), _exact(theirs)))[0] != exact[1]:
        shown = str(ours), str(theirs)
        yield path, *(shown if shown[0] != shown[1] else exact)


def _exact(value: Any) -> str:
    """A text that tells it from any other value, where a NaN is no difference from itself.

    A tensor's `repr` leaves out digits, and elements; a set's has them in any order.
    """
    if str(getattr(value, "layout", "")) == "torch.strided":
        return f"{value.dtype} {tuple(value.shape)} {value.tolist()}"
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__} {sorted(map(repr, value))}"
    return repr(value)
