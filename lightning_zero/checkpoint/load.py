"""Reading a checkpoint: which tag is meant, and its tensors, each read when it is wanted.

Opening a checkpoint reads its manifest and, by default, the headers of its shards. The dicts that it gives out hold
`LazyTensor`s: what a rank needs is read by position straight into its place, whatever the number of ranks that wrote it
(`SegmentIndex.find`), and what it doesn't need is never read. One mechanism serves resuming, exporting and looking.

| `resolve` is given | `latest` | it gives |
|---|---|---|
| a tag's directory, or a file in one | not looked at | that directory |
| a save directory and a tag | not looked at | the tag, or CheckpointNotFoundError with the tags that there are |
| a save directory | names a sound tag | that tag |
| a save directory | missing, damaged, or names what is not sound | a warning, and the newest sound tag |
| a save directory without a sound tag | any | CheckpointNotFoundError, with what is wrong with each |

No row deletes or repairs anything.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import xxhash
from torch import Tensor

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.integrity import Depth, find_problems, read_manifest, read_trainer, require_sound
from lightning_zero.checkpoint.manifest import (
    DTYPES,
    MANIFEST_NAME,
    Entry,
    Manifest,
    Stored,
    StoredTensor,
    StoredValue,
    label,
    state_kind,
)
from lightning_zero.checkpoint.storage import Location, PathOrUrl, ReadableFile, locate, open_file
from lightning_zero.checkpoint.tensors import DTYPES_BY_CODE, LazyTensor
from lightning_zero.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    ZeroError,
)
from lightning_zero.segments import Segment, SegmentIndex

_OPEN_FILES = 64


class UntrustedContentError(ZeroError, pickle.UnpicklingError):
    """`trainer.pt` holds objects that are only loaded on request, with `weights_only=False`."""


def is_checkpoint(path: PathOrUrl) -> bool:
    """Whether `resolve` is worth a try: a tag's directory, a file of one, or a save directory with a tag in it."""
    where = locate(path)
    where = where.parent if where.name == commit.LATEST and where.is_file() else where
    if _tag_directory(where) is not None or (where / commit.LATEST).is_file():
        return True
    return where.is_dir() and any((child / MANIFEST_NAME).is_file() for child in where.iterdir())


def is_tag(path: PathOrUrl) -> bool:
    """Whether it names one checkpoint: a tag's directory, or a file in it."""
    return _tag_directory(locate(path)) is not None


def resolve(
    path: PathOrUrl,
    tag: str | None = None,
    *,
    verify: Depth | None = "sizes",
    rejected: Mapping[str, str] | None = None,
) -> Location:
    """The directory of the tag that is meant: see the table above.

    Args:
        path: a save directory, a tag's directory, or a file in one; a path or a URL.
        tag: of the save directory; `latest` decides where it is None.
        verify: how sound the tag that `latest` names has to be; None: the caller looks at it.
        rejected: tags that have turned out not to be sound, with what is wrong with each.

    Raises:
        CheckpointNotFoundError: it isn't there.
        CorruptCheckpointError: the tag that was asked for is a link that leaves the save directory.
    """
    where, rejected = locate(path), rejected or {}
    if where.name == commit.LATEST and where.is_file():
        where = where.parent
    if tag is not None:
        return _named(where, tag)
    if (directory := _tag_directory(where)) is not None:
        return directory
    if not where.is_dir():
        raise CheckpointNotFoundError(
            f"{where} is not a checkpoint of lightning_zero; give the save directory, or a tag's directory"
            if where.exists()
            else f"there is no checkpoint at {where}"
        )
    try:
        latest = commit.read_latest(where)
        if latest is None:
            problem = f"{where / commit.LATEST} is missing"
        elif latest in rejected:
            problem = f"the checkpoint that {where / commit.LATEST} names can't be used: {rejected[latest]}"
        else:
            directory = _named(where, latest)
            if verify is not None:
                require_sound(directory, read_manifest(directory), verify)
            return directory
    except ZeroError as error:
        problem = f"the checkpoint that {where / commit.LATEST} names can't be used: {error}"
    found = commit.list_tags(where)
    problems = {candidate.name: rejected.get(candidate.name) or candidate.problem for candidate in found}
    for candidate in sorted(found, key=lambda tag: not tag.resumable):  # weights alone only where there is no other
        if problems[candidate.name] or candidate.manifest is None:
            continue
        if verify == "full" and (wrong := next(find_problems(candidate.path, candidate.manifest, verify), None)):
            problems[candidate.name] = str(wrong)
            continue
        warnings.warn(f"{problem}\nThe newest sound checkpoint is taken instead: {candidate.path}", stacklevel=2)
        return candidate.path
    listed = "".join(f"\n  {name}: {wrong}" for name, wrong in problems.items())
    raise CheckpointNotFoundError(f"{where} holds no sound checkpoint; {problem}{listed}")


def _tag_directory(path: Location) -> Location | None:
    """The tag's directory that a path names, itself or by a file in it."""
    if (path / MANIFEST_NAME).is_file():
        return path
    if path.is_file() and (path.parent / MANIFEST_NAME).is_file():
        return path.parent
    return None


def _named(save_dir: Location, tag: str) -> Location:
    directory = save_dir / commit.validate_tag(tag)
    if not directory.is_dir():
        there = [found.name for found in commit.list_tags(save_dir)]
        raise CheckpointNotFoundError(
            f"there is no checkpoint {tag!r} in {save_dir}; there {f'are {there}' if there else 'is none at all'}"
        )
    commit.check_link(directory)
    return directory


class _Elements:
    """The elements of one stored tensor, wherever its pieces lie (`tensors.Source`)."""

    def __init__(self, checkpoint: Checkpoint, index: SegmentIndex[Stored], of: str, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._index = index
        self._of = of
        self.dtype = dtype

    def require(self) -> None:
        """Make sure that the files are as large as the manifest claims, before anybody makes room for a tensor."""
        for file, _ in self._index.payloads(self._of):
            self._checkpoint.open(file)

    def read(self, start: int, stop: int, target: memoryview) -> None:
        """Fill `target` with the elements `[start, stop)`."""
        item_bytes, filled = self.dtype.itemsize, 0
        for segment, (file, stored), skipped in self._index.find(Segment(self._of, start, stop)):
            nbytes = segment.numel * item_bytes
            offset = cast("StoredTensor", stored).offset + skipped * item_bytes
            self._checkpoint.read(file, offset, target[filled : filled + nbytes])
            filled += nbytes


class Checkpoint:
    """One tag's directory, open for reading. Needs no process group; several threads may use it at once.

    Args:
        directory: the tag's, as `resolve` gives it.
        verify: what is checked at once: see `integrity`.
        manifest: of that directory, where it has been read already.

    Raises:
        IncompleteCheckpointError: something is missing, cut short, or another save's.
        CorruptCheckpointError: the manifest can't be believed, or (`full`) a checksum doesn't match.
    """

    def __init__(self, directory: PathOrUrl, verify: Depth = "sizes", manifest: Manifest | None = None) -> None:
        self.directory = locate(directory)
        self.manifest: Manifest = read_manifest(self.directory) if manifest is None else manifest
        require_sound(self.directory, self.manifest, verify)
        self._nbytes = {file.name: file.nbytes for file in self.manifest.files}
        where = self.directory  # a cache that knew `self` would keep its files open till the next garbage collection
        self._open = functools.lru_cache(maxsize=_OPEN_FILES)(lambda file: open_file(where / file))

    def open(self, file: str) -> ReadableFile:
        """A shard file, by its name.

        Raises:
            IncompleteCheckpointError: it is missing, or smaller than the manifest says.
        """
        opened: ReadableFile = self._open(file)
        if opened.nbytes < self._nbytes[file]:
            raise IncompleteCheckpointError(
                f"{self.directory / file} was cut short: it has {opened.nbytes} bytes of {self._nbytes[file]}"
            )
        return opened

    def read(self, file: str, offset: int, target: memoryview) -> None:
        """Fill `target` from a shard file, by its name."""
        self.open(file).read_into(offset, target)

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The module's state dict, unread; tied tensors are one object, their other names at the end.

        Args:
            dtype: of the floating tensors; as they are stored where it is None (fp32 or wider for what was trained).
        """
        tensors: dict[str, Tensor] = {}
        for entry in self.manifest.entries:
            of = label("model", entry.name)
            found = self.manifest.index.payloads(of)
            stored = _dtype(found[0]) if found else _dtype_without_elements(entry)
            shown = dtype if dtype is not None and stored.is_floating_point else stored
            tensors[entry.name] = LazyTensor(_Elements(self, self.manifest.index, of, stored), entry.shape, shown)
        return tensors | {alias: tensors[stored] for alias, stored in self.manifest.aliases.items()}

    def optimizer_state(self, index: int, *, weights_only: bool = True) -> dict[str, Any]:
        """One optimizer's state in torch's own format: element-wise state unread, of its parameter's full shape.

        Args:
            index: of the optimizer.
            weights_only: for `trainer`, where the parameter groups are.
        """
        return self._optimizer_state(index, self.trainer(weights_only).get("optimizer_states", []))

    def optimizer_states(self, states: list[Any] | None) -> list[dict[str, Any]]:
        """Every optimizer's state, as `optimizer_state` gives one.

        Args:
            states: the `optimizer_states` of `trainer`; None: the tensors alone, and no parameter groups.
        """
        count = len(self.manifest.optimizers)
        states = [{"state": {}} for _ in range(count)] if states is None else states
        return [self._optimizer_state(index, states) for index in range(count)]

    def _optimizer_state(self, index: int, states: list[Any]) -> dict[str, Any]:
        in_trainer = states[index] if index < len(states) else None
        if not isinstance(in_trainer, dict) or not isinstance(in_trainer.get("state"), dict):
            raise CorruptCheckpointError(
                f"{self.directory / self.manifest.trainer.name} holds no state of optimizer {index}"
            )
        names = (name for group in self.manifest.optimizers[index].parameters for name in group)
        stored = self._states[index]
        state: dict[Any, Any] = dict(in_trainer["state"])
        for position, name in enumerate(names):
            if name in stored:
                others = _dict(
                    state.get(position, {}), f"{self.manifest.trainer.name}: optimizer {index}'s state of {name!r}"
                )
                state[position] = self._state_of(stored[name]) | others
        return {**in_trainer, "state": state}

    @functools.cached_property
    def _states(self) -> list[dict[str, list[str]]]:
        """For each optimizer: the labels of each parameter's states, by the parameter's name."""
        states: list[dict[str, list[str]]] = [{} for _ in self.manifest.optimizers]
        for of in self.manifest.index:
            _, first = self.manifest.index.payloads(of)[0]
            if first.optimizer is not None:
                states[first.optimizer].setdefault(first.name, []).append(of)
        return states

    def _state_of(self, labels: Iterable[str]) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for of in labels:
            pieces = self.manifest.index.payloads(of)
            kind = state_kind([piece for _, piece in pieces], of)
            file, first = pieces[0]
            if isinstance(first, StoredValue):
                state[first.state] = first.value
                continue
            if kind == "whole" and math.prod(first.shape) == 1:
                state[cast("str", first.state)] = self._scalar(file, first)
                continue
            index, shape = self.manifest.index, self._shapes.get(first.name, (pieces[-1][1].stop,))
            if kind == "whole":
                # [Note: whole and element-wise tensors]: the first piece's copy stands for all
                index, shape = SegmentIndex([(Segment(of, 0, math.prod(first.shape)), (file, first))]), first.shape
            state[cast("str", first.state)] = LazyTensor(_Elements(self, index, of, _dtype(pieces[0])), shape)
        return state

    def _scalar(self, file: str, stored: StoredTensor) -> Tensor:
        content = bytearray(stored.nbytes)
        self.read(file, stored.offset, memoryview(content))
        return torch.frombuffer(content, dtype=DTYPES_BY_CODE[stored.dtype]).view(stored.shape)

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {entry.name: entry.shape for entry in self.manifest.entries}

    def trainer(self, weights_only: bool = True) -> dict[str, Any]:
        """Everything that is no tensor of the model or of an optimizer: the content of `trainer.pt`.

        Args:
            weights_only: refuse whatever would run code.

        Raises:
            UntrustedContentError: there is such a thing in it.
            IncompleteCheckpointError: the file is missing, or cut short.
            CorruptCheckpointError: its checksum doesn't match, or it is not what Lightning keeps there.
        """
        where = self.directory / self.manifest.trainer.name
        loaded = unpickle(read_trainer(self.directory, self.manifest.trainer), str(where), weights_only)
        _dict(loaded.get("state_dict", {}), f"{where}: the state dict")
        if not isinstance(loaded.get("optimizer_states", []), list):
            raise CorruptCheckpointError(f"{where}: the optimizers' states are no list")
        return loaded

    def rank_state(self, rank: int) -> bytes | None:
        """What a rank stored for itself alone, if there was such a rank and it did."""
        for file in self.manifest.files:
            for stored in file.tensors if file.rank == rank else ():
                if stored.kind == "rank":
                    self.open(file.name)  # before there is room for what it is said to hold
                    content = bytearray(stored.nbytes)
                    self.read(file.name, stored.offset, memoryview(content))
                    if xxhash.xxh3_64_hexdigest(content) != stored.xxh3:
                        raise CorruptCheckpointError(
                            f"{self.directory / file.name}: {stored.key!r}: the checksum doesn't match"
                        )
                    return bytes(content)
        return None

    def lightning_checkpoint(self, weights_only: bool = True) -> dict[str, Any]:
        """What a plain Lightning checkpoint holds: `trainer` with the state dict and the optimizers' put back, unread.

        Args:
            weights_only: see `trainer`, whose errors this raises.
        """
        checkpoint = self.trainer(weights_only)
        checkpoint["state_dict"] = self.state_dict() | checkpoint.get("state_dict", {})
        if self.manifest.optimizers:
            checkpoint["optimizer_states"] = self.optimizer_states(checkpoint.get("optimizer_states", []))
        return checkpoint


def unpickle(content: bytes, where: str, weights_only: bool) -> dict[str, Any]:
    """The dict that `torch.save` put into `content`.

    Args:
        content: its checksum says that it is what was written, and not who wrote it.
        where: for the messages.
        weights_only: refuse whatever would run code.

    Raises:
        UntrustedContentError: there is such a thing in it.
        CorruptCheckpointError: it is something else.
    """
    if not weights_only:  # the file is trusted: what its classes raise is for whoever wrote them
        return _dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=False), where)
    # The names are looked for first: torch.load's own message about one that is a megabyte long takes it hours
    offending, cause = _unsafe_globals(content, where), None
    if not offending:
        try:
            loaded: object = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            cause = error
        except Exception as error:
            raise CorruptCheckpointError(
                f"{where} can't be read: {type(error).__name__}, {str(error)!r:.200}"
            ) from error
        else:
            return _dict(loaded, where)
    raise UntrustedContentError(
        f"{where} holds objects of {', '.join(offending) or 'an unknown class'}, in the hyper-parameters or the state "
        "of a callback. If you trust whoever wrote it, pass weights_only=False (Trainer.fit takes it too): "
        "it then runs what the file says"
    ) from cause


def _unsafe_globals(content: bytes, where: str) -> list[str]:
    """The names that only run on request; each fit to be shown, whoever made it up."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(record.file_size for record in archive.infolist()) > len(content):
                raise CorruptCheckpointError(f"{where} would be larger when unpacked; torch.save doesn't compress")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    except ZeroError:
        raise
    except Exception as error:
        raise CorruptCheckpointError(
            f"{where} is not what torch.save writes: {type(error).__name__}, {str(error)!r:.200}"
        ) from error
    return [f"{name if name.isprintable() else ascii(name):.100}" for name in sorted(names)[:10]]


def _dict(value: object, what: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{what} is no dict, but {type(value).__name__}")
    return value


def _dtype(stored: Stored) -> torch.dtype:
    return DTYPES_BY_CODE[cast("StoredTensor", stored[1]).dtype]


def _dtype_without_elements(entry: Entry) -> torch.dtype:
    """What `_dtype` would be if there were an element: masters are fp32 or wider."""
    dtype = DTYPES_BY_CODE[DTYPES[entry.dtype][0]]
    return torch.promote_types(dtype, torch.float32) if entry.role == "parameter" else dtype
