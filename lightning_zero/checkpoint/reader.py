"""A checkpoint that is open for reading, without torch: every tensor in it, unread, and how its pieces are found.

Opening reads the manifest and, by default, the headers of the shards. What is wanted is read by position straight into
its place, whatever the number of ranks that wrote it (`SegmentIndex.find`), and what isn't wanted is never read. One
mechanism serves resuming, exporting, comparing and looking; `load.Checkpoint` gives the same as torch's tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeAlias, cast

import xxhash

from lightning_zero.checkpoint.containers import put_together
from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.integrity import Depth, read_manifest, read_trainer, require_sound
from lightning_zero.checkpoint.manifest import (
    DTYPES,
    ITEM_BYTES,
    MASTER_CODES,
    Entry,
    Manifest,
    Stored,
    StoredTensor,
    StoredValue,
    label,
)
from lightning_zero.checkpoint.placeholders import put_back
from lightning_zero.checkpoint.storage import PathOrUrl, ReadableFile, is_remote, locate, open_file
from lightning_zero.checkpoint.torch_file import read_torch_file, require_dict
from lightning_zero.errors import CorruptCheckpointError, IncompleteCheckpointError
from lightning_zero.segments import Segment, SegmentIndex

_OPEN_FILES = 64
_CHECKED_BYTES = 4 << 20
"""Read at once: still in the processor's cache when the checksum goes over it."""
_REQUESTED_BYTES = 32 << 20
"""Read at once behind a URL: by several requests."""

Give: TypeAlias = Callable[[Elements, bool], Any]
"""Makes of an optimizer's state what a caller wants of it, who is told whether it is a whole tensor."""


class Reader:
    """One tag's directory, open for reading. Needs no process group; several threads may use it at once.

    Args:
        directory: the tag's, as `resolve` gives it.
        verify: what is checked at once: see `integrity`.
        manifest: of that directory, where it has been read already.
        check_reads: compare each piece of a tensor with its checksum as it is read, if it is read from its beginning to
            its end. Then one thread at a time reads a tensor.

    Attributes:
        damage: what such a comparison has found: torch's `load_state_dict`, for one, hides what is raised under it.

    Raises:
        IncompleteCheckpointError: something is missing, cut short, or another save's.
        CorruptCheckpointError: the manifest can't be believed, or (`full`) a checksum doesn't match.
    """

    def __init__(
        self,
        directory: PathOrUrl,
        verify: Depth = "sizes",
        manifest: Manifest | None = None,
        *,
        check_reads: bool = False,
    ) -> None:
        self.directory = locate(directory)
        self.manifest: Manifest = read_manifest(self.directory) if manifest is None else manifest
        require_sound(self.directory, self.manifest, verify)
        self.check_reads = check_reads
        self.worth_reading = _REQUESTED_BYTES if is_remote(self.directory) else 0
        self.damage: CorruptCheckpointError | None = None
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

    def read(self, stored: Stored, offset_bytes: int, target: memoryview) -> None:
        """Fill `target` from a stored tensor, from the given byte of it on."""
        file, tensor = stored
        self.open(file).read_into(cast("StoredTensor", tensor).offset + offset_bytes, target)

    def model(self) -> dict[str, Elements]:
        """The module's state dict; tied tensors are one object, their other names at the end.

        As it is stored: fp32 or wider for what was trained.
        """
        model = {entry.name: self._elements(entry) for entry in self.manifest.entries if entry.role != "elsewhere"}
        return model | {alias: model[stored] for alias, stored in self.manifest.aliases.items()}

    def elsewhere(self) -> dict[str, Elements]:
        """The large tensors elsewhere in Lightning's dict, by the names that their placeholders have."""
        return {entry.name: self._elements(entry) for entry in self.manifest.entries if entry.role == "elsewhere"}

    def put_back(
        self, trainer: dict[Any, Any], give: Callable[[Elements], Any] = lambda elements: elements
    ) -> dict[Any, Any]:
        """The content of `trainer.pt` with those in their place: see `placeholders.put_back`."""
        return put_back(trainer, self.elsewhere(), give, str(self.directory / self.manifest.trainer.name))

    def _elements(self, entry: Entry) -> Elements:
        of = label("model", entry.name)
        found = self.manifest.index.payloads(of)
        code = cast("StoredTensor", found[0][1]).dtype if found else _code_without_elements(entry)
        source = _Pieces(self, self.manifest.index, of, code)
        return Elements(source, entry.shape, code, code, self.worth_reading)

    def optimizer_states(
        self, states: list[Any] | None, give: Give = lambda elements, whole: elements
    ) -> list[dict[str, Any]]:
        """Every optimizer's state in torch's own format: element-wise state of its parameter's full shape.

        Args:
            states: the `optimizer_states` in `trainer.pt`; None: the tensors alone, and no parameter groups.
            give: makes something else of what is unread.
        """
        count = len(self.manifest.optimizers)
        states = [{"state": {}} for _ in range(count)] if states is None else states
        return [self._optimizer_state(index, states, give) for index in range(count)]

    def _optimizer_state(self, index: int, states: list[Any], give: Give) -> dict[str, Any]:
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
                others = require_dict(
                    state.get(position, {}), f"{self.manifest.trainer.name}: optimizer {index}'s state of {name!r}"
                )
                state[position] = self._state_of(stored[name], give) | others
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

    def _state_of(self, labels: Iterable[str], give: Give) -> dict[str, Any]:
        """One parameter's states, by their names."""
        state: dict[str, Any] = {}
        name = ""
        for of in labels:
            pieces = self.manifest.index.payloads(of)
            form = self.manifest.forms[of]
            _, first = pieces[0]
            name = first.name
            if isinstance(first, StoredValue):
                state[first.state] = first.value
                continue
            index, shape = self.manifest.index, self._shapes.get(first.name, (pieces[-1][1].stop,))
            if form == "whole":
                # [Note: whole and element-wise tensors]: the first piece's copy stands for all
                index, shape = SegmentIndex([(Segment(of, 0, math.prod(first.shape)), pieces[0])]), first.shape
            source = _Pieces(self, index, of, first.dtype)
            elements = Elements(source, shape, first.dtype, first.dtype, self.worth_reading)
            state[cast("str", first.state)] = elements, form == "whole"

        def make(value: Any, shape: tuple[int, ...] | None) -> Any:
            if not isinstance(value, tuple):
                return value
            elements, whole = value
            if shape is not None and math.prod(shape) != elements.numel:
                raise ValueError(f"{elements.numel} elements don't make the shape {shape}")
            return give(elements if shape is None else replace(elements, shape=shape), whole)

        return put_together(state, make, f"{self.directory}: the optimizer's states of {name!r}")

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {entry.name: entry.shape for entry in self.manifest.entries}

    def trainer_bytes(self) -> bytes:
        """`trainer.pt`: everything that is no tensor of the model or of an optimizer, and no large one.

        Raises:
            IncompleteCheckpointError: the file is missing, or cut short.
            CorruptCheckpointError: its checksum doesn't match.
        """
        return read_trainer(self.directory, self.manifest.trainer)

    def trainer_content(self, content: bytes | None = None, *, weights_only: bool = True) -> dict[Any, Any]:
        """What `trainer.pt` holds, as it can be written again; nothing in it is executed: see `pickled`.

        Args:
            content: what is read in its place.
            weights_only: refuse what would run code when it is loaded.

        Raises:
            UntrustedContentError: there is such a thing in it.
            CorruptCheckpointError: it is not what Lightning keeps there; or as `trainer_bytes`.
        """
        where = self.directory / self.manifest.trainer.name
        content = self.trainer_bytes() if content is None else content
        return require_trainer(read_torch_file(content, str(where), weights_only=weights_only), str(where))

    def rank_state(self, rank: int) -> bytes | None:
        """What a rank stored for itself alone, if there was such a rank and it did."""
        for file in self.manifest.files:
            for stored in file.tensors if file.rank == rank else ():
                if stored.kind == "rank":
                    self.open(file.name)  # before there is room for what it is said to hold
                    content = bytearray(stored.nbytes)
                    self.read((file.name, stored), 0, memoryview(content))
                    if xxhash.xxh3_64_hexdigest(content) != stored.xxh3:
                        raise CorruptCheckpointError(
                            f"{self.directory / file.name}: {stored.key!r}: the checksum doesn't match"
                        )
                    return bytes(content)
        return None


class _Pieces:
    """The elements of one stored tensor, wherever its pieces lie (`elements.Source`)."""

    def __init__(self, reader: Reader, index: SegmentIndex[Stored], of: str, code: str) -> None:
        self._reader = reader
        self._index = index
        self._of = of
        self._item_bytes = ITEM_BYTES[code]
        self._digest, self._digested = xxhash.xxh3_64(), 0  # of the piece that is being read, up to this element

    def require(self) -> None:
        """Make sure that the files are as large as the manifest claims, before anybody makes room for a tensor."""
        for file, _ in self._index.payloads(self._of):
            self._reader.open(file)

    def read(self, start: int, stop: int, target: memoryview) -> None:
        """Fill `target` with the elements `[start, stop)`."""
        filled = 0
        for segment, stored, skipped in self._index.find(Segment(self._of, start, stop)):
            nbytes = segment.numel * self._item_bytes
            part = target[filled : filled + nbytes]
            if self._reader.check_reads:
                self._read_and_check(segment, stored, skipped * self._item_bytes, part)
            else:
                self._reader.read(stored, skipped * self._item_bytes, part)
            filled += nbytes

    def _read_and_check(self, segment: Segment, stored: Stored, offset_bytes: int, target: memoryview) -> None:
        if offset_bytes == 0:
            self._digest, self._digested = xxhash.xxh3_64(), segment.start
        in_order = segment.start == self._digested
        step = max(_CHECKED_BYTES, self._reader.worth_reading)
        for begin in range(0, len(target), step):
            part = target[begin : begin + step]
            self._reader.read(stored, offset_bytes + begin, part)
            if in_order:
                self._digest.update(part)
        if not in_order:
            return
        self._digested = segment.stop
        file, tensor = stored[0], cast("StoredTensor", stored[1])
        if offset_bytes + len(target) == tensor.nbytes and self._digest.hexdigest() != tensor.xxh3:
            self._reader.damage = CorruptCheckpointError(
                f"{self._reader.directory / file}: {tensor.key!r}: the checksum doesn't match, the file is damaged; "
                "take another tag (`lightning-zero verify` lists all that is damaged)"
            )
            raise self._reader.damage


def _code_without_elements(entry: Entry) -> str:
    """What would be stored if there were an element: masters are fp32 or wider."""
    code = DTYPES[entry.dtype][0]
    return "F32" if entry.role == "parameter" and code not in MASTER_CODES else code


def require_trainer(trainer: dict[Any, Any], where: str) -> dict[Any, Any]:
    """What was read from `trainer.pt`, if it is what Lightning keeps there.

    Raises:
        CorruptCheckpointError: it isn't.
    """
    require_dict(trainer.get("state_dict", {}), f"{where}: the state dict")
    if not isinstance(trainer.get("optimizer_states", []), list):
        raise CorruptCheckpointError(f"{where}: the optimizers' states are no list")
    return trainer
