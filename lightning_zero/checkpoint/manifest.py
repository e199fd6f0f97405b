"""The manifest: what a checkpoint holds, and where; the data model, its JSON, and what makes it believable.

A checkpoint exists when its manifest does, so whatever reads one starts here. The text is not trusted: a manifest that
was cut short, edited or made up raises an error that names the offending file and tensor before any byte of a tensor
is read. What `Manifest.from_json` returns is consistent: every element of every tensor is stored exactly once, the
tensors of a file lie one behind the other without a hole, and no name in it leaves the checkpoint's directory.

No torch here: `lightning-zero ls` and `verify` start at once.

[Note: whole and element-wise tensors]
A stored tensor belongs to a segment, the elements [start, stop) of a flattened parameter. If it has one element for
each of these it is *element-wise*: it can be cut, put together with its neighbours, and read in part. Any other shape
(the 0-d `step` of AdamW, the row factors of Adafactor) is *whole*: it is repeated for every piece of the parameter, and
the first piece's copy stands for all of them. `StoredTensor.elementwise` is the one place that decides.

[Note: the manifest's own checksum]
Each tensor has a checksum in the manifest; the manifest's own stands at its end, over every byte before it. So a byte
that flips in a place that still reads as JSON (a step, a version) is found as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import islice
from typing import Annotated, Final, Literal, TypeAlias, cast

import msgspec
import xxhash

from lightning_zero.errors import CorruptCheckpointError, IncompleteCheckpointError
from lightning_zero.segments import Segment, SegmentIndex

FORMAT_VERSION: Final = 1
MANIFEST_NAME = "manifest.json"
TRAINER_NAME = "trainer.pt"

Kind = Literal["model", "optimizer", "rank"]
Role = Literal["parameter", "frozen", "buffer", "given", "elsewhere"]
Form = Literal["elementwise", "whole", "value"]
Plain: TypeAlias = bool | int | float | str | None
PLAIN = (bool, int, float, str, type(None))
"""The same, for `isinstance`."""

DTYPES: Mapping[str, tuple[str, int]] = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "complex128": ("C128", 16),  # not in safetensors' own list: its readers refuse a file with one, ours does not
    "complex64": ("C64", 8),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
"""The code and the bytes of an element of each dtype that a checkpoint can hold, by torch's name."""

ITEM_BYTES: Mapping[str, int] = dict(DTYPES.values())
"""The bytes of an element, by its dtype's code."""

MASTER_CODES = frozenset(("F32", "F64", "C64", "C128"))
"""What a parameter's masters are stored in."""

LARGEST = 2**63 - 1
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
Digest: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
_LARGEST_NUMEL = LARGEST // 16  # so the bytes fit in 63 bits in every dtype, stored or asked for
_LARGEST_HEADER = 8 + 100_000_000  # safetensors' own limit; a header is read into memory
_TRAINER = re.compile(r"trainer(-[0-9a-f]{16})?\.pt")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=-]{0,199}")
_SEAL = re.compile(r',\n"manifest_xxh3": "([0-9a-f]{16})"\n\}\n')
_SEAL_LENGTH = len(f',\n"manifest_xxh3": "{0:016x}"\n}}\n')


class _Part(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """What a manifest is made of: its fields are the JSON's, in that order, and their types are checked as it is read.

    None of them refers back to another, so there is nothing in them for the garbage collector.
    """


class StoredTensor(_Part, frozen=True, gc=False, omit_defaults=True):
    """One tensor in a shard file, and the elements that it belongs to.

    Attributes:
        kind: `model`: elements of an entry; `optimizer`: state of one; `rank`: what one rank alone needs.
        name: of the entry, or, for `rank`, whatever it is called.
        start: the first element of the flattened parameter.
        stop: one past the last.
        dtype: safetensors' code, such as `"F32"`.
        shape: `(stop - start,)`, or another for a whole tensor: see [Note: whole and element-wise tensors].
        offset: where its bytes begin, from the beginning of the file.
        nbytes: how many there are.
        xxh3: their xxh3_64, 16 hexadecimal digits.
        optimizer: the optimizer's index, for kind `optimizer`.
        state: the name of the state, for kind `optimizer`.
    """

    kind: Kind
    name: str
    start: Count
    stop: Count
    dtype: str
    shape: tuple[Count, ...]
    offset: Count
    nbytes: Count
    xxh3: Digest
    optimizer: Count | None = None
    state: str | None = None

    @property
    def elementwise(self) -> bool:
        """Whether it can be cut: see [Note: whole and element-wise tensors]."""
        return self.shape == (self.stop - self.start,)

    @property
    def label(self) -> str:
        """What it is a part of; the same for every piece."""
        return label(self.kind, self.name, self.optimizer, self.state)

    @property
    def key(self) -> str:
        """Its name within the safetensors file."""
        return key(self.label, self.kind, self.start, self.stop)


class _NonFinite(_Part, frozen=True, gc=False):
    """A number that JSON doesn't know, as every JSON reader can read it."""

    float: Literal["inf", "-inf", "nan"]


class StoredValue(_Part, frozen=True, gc=False):
    """An optimizer's state that is a plain number, string or None, and the segment that it belongs to."""

    optimizer: Count
    name: str
    start: Count
    stop: Count
    state: str
    value: Plain | _NonFinite

    def __post_init__(self) -> None:
        """A number is a number, once it is read."""
        if isinstance(self.value, _NonFinite):
            msgspec.structs.force_setattr(self, "value", float(self.value.float))

    @property
    def label(self) -> str:
        """What it is a part of; the same for every piece."""
        return label("optimizer", self.name, self.optimizer, self.state)


def label(kind: Kind, name: str, optimizer: int | None = None, state: str | None = None) -> str:
    """The name that all pieces of one thing share, such as `optimizer/0/exp_avg/layer.weight`."""
    return f"optimizer/{optimizer}/{state}/{name}" if kind == "optimizer" else f"{kind}/{name}"


def key(of: str, kind: Kind, start: int, stop: int) -> str:
    """The name of one piece within a safetensors file, such as `model/layer.weight[0:512]`."""
    return of if kind == "rank" else f"{of}[{start}:{stop}]"


class FileEntry(_Part, frozen=True, gc=False):
    """A shard file: what one rank has written.

    Attributes:
        name: a plain file name within the checkpoint's directory.
        rank: who wrote it.
        step: of training, as that rank saw it.
        frozen: it holds this rank's part of the parameters that weren't trained, and nothing else. Nothing in it has
            changed since it was written, which may have been by an earlier save, at that `step`.
        nbytes: the size of the file.
        header_nbytes: where the first tensor's bytes begin.
        header_xxh3: xxh3_64 of everything before.
        tensors: in the order in which they lie in the file, without a hole.
        values: the optimizer states of this rank's segments that are no tensors.
    """

    name: str
    rank: Count
    step: Count
    frozen: bool
    nbytes: Count
    header_nbytes: Count
    header_xxh3: Digest
    tensors: tuple[StoredTensor, ...]
    values: tuple[StoredValue, ...]


class TrainerFile(_Part, frozen=True, gc=False):
    """`trainer.pt`: its name, its size and the xxh3_64 of its bytes.

    Where nothing can be renamed (`remote`), a file's name says of which save it is: `trainer-0123456789abcdef.pt`.
    """

    name: str
    nbytes: Count
    xxh3: Digest


class Entry(_Part, frozen=True, gc=False):
    """One tensor of the module's state dict, or one from elsewhere in Lightning's dict.

    Attributes:
        name: in the state dict; of one from elsewhere: see `placeholders`.
        shape: of the whole tensor.
        dtype: the live module's, by torch's name (`"bfloat16"`).
        role: `parameter`: an optimizer's, and stored as its fp32 (or wider) masters; it is trained, unless it is among
            `Manifest.frozen`. The others are stored in `dtype`:
            `frozen`, `buffer`, `given` for what a hook or a callback put in a tensor's place, and `elsewhere`.
    """

    name: str
    shape: tuple[Count, ...]
    dtype: str
    role: Role

    @property
    def numel(self) -> int:
        """The number of elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)


class OptimizerEntry(_Part, frozen=True, gc=False):
    """One optimizer: its class, and the names of its parameters, group by group, in their order.

    The class is empty where whoever wrote the checkpoint was not told.
    """

    class_name: str
    parameters: tuple[tuple[str, ...], ...]


Stored: TypeAlias = tuple[str, StoredTensor | StoredValue]
"""What is stored, with the name of the file that it is stored in (a value: that its rank wrote)."""


class Manifest(msgspec.Struct, frozen=True, dict=True, forbid_unknown_fields=True):
    """Everything that a checkpoint says about itself.

    Attributes:
        format_version: of the layout on disk; a reader refuses one that it does not know.
        save_id: drawn afresh for every save, and written into every shard: a shard of another save doesn't fit.
        step: of training (Lightning's `global_step`).
        epoch: of training.
        world_size: the number of ranks that wrote it.
        stage: the ZeRO stage, for the record.
        created: ISO 8601, UTC.
        versions: of the packages that wrote it, for the record.
        trainer: everything that is no tensor of the model or of an optimizer.
        entries: the module's state dict, in its order; then the tensors from elsewhere.
        aliases: tied tensors: the other name, to the name under which it is stored.
        optimizers: in the trainer's order.
        files: a shard for each rank, in the order of the ranks; then those of the frozen parameters, in the same order.
    """

    format_version: Literal[1]
    save_id: str
    step: Count
    epoch: Count
    world_size: Count
    stage: Count
    created: str
    versions: dict[str, str]
    trainer: TrainerFile
    entries: tuple[Entry, ...]
    aliases: dict[str, str]
    optimizers: tuple[OptimizerEntry, ...]
    files: tuple[FileEntry, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all the files that it lists."""
        return self.trainer.nbytes + sum(file.nbytes for file in self.files)

    @cached_property
    def index(self) -> SegmentIndex[Stored]:
        """What is stored of the model and the optimizers, by label (in place of the segment's name) and range."""
        return SegmentIndex(
            (Segment(item.label, item.start, item.stop), (file.name, item))
            for file in self.files
            for items in (file.tensors, file.values)
            for item in items
            if not (isinstance(item, StoredTensor) and item.kind == "rank")
        )

    @cached_property
    def forms(self) -> dict[str, Form]:
        """In what form each thing is stored, by its label: see [Note: whole and element-wise tensors]."""
        return {of: _form([item for _, item in self.index.payloads(of)], of) for of in self.index}

    @cached_property
    def frozen(self) -> frozenset[str]:
        """The names of the parameters that weren't trained, which an optimizer may hold all the same.

        Then they have masters, and the role of what is trained; but all of it lies in the files of frozen parameters.
        """
        elsewhere = {
            item.name for file in self.files if not file.frozen for item in file.tensors if item.kind == "model"
        }
        return frozenset(
            entry.name
            for entry in self.entries
            if entry.role == "frozen" or (entry.role == "parameter" and entry.numel and entry.name not in elsewhere)
        )

    def to_json(self) -> str:
        """The text of `manifest.json`, sealed: see [Note: the manifest's own checksum]."""
        parts = {field: _encode(getattr(self, field)) for field in self.__struct_fields__[:-4]} | {
            "entries": _rows(self.entries),
            "aliases": _encode(self.aliases),
            "optimizers": _rows(self.optimizers),
            "files": f"[{', '.join(map(_file_text, self.files))}]",
        }
        body = "{\n" + ",\n".join(f'"{field}": {text}' for field, text in parts.items())
        return f'{body},\n"manifest_xxh3": "{xxhash.xxh3_64_hexdigest(body.encode())}"\n}}\n'

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read and check a manifest.

        Args:
            text: of `manifest.json`.
            where: its path, for the messages.

        Raises:
            CorruptCheckpointError: it is not what was written, contradicts itself, or is of an unknown version.
            IncompleteCheckpointError: elements of a tensor, or a rank's shard, are missing.
        """
        try:
            manifest = _parse(_unseal(text))
            _check(manifest)
        except (CorruptCheckpointError, IncompleteCheckpointError) as error:
            raise type(error)(f"{where}: {error}") from None
        return manifest


# ---------------------------------------------------------------------------------------------------- to JSON


def _encode(item: object) -> str:
    return _encoder.encode(item).decode()


def _plain(item: object) -> object:
    """NumPy's numbers, and names of a class of their own."""
    for kind in (str, int, float):
        if isinstance(item, kind):
            return kind(item)
    raise TypeError(f"a manifest can't hold a {type(item).__name__}")


_encoder = msgspec.json.Encoder(enc_hook=_plain)


def _rows(items: Iterable[object]) -> str:
    """A list, a line for each."""
    return f"[\n{text}\n]" if (text := ",\n".join(map(_encode, items))) else "[]"


def _file_text(file: FileEntry) -> str:
    about = {field: getattr(file, field) for field in file.__struct_fields__[:-2]}
    values = (_value_row(value) for value in file.values)
    return f'{_encode(about)[:-1]},\n"tensors": {_rows(file.tensors)},\n"values": {_rows(values)}}}'


def _value_row(item: StoredValue) -> object:
    if not isinstance(item.value, float) or math.isfinite(item.value):
        return item
    return msgspec.structs.asdict(item) | {"value": {"float": str(item.value)}}


# -------------------------------------------------------------------------------------------------- from JSON


def _unseal(text: str) -> bytes:
    """The JSON without its last member, which is right."""
    seal = _SEAL.fullmatch(text[-_SEAL_LENGTH:])
    if seal is None:
        raise CorruptCheckpointError("the manifest does not end as one does; it was cut short, or is something else")
    try:
        body = text[:-_SEAL_LENGTH].encode()
    except UnicodeEncodeError as error:
        raise CorruptCheckpointError(f"the manifest is not valid text ({error})") from None
    if xxhash.xxh3_64_hexdigest(body) != seal[1]:
        raise CorruptCheckpointError("the manifest's checksum does not match: it was damaged or edited")
    return body + b"\n}"


class _Version(msgspec.Struct):
    format_version: int


def _parse(content: bytes) -> Manifest:
    try:
        return msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        said = error
    with suppress(msgspec.DecodeError, RecursionError):
        version = msgspec.json.decode(content, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise CorruptCheckpointError(
                f"the checkpoint has the format version {version}, and this release of lightning_zero reads version "
                f"{FORMAT_VERSION}; upgrade lightning_zero"
            )
    raise CorruptCheckpointError(f"the manifest isn't one: {said!s:.300}")


def is_trainer_name(name: str) -> bool:
    """Whether `trainer.pt` may have that name: see `TrainerFile`."""
    return _TRAINER.fullmatch(name) is not None


# ----------------------------------------------------------------------------------------------- consistency


def _check(manifest: Manifest) -> None:
    if not is_trainer_name(manifest.trainer.name):
        raise CorruptCheckpointError(f"{manifest.trainer.name!r:.200} is not the name of a {TRAINER_NAME}")
    for entry in manifest.entries:
        if entry.dtype not in DTYPES:
            raise CorruptCheckpointError(f"entry {entry.name!r} has the unknown dtype {entry.dtype!r:.40}")
        if _is_too_large(entry.shape):
            raise CorruptCheckpointError(
                f"entry {entry.name!r}: the shape {entry.shape!r:.80} is larger than any tensor"
            )
    entries = {entry.name: entry for entry in manifest.entries}
    if len(entries) != len(manifest.entries):
        raise CorruptCheckpointError("entries: a name stands there twice")
    for alias, stored in manifest.aliases.items():
        if alias in entries or stored not in entries:
            raise CorruptCheckpointError(f"aliases: {alias!r} stands for {stored!r}, which can't be")
    if len({file.name for file in manifest.files}) != len(manifest.files):
        raise CorruptCheckpointError("files: a name stands there twice")
    ranks = [file.rank for file in manifest.files if not file.frozen]
    there = set(ranks)
    # world_size is not trusted: no list of that length before it is known to be right
    missing = list(islice((rank for rank in range(manifest.world_size) if rank not in there), 8))
    if missing:
        raise IncompleteCheckpointError(f"files: the shards of the ranks {missing} (and perhaps more) are not listed")
    if ranks != list(range(manifest.world_size)):
        raise CorruptCheckpointError(f"files: {manifest.world_size} ranks, and shards of the ranks {ranks!s:.80}")
    frozen_ranks = [file.rank for file in manifest.files if file.frozen]
    if len(set(frozen_ranks)) != len(frozen_ranks):
        raise CorruptCheckpointError(
            f"files: two files of frozen parameters of one rank, of the ranks {frozen_ranks!s:.80}"
        )
    for file in manifest.files:
        _check_plain_name(file.name)
        if file.frozen:
            _check_frozen(file, entries, manifest.world_size)
        elif file.step != manifest.step:
            raise CorruptCheckpointError(
                f"{file.name} is of step {file.step} and the checkpoint of step {manifest.step}: two saves are mixed"
            )
        _check_layout(file)
    _check_cover(manifest, entries)


def _check_frozen(file: FileEntry, entries: Mapping[str, Entry], world_size: int) -> None:
    """It may be an earlier save's, so nothing may be in it that can have changed since."""
    if file.rank >= world_size:
        raise CorruptCheckpointError(f"{file.name} is of rank {file.rank}, and there were {world_size}")
    for tensor in file.tensors:
        entry = entries.get(tensor.name)
        if tensor.kind != "model" or entry is None or entry.role not in ("frozen", "parameter"):
            raise CorruptCheckpointError(
                f"{file.name}: {tensor.key!r} is no frozen parameter, in a file of those alone"
            )
    if file.values:
        raise CorruptCheckpointError(f"{file.name}: {file.values[0].label!r} in a file of frozen parameters alone")


def _check_layout(file: FileEntry) -> None:
    """The tensors lie one behind the other, from the header to the end of the file."""
    ranks_own = [tensor.name for tensor in file.tensors if tensor.kind == "rank"]
    if len(set(ranks_own)) != len(ranks_own):
        raise CorruptCheckpointError(f"{file.name}: a tensor of the rank's own is listed twice")
    if file.header_nbytes > _LARGEST_HEADER:
        raise CorruptCheckpointError(f"{file.name}: a header of {file.header_nbytes} bytes is larger than any")
    position = file.header_nbytes
    for tensor in file.tensors:
        _check_tensor(tensor, file.name)
        if tensor.offset != position:
            raise CorruptCheckpointError(
                f"{file.name}: {tensor.key!r} begins at byte {tensor.offset}, and not at {position}, "
                "where the tensor before it ends"
            )
        position += tensor.nbytes
    if position != file.nbytes:
        raise CorruptCheckpointError(f"{file.name}: its tensors end at byte {position}, the file at {file.nbytes}")


def _check_tensor(tensor: StoredTensor, file: str) -> None:
    if tensor.dtype not in ITEM_BYTES:
        raise CorruptCheckpointError(f"{file}: {tensor.name!r} has the unknown dtype {tensor.dtype!r:.40}")
    is_state = tensor.kind == "optimizer"
    if (tensor.optimizer is not None) != is_state or (tensor.state is not None) != is_state:
        raise CorruptCheckpointError(f"{file}: {tensor.name!r} is of kind {tensor.kind}, and isn't told as one")
    if _is_too_large(tensor.shape):
        raise CorruptCheckpointError(
            f"{file}: {tensor.name!r}: the shape {tensor.shape!r:.80} is larger than any tensor"
        )
    if tensor.nbytes != math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]:
        raise CorruptCheckpointError(
            f"{file}: {tensor.name!r} is said to have {tensor.nbytes} bytes, "
            f"which is not what the shape {tensor.shape} makes in {tensor.dtype}"
        )
    if not is_state and not tensor.elementwise:
        raise CorruptCheckpointError(
            f"{file}: {tensor.name!r}: elements {tensor.start} to {tensor.stop} are stored with the shape "
            f"{tensor.shape}"
        )


def _is_too_large(shape: Sequence[int]) -> bool:
    # The product is bounded one factor at a time: a list of a million large factors must not cost a bignum
    numel = 1
    for size in shape:
        numel *= size or 1
        if numel > _LARGEST_NUMEL:
            return True
    return False


def _check_plain_name(name: str) -> None:
    """A name in a manifest never leaves the checkpoint's directory, nor means another file in it."""
    if not _SHARD.fullmatch(name) or name == MANIFEST_NAME or is_trainer_name(name):
        raise CorruptCheckpointError(f"files: {name!r:.200} is not the name of a shard file")


def _check_cover(manifest: Manifest, entries: Mapping[str, Entry]) -> None:
    """Every element is stored once, in one dtype, and nothing is stored that nothing needs."""
    index = manifest.index
    numels = {name: entry.numel for name, entry in entries.items()}
    for of in index:
        pieces = index.payloads(of)
        first = pieces[0][1]
        if first.optimizer is not None:
            if first.optimizer >= len(manifest.optimizers):
                raise CorruptCheckpointError(f"{of!r} is the state of an optimizer that is not listed")
            if "/" in cast("str", first.state):
                raise CorruptCheckpointError(f"{of!r}: the name of an optimizer's state holds a slash")
        elif first.name not in numels:
            raise CorruptCheckpointError(f"{of!r} is stored and is not listed among the entries")
        # A state's parameter may be no entry, where a hook took it out of the state dict
        index.check_cover(of, numels.get(first.name, pieces[-1][1].stop))
    for entry in manifest.entries:
        if numels[entry.name]:
            index.check_cover(label("model", entry.name), numels[entry.name])
            _check_dtype(entry, [item for _, item in index.payloads(label("model", entry.name))])
    _ = manifest.forms  # raises, where pieces don't fit together


def _form(pieces: list[StoredTensor | StoredValue], of: str) -> Form:
    """In what form one thing is stored, all its pieces taken together.

    Raises:
        CorruptCheckpointError: the pieces are of different forms.
    """
    tensors = [piece for piece in pieces if isinstance(piece, StoredTensor)]
    if not tensors:
        return "value"
    if len(tensors) == len(pieces) and len({piece.dtype for piece in tensors}) == 1:
        if all(piece.elementwise for piece in tensors):
            return "elementwise"
        # A whole tensor of shape (1,) looks element-wise in the one piece that has a single element
        if len({piece.shape for piece in tensors}) == 1:
            return "whole"
    raise CorruptCheckpointError(f"the pieces of {of!r} are of different dtypes or shapes")


def _check_dtype(entry: Entry, pieces: Iterable[StoredTensor | StoredValue]) -> None:
    stored = {cast("StoredTensor", piece).dtype for piece in pieces}
    allowed = MASTER_CODES if entry.role == "parameter" else {DTYPES[entry.dtype][0]}
    if len(stored) != 1 or not stored <= allowed:
        raise CorruptCheckpointError(
            f"entry {entry.name!r}, a {entry.role} of dtype {entry.dtype}, is stored as {', '.join(sorted(stored))}"
        )
