"""One fp32 model out of a checkpoint: in memory, unread, or as a file that needs no lightning_zero to be read.

One process, no process group. A file is written tensor by tensor through one small buffer, so that its peak memory does
not grow with the model; it appears under its name by a rename, whole or not at all, and what stood there before stays
until then.

[Note: a torch file without its tensors in memory]
`torch.save` lays out the archive from stand-ins whose bytes it leaves empty (`skip_data`); then each storage's bytes
are written at their place in the file, and the CRC, which is only known then, is patched into the two records that hold
it. So the layout is torch's own: `torch.load(weights_only=True, mmap=True)` reads it like any other file, and so does
`unzip -t`. FakeTensors would do for stand-ins, but the first one costs two seconds of imports.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import secrets
import shutil
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_zero.checkpoint import kernel
from lightning_zero.checkpoint.load import Checkpoint, resolve
from lightning_zero.checkpoint.storage import PathOrUrl
from lightning_zero.checkpoint.tensors import CODES, LazyTensor, tensor_chunks
from lightning_zero.errors import CheckpointMismatchError, CorruptCheckpointError, UnsupportedModelError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_HEADER_ALIGNMENT = 64
_OURS = "lightning_zero_"
"""How the keys in Lightning's dict begin that only a resume has a use for."""

Progress = Callable[[int], None]


def _no_progress(nbytes: int) -> None:
    pass


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: PathOrUrl,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Tensor]:
    """The model's state dict, floating tensors in fp32 (fp64 stays), tied tensors as one.

    Args:
        checkpoint_dir: a save directory, or a tag's.
        tag: of the save directory; `latest` decides where it is None.
        exclude_frozen_parameters: leave out the parameters that were not trained.
        lazy_mode: give stand-ins with `.shape`, `.dtype` and `.contiguous()`, which reads one.

    Raises:
        ZeroError: there is no such checkpoint, or it is damaged.
    """
    stand_ins = _fp32(Checkpoint(resolve(checkpoint_dir, tag)), exclude_frozen_parameters)
    if lazy_mode:
        return stand_ins
    read = {id(tensor): tensor.contiguous() for tensor in stand_ins.values()}
    return {name: read[id(tensor)] for name, tensor in stand_ins.items()}


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: PathOrUrl, tag: str | None = None
) -> torch.nn.Module:
    """Fill a plain module in place, each tensor read straight into the parameter's memory.

    Args:
        model: with the names and shapes of the one that was saved; of any dtype, on any device.
        checkpoint_dir: a save directory, or a tag's.
        tag: of the save directory; `latest` decides where it is None.

    Returns:
        The same module.

    Raises:
        CheckpointMismatchError: a name or a shape differs.
        ZeroError: there is no such checkpoint, or it is damaged.
    """
    directory = resolve(checkpoint_dir, tag)
    try:
        model.load_state_dict(Checkpoint(directory).state_dict())
    except RuntimeError as error:
        raise CheckpointMismatchError(f"the checkpoint {directory} is of another model: {error}") from error
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: PathOrUrl,
    output_file: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    max_shard_size: int | str | None = None,
    *,
    progress: Progress = _no_progress,
    weights_only: bool = True,
) -> None:
    """Write the fp32 model to one file, or to a folder of them.

    Args:
        checkpoint_dir: a save directory, or a tag's.
        output_file: by its ending a `.safetensors`, or else a Lightning checkpoint, which keeps the hyper-parameters,
            the epoch, the step and the callbacks' state, and which `load_from_checkpoint` reads. With
            `max_shard_size`, a folder in the Hugging Face layout.
        tag: of the save directory; `latest` decides where it is None.
        exclude_frozen_parameters: leave out the parameters that were not trained.
        max_shard_size: the largest file, in bytes or as `"5GB"`; a larger tensor gets a file of its own.
        progress: is told of the bytes as they are written.
        weights_only: for a Lightning checkpoint: refuse a `trainer.pt` whose objects would run code when loaded.

    Raises:
        ZeroError: there is no such checkpoint, or it is damaged.
        OSError: the output can't be written.
    """
    output = Path(output_file)
    checkpoint = Checkpoint(resolve(checkpoint_dir, tag))
    tensors = _fp32(checkpoint, exclude_frozen_parameters)
    if max_shard_size is not None:
        with _appears(output) as folder:
            folder.mkdir()
            _write_folder(folder, tensors, parse_size(max_shard_size), progress)
    elif output.suffix == ".safetensors":
        with _appears(output) as path:
            _write_safetensors(path, _untie(tensors), progress)
    else:
        trainer = {
            key: value for key, value in checkpoint.trainer(weights_only).items() if not str(key).startswith(_OURS)
        }
        trainer.pop("optimizer_states", None)
        trainer["state_dict"] = tensors | trainer.get("state_dict", {})
        with _appears(output) as path:
            try:
                _write_torch(path, trainer, progress)
            except RecursionError as error:
                where = checkpoint.directory / checkpoint.manifest.trainer.name
                raise CorruptCheckpointError(f"{where} holds what is too deep to be written again") from error


def parse_size(size: int | str) -> int:
    """A number of bytes: `5_000_000_000`, `"5GB"` (powers of 1000), `"5GiB"` (powers of 1024).

    Raises:
        ValueError: it is neither, or not positive.
    """
    text = str(size).strip().upper()
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    try:
        nbytes = int(float(text.removesuffix(unit)) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        nbytes = 0
    if nbytes <= 0:
        raise ValueError(f'{size!r} is not a size; give a number of bytes, or one such as "5GB"')
    return nbytes


def exported_bytes(checkpoint: Checkpoint, exclude_frozen_parameters: bool = False) -> int:
    """The bytes of the tensors that an export writes: what `progress` adds up to."""
    tensors = {id(tensor): tensor for tensor in _fp32(checkpoint, exclude_frozen_parameters).values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def _fp32(checkpoint: Checkpoint, exclude_frozen_parameters: bool) -> dict[str, Tensor]:
    """The state dict, unread, floating tensors in fp32 but for those that are wider."""
    frozen = {entry.name for entry in checkpoint.manifest.entries if entry.role == "frozen"}
    excluded = frozen if exclude_frozen_parameters else set()
    aliases = checkpoint.manifest.aliases
    wide = checkpoint.state_dict()
    narrow = checkpoint.state_dict(torch.float32)
    return {
        name: wide[name] if tensor.dtype == torch.float64 else narrow[name]
        for name, tensor in wide.items()
        if aliases.get(name, name) not in excluded
    }


@contextmanager
def _appears(output: Path) -> Iterator[Path]:
    """A hidden name to write under; what was written takes its own name if all went well, and else goes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    hidden = output.parent / f".{output.name}.{secrets.token_hex(4)}"
    try:
        yield hidden
        if hidden.is_dir() and output.is_dir():
            _replace_folder(hidden, output)
        else:
            os.replace(hidden, output)
    finally:
        if hidden.is_dir():
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            hidden.unlink(missing_ok=True)


def _replace_folder(new: Path, output: Path) -> None:
    """An earlier export goes; anything else that lies in the folder is somebody's, and stays."""
    foreign = [name for name in os.listdir(output) if not (name.startswith("model") and "safetensors" in name)]
    if foreign:
        raise FileExistsError(f"{output} exists and holds {foreign[0]!r}; give a new folder, or an empty one")
    if not kernel.exchange(new, output):
        shutil.rmtree(output)
        os.rename(new, output)


# ------------------------------------------------------------------------------------------------ safetensors


def _untie(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors has no ties: each tensor once, under its first name, as `safetensors.torch.save_model` does it."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: tensors[name] for name in first.values()}


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], progress: Progress) -> None:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    offset = 0
    for name, tensor in ordered:
        if tensor.dtype not in CODES or tensor.dtype == torch.complex128:
            raise UnsupportedModelError(
                f"{name!r} is {tensor.dtype}, which a .safetensors can't hold; export to a .ckpt"
            )
        table[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset := offset + tensor.nbytes],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _HEADER_ALIGNMENT)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            for chunk in tensor_chunks(tensor):
                file.write(chunk)
                progress(len(chunk))
        file.flush()
        os.fsync(file.fileno())


def _write_folder(folder: Path, tensors: Mapping[str, Tensor], max_bytes: int, progress: Progress) -> None:
    """The Hugging Face layout: `model.safetensors`, or numbered files with an index that says where each tensor is."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in _untie(tensors).items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        _write_safetensors(folder / "model.safetensors", shards[0], progress)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / file_name, shard, progress)
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ torch


def _write_torch(path: Path, checkpoint: dict[str, Any], progress: Progress) -> None:
    """See [Note: a torch file without its tensors in memory]."""
    lazy = {id(value): value for value in checkpoint["state_dict"].values() if isinstance(value, LazyTensor)}
    stand_ins = {key: _StandIn(tensor) for key, tensor in lazy.items()}
    sources = {stand_in.storage._cdata: lazy[key] for key, stand_in in stand_ins.items()}
    state_dict = {name: stand_ins.get(id(value), value) for name, value in checkpoint["state_dict"].items()}
    laid_out = checkpoint | {"state_dict": state_dict}
    with torch.serialization.skip_data():
        torch.save(laid_out, path)
    storages = _storages(laid_out)
    with open(path, "r+b") as file, zipfile.ZipFile(path) as archive:
        places = _places(file, archive)
        for number, storage in enumerate(storages):
            place = places[f"data/{number}"]
            if not place.nbytes:
                continue
            crc = 0
            file.seek(place.data)
            source = sources.get(storage._cdata)
            for chunk in tensor_chunks(_elements(storage) if source is None else source):
                file.write(chunk)
                crc = zlib.crc32(chunk, crc)
                progress(len(chunk))
            for offset in place.checksums:
                file.seek(offset)
                file.write(struct.pack("<I", crc))
        file.flush()
        os.fsync(file.fileno())


class _StandIn:
    """Pickled, it is a tensor on the CPU; its storage has a size, and no memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        self.storage = self._tensor.untyped_storage()

    def __reduce__(self) -> tuple[Any, ...]:
        tensor = self._tensor
        place: tuple[Any, ...] = (0, tuple(tensor.shape), tensor.stride(), False, OrderedDict())
        # Dtypes that are younger than torch's typed storages are pickled in a way of their own
        typed = tensor.dtype in torch.storage._dtype_to_storage_type_map()
        storage: Any = tensor._typed_storage() if typed else self.storage  # type: ignore[no-untyped-call]
        storage._fake_device = torch.device("cpu")  # where it pretends to be: torch.save asks, for FakeTensors' sake
        if typed:
            return torch._utils._rebuild_tensor_v2, (storage, *place)
        return torch._utils._rebuild_tensor_v3, (storage, *place, tensor.dtype)


def _storages(laid_out: object) -> list[torch.UntypedStorage]:
    """The storages in the order in which `torch.save` numbers them: that in which the pickler meets them first."""
    found: dict[int, torch.UntypedStorage] = {}

    class Recorder(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            if isinstance(item, torch.storage.TypedStorage):
                item = item._untyped_storage
            if isinstance(item, torch.UntypedStorage):
                found.setdefault(item._cdata, item)
                return item._cdata
            return None

    Recorder(io.BytesIO(), protocol=torch.serialization.DEFAULT_PROTOCOL).dump(laid_out)
    return list(found.values())


def _elements(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a record of the archive has its bytes, and where its CRC stands (offsets from the file's beginning)."""

    data: int
    nbytes: int
    checksums: tuple[int, int]


def _places(file: BinaryIO, archive: zipfile.ZipFile) -> dict[str, _Place]:
    """The records by name, without the archive's own folder. APPNOTE.TXT of PKWARE: 4.3.7, 4.3.9 and 4.3.12."""
    places = {}
    entry = archive.start_dir
    for info in archive.infolist():
        file.seek(info.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
        data = info.header_offset + 30 + name_bytes + extra_bytes
        # Behind the data stands the data descriptor: a signature, the CRC, the sizes
        places[info.filename.split("/", 1)[1]] = _Place(data, info.file_size, (data + info.file_size + 4, entry + 16))
        file.seek(entry + 28)
        entry += 46 + sum(struct.unpack("<HHH", file.read(6)))
    return places
