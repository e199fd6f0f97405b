"""What a directory of torch.distributed.checkpoint (DCP) says that it holds, and where: its `.metadata`.

[Note: DCP's layout]
What is saved is a nested dict, flattened to *leaves*: each has a path (the keys that lead to it) and a name (the path,
joined by dots). A leaf that is a tensor is cut into *chunks*, boxes of it; any other is one object. Every chunk and
every object is an archive of its own, as `torch.save` writes one, and a rank's archives lie one behind the other in its
files `__{rank}_{number}.distcp`. `.metadata`, written last, is a pickle of torch's own classes:

| `Metadata` | |
|---|---|
| `planner_data` | each leaf's path, by its name, in the order of the dict |
| `state_dict_metadata` | what each leaf is; of a tensor its dtype, its shape, its chunks' offsets and sizes |
| `storage_data` | by name and offsets (of an object, None): the file, and the archive's place in it |

DCP itself would execute that pickle; here it is read as a description. Nothing that it says of a place is believed: a
file's name is one of those above, no two archives overlap, and each is within its file before it is read.
Source: the files that torch 2.13 writes, and torch/distributed/checkpoint/{metadata,filesystem}.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pickle import UnpicklingError
from typing import Any, TypeAlias

from lightning_zero.checkpoint.descriptions import item, require, sizes
from lightning_zero.checkpoint.manifest import DTYPES
from lightning_zero.checkpoint.pickled import Global, Object, read_pickle
from lightning_zero.checkpoint.storage import Location, names_in, read_file
from lightning_zero.errors import CorruptCheckpointError, IncompleteCheckpointError, UnsupportedModelError, ZeroError

METADATA_NAME = ".metadata"
_FILE = re.compile(r"__(\d{1,9})_\d{1,9}\.distcp")
_HOME = "torch.distributed.checkpoint"
_METADATA = Global(f"{_HOME}.metadata", "Metadata")
_TENSOR = Global(f"{_HOME}.metadata", "TensorStorageMetadata")
_OBJECT = Global(f"{_HOME}.metadata", "BytesStorageMetadata")
_PROPERTIES = Global(f"{_HOME}.metadata", "TensorProperties")
_CHUNK = Global(f"{_HOME}.metadata", "ChunkStorageMetadata")
_INDEX = Global(f"{_HOME}.metadata", "MetadataIndex")
_PLACE = Global(f"{_HOME}.filesystem", "_StorageInfo")
_MOST_KEYS = 64

KeyPath: TypeAlias = "tuple[str | int, ...]"
_Stored: TypeAlias = "tuple[str, tuple[int, ...] | None]"
"""By what an archive is found: its leaf's name, and the chunk's offsets."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where an archive is: a file's name, and its bytes in there."""

    file: str
    begin: int
    end: int

    @property
    def rank(self) -> int:
        """Whose file it is."""
        return int(self.file.split("_")[2])


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor: where it begins and how large it is in each dimension, and its archive."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Chunked:
    """A tensor: its dtype's code, its shape, and what it is cut into."""

    code: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        """The number of elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)


Leaf: TypeAlias = Chunked | Place
"""A tensor, or the place of what is none."""


def is_distributed(directory: Location) -> bool:
    """Whether a directory holds what DCP has written, whole or not."""
    return any(map(_FILE.fullmatch, names_in(directory)))


def read_metadata(directory: Location) -> dict[KeyPath, Leaf]:
    """The leaves, by their paths, in their order.

    Raises:
        IncompleteCheckpointError: there is no `.metadata`, or it says of a chunk not where it is.
        CorruptCheckpointError: it isn't what DCP writes, or contradicts itself.
        UnsupportedModelError: the archives are compressed, or none of `torch.save`.
    """
    where = f"{directory / METADATA_NAME}"
    try:
        content = read_file(directory / METADATA_NAME)
    except IncompleteCheckpointError as error:
        raise IncompleteCheckpointError(
            f"{error}: it is written last, so the save didn't come to its end; import an earlier checkpoint"
        ) from error
    try:
        saved = _fields(read_pickle(content, _refuse).value, _METADATA)
        places = _places(item(saved, "storage_data", dict, where), where)
        paths = item(saved, "planner_data", dict, where)
        leaves = item(saved, "state_dict_metadata", dict, where)
        if paths.keys() != leaves.keys():
            raise UnpicklingError("what it lists isn't what it has the paths of")
        return {_path(name, path): _leaf(name, leaves[name], places, where) for name, path in paths.items()}
    except ZeroError:
        raise
    except Exception as error:
        raise CorruptCheckpointError(
            f"{where} is not what torch.distributed.checkpoint writes: {type(error).__name__}, {str(error)!r:.200}"
        ) from error


def _refuse(pid: object) -> None:
    raise UnpicklingError("it refers to what is not in it")


def _fields(value: object, kind: Global) -> Any:
    """The attributes of an object of that class."""
    if type(value) is not Object or value.function != kind or len(value.steps) > 1:
        raise UnpicklingError(f"{getattr(value, 'function', value)!r:.80} stands where {kind.name} belongs")
    return value.steps[0][1] if value.steps else {}


def _path(name: object, path: object) -> KeyPath:
    if type(path) is not tuple or not 0 < len(path) <= _MOST_KEYS or not all(type(key) in (str, int) for key in path):
        raise UnpicklingError(f"{path!r:.80} is no path")
    if ".".join(map(str, path)) != name:
        raise UnpicklingError(f"{path!r:.80} is the path of {name!r:.80}")
    return path


def _places(storage: Mapping[Any, Any], where: str) -> dict[_Stored, Place]:
    places = {}
    for index, place in storage.items():
        key = _fields(index, _INDEX)
        name, offsets = require(key["fqn"], str, f"{where}: a name"), key.get("offset")
        of = name, None if offsets is None else sizes(offsets, f"{where}: an offset of {name!r:.80}")
        if of in places:
            raise UnpicklingError(f"{of!r:.80} is stored twice")
        places[of] = _place(_fields(place, _PLACE), f"{where}: {name!r:.200}")
    for place, behind in pairwise(sorted(places.values())):
        if place.file == behind.file and behind.begin < place.end:
            raise UnpicklingError(f"two archives overlap in {place.file}, at byte {behind.begin}")
    return places


def _place(saved: Mapping[Any, Any], where: str) -> Place:
    file = item(saved, "relative_path", str, where)
    if saved.get("transform_descriptors"):
        raise UnsupportedModelError(
            f"{where} was transformed as it was written ({saved['transform_descriptors']!r:.80}); "
            "save without extensions, such as a compression"
        )
    if file.endswith(".safetensors"):
        raise UnsupportedModelError(
            f"{where} is in {file!r:.200}, in the layout of Hugging Face; only what torch.save has written is read: "
            "save by torch.distributed.checkpoint's FileSystemWriter as it is by default"
        )
    if not _FILE.fullmatch(file):
        raise CorruptCheckpointError(f"{where} is said to be in {file!r:.200}, which is no name of a file of DCP's")
    begin = item(saved, "offset", int, where)
    return Place(file, begin, begin + item(saved, "length", int, where))


def _leaf(name: str, value: object, places: Mapping[_Stored, Place], where: str) -> Leaf:
    where = f"{where}: {name!r:.200}"
    if getattr(value, "function", None) == _OBJECT:
        return _placed(places.get((name, None)), where)
    saved = _fields(value, _TENSOR)
    dtype = _fields(saved["properties"], _PROPERTIES)[0]
    if type(dtype) is not Global or dtype.name not in DTYPES:
        raise UnsupportedModelError(f"{where} is of the dtype {dtype!r:.80}, which a checkpoint can't hold")
    shape, chunks = sizes(saved["size"], f"{where}: the shape"), []
    for chunk in item(saved, "chunks", list, where):
        box = _fields(chunk, _CHUNK)
        offsets, extent = sizes(box["offsets"], f"{where}: an offset"), sizes(box["sizes"], f"{where}: a size")
        inside = len(offsets) == len(extent) == len(shape)
        if not inside or any(o + s > whole for o, s, whole in zip(offsets, extent, shape, strict=True)):
            raise CorruptCheckpointError(
                f"{where}: a chunk of {extent!s:.80} at {offsets!s:.80} isn't within the shape {shape!s:.80}"
            )
        if all(extent):  # where there are more ranks than rows, some have none
            chunks.append(Chunk(offsets, extent, _placed(places.get((name, offsets)), where)))
    return Chunked(DTYPES[dtype.name][0], shape, tuple(chunks))


def _placed(place: Place | None, where: str) -> Place:
    if place is None:
        raise IncompleteCheckpointError(f"{where} is listed, or a chunk of it, and is stored nowhere")
    return place
