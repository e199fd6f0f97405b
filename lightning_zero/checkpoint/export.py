"""The model out of a checkpoint, in fp32, as files that need no lightning_zero to be read.

One process, no process group; and no torch, unless values are cast, or `trainer.pt` holds objects of unusual classes
(see `torch_file`). A file is written through a few small buffers, so that its peak memory does not grow with
the model.

| the output | how it comes to be | what was there before |
|---|---|---|
| a file | whole or not at all: by a rename; behind a URL, by the store | stays until then |
| a folder | whole or not at all, by a rename | an earlier export goes, what belongs beside it stays, else an error |
| a folder behind a URL | file by file, the index at last; if one fails, all go | an earlier export is an error |

| what | its dtype in the export |
|---|---|
| a parameter, trained or frozen, and what a hook or a callback put in its place | `dtype`, if it is floating |
| a buffer | its own; fp32, if it has 16 bits and `dtype` is fp32, as DeepSpeed's `zero_to_fp32` does it |
| an optimizer's state | its own |

`dtype` is fp32 where none is asked for; then what is wider than fp32 stays as it is.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import PicklingError
from typing import TYPE_CHECKING, Any

from lightning_zero.checkpoint import kernel
from lightning_zero.checkpoint.containers import leaves_of
from lightning_zero.checkpoint.elements import FLOATING, NAMES, Elements
from lightning_zero.checkpoint.hugging_face import write_folder, write_safetensors
from lightning_zero.checkpoint.manifest import Role
from lightning_zero.checkpoint.plain_loops import plain_loops
from lightning_zero.checkpoint.reader import Reader
from lightning_zero.checkpoint.resolution import resolve
from lightning_zero.checkpoint.storage import Location, PathOrUrl, is_remote, locate, names_in, remove_file
from lightning_zero.checkpoint.torch_file import Progress, write_torch_file
from lightning_zero.errors import CheckpointMismatchError, CorruptCheckpointError

if TYPE_CHECKING:
    import torch
    from upath import UPath

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_DTYPES = {"bf16": "BF16", "bfloat16": "BF16", "fp16": "F16", "float16": "F16", "fp32": "F32", "float32": "F32"}
"""The codes of the dtypes to export in."""

_BESIDE_WEIGHTS = (".jinja", ".json", ".md", ".model", ".spm", ".tiktoken", ".txt")
"""What a Hugging Face folder has beside its weights: the configuration, the tokenizer, the model card."""
PLAIN_STATE_DICTS = (".bin", ".pt", ".pth")
_DEAD_SECONDS = 24 * 3600
_OURS = "lightning_zero_"
"""How the keys begin, in Lightning's dict and among an optimizer's states, that only a resume has a use for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be exported of a checkpoint.

    Attributes:
        exclude_frozen_parameters: leave out the parameters that were not trained.
        dtype: the code of the floating parameters' dtype (`parse_dtype`); None: fp32, or wider where they are.
        with_optimizer: the optimizers' states too.
        submodule: this part of the module alone, under the names that it has by itself; all of it where it is empty.
    """

    exclude_frozen_parameters: bool = False
    dtype: str | None = None
    with_optimizer: bool = False
    submodule: str = ""

    def __post_init__(self) -> None:
        if self.with_optimizer and (self.dtype is not None or self.submodule):
            raise ValueError(
                "with_optimizer=True writes what a training resumes from, which is the whole module in fp32; "
                "leave dtype and submodule out"
            )

    @property
    def prefix(self) -> str:
        """What the names that are wanted begin with, and are written without."""
        return f"{self.submodule}." if self.submodule else ""

    def of(self, checkpoint: Reader) -> dict[str, Elements]:
        """The module's state dict, unread; tied tensors are one object.

        Raises:
            CheckpointMismatchError: there is no such submodule.
        """
        stored = checkpoint.model()
        shown = {
            entry.name: stored[entry.name].shown_in(self._code(stored[entry.name].stored, entry.role))
            for entry in checkpoint.manifest.entries
            if entry.name in stored
        }
        first = {name: checkpoint.manifest.aliases.get(name, name) for name in stored}
        left_out = checkpoint.manifest.frozen if self.exclude_frozen_parameters else frozenset()
        found = {
            name.removeprefix(self.prefix): shown[first[name]]
            for name in stored
            if name.startswith(self.prefix) and first[name] not in left_out
        }
        if not found and self.submodule:
            parts = sorted({name.split(".")[0] for name in stored if "." in name})
            raise CheckpointMismatchError(
                f"{checkpoint.directory} has no submodule {self.submodule!r} with tensors in it; the module has {parts}"
            )
        return found

    def _code(self, stored: str, role: Role) -> str:
        """Of the dtype in which something is exported: the table of the module."""
        code = self.dtype or "F32"
        if role == "buffer":
            return code if code == "F32" and stored in ("F16", "BF16") else stored
        return stored if stored not in FLOATING or (stored == "F64" and self.dtype is None) else code


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: PathOrUrl,
    output_file: PathOrUrl,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    max_shard_size: int | str | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    with_optimizer: bool = False,
    submodule: str = "",
    progress: Progress = lambda nbytes: None,
    weights_only: bool = True,
) -> None:
    """Write the model to one file, or to a folder of them; or what any strategy resumes training from.

    Args:
        checkpoint_dir: a save directory, or a tag's.
        output_file: a path or a URL; by its ending a `.safetensors`, a plain state dict for `torch.load` (`.bin`, `.pt`
            or `.pth`), or else a Lightning checkpoint, which keeps the hyper-parameters, the epoch, the step and the
            callbacks' state, and which `load_from_checkpoint` reads. With `max_shard_size`, a folder in the Hugging
            Face layout; a configuration or a tokenizer that lies in it stays.
        tag: of the save directory; `latest` decides where it is None.
        exclude_frozen_parameters: leave out the parameters that were not trained.
        max_shard_size: the largest file, in bytes or as `"5GB"`; a larger tensor gets a file of its own.
        dtype: of the parameters, for deployment: `"bf16"`, `"fp16"`, or torch's own. Buffers keep theirs, but for
            those of 16 bits where it is fp32. Parameters whose values are too large for it are named in a warning.
        with_optimizer: write a Lightning checkpoint with the optimizers' states as torch's own save them, from which
            `Trainer(strategy="ddp")`, or any other, resumes training. It has no random states.
        submodule: write this part of the module alone, under the names that it has by itself: `"model"`, where
            `self.model` is what `from_pretrained` is to load.
        progress: is told of the model's bytes as they are written.
        weights_only: for a Lightning checkpoint: refuse a `trainer.pt` whose objects would run code when the output is
            loaded. Here they don't in any case.

    Raises:
        ZeroError: there is no such checkpoint, it is damaged (what is read is compared with its checksums), or has no
            such submodule.
        OSError: the output can't be written.
        ValueError: arguments that don't go together, or have no meaning.
    """
    wanted = Wanted(
        exclude_frozen_parameters=exclude_frozen_parameters,
        dtype=parse_dtype(dtype),
        with_optimizer=with_optimizer,
        submodule=submodule,
    )
    export(
        Reader(resolve(checkpoint_dir, tag), check_reads=True),
        locate(output_file),
        wanted,
        max_shard_bytes=None if max_shard_size is None else parse_size(max_shard_size),
        progress=progress,
        weights_only=weights_only,
    )


def export(
    checkpoint: Reader,
    output: Location,
    wanted: Wanted,
    *,
    max_shard_bytes: int | None = None,
    trainer: bytes | None = None,
    progress: Progress = lambda nbytes: None,
    weights_only: bool = True,
) -> None:
    """Write what is wanted of a checkpoint: see `convert_zero_checkpoint_to_fp32_state_dict`.

    Args:
        checkpoint: to read.
        output: by its ending.
        wanted: of it.
        max_shard_bytes: if the output is a folder.
        trainer: what is read in place of `trainer.pt`.
        progress: is told of bytes.
        weights_only: for `Reader.trainer_content`.
    """
    tensors = wanted.of(checkpoint)
    overflows: set[Elements] = set()
    require_suitable(output, wanted, max_shard_bytes)
    with _appears(output, folder=max_shard_bytes is not None) as path:
        if max_shard_bytes is not None:
            write_folder(path, tensors, max_shard_bytes, progress, overflows)
        elif output.suffix == ".safetensors":
            write_safetensors(path, tensors, progress, overflows)
        else:
            content: dict[Any, Any] = dict(tensors)
            if is_lightnings(output, max_shard_bytes):
                loaded = checkpoint.trainer_content(trainer, weights_only=weights_only)
                content = _lightning_content(checkpoint, wanted, loaded)
                content["state_dict"] = tensors | {
                    str(name).removeprefix(wanted.prefix): value
                    for name, value in content.get("state_dict", {}).items()
                    if str(name).startswith(wanted.prefix)
                }
            try:
                write_torch_file(path, content, output.name, progress, overflows)
            except PicklingError as error:
                where = checkpoint.directory / checkpoint.manifest.trainer.name
                raise CorruptCheckpointError(f"{where} can't be written again: {error}") from error
    names = [name for name, tensor in tensors.items() if tensor in overflows]
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        warnings.warn(
            f"{output} has infinite values: what these parameters hold is too large for "
            f"{NAMES[wanted.dtype or 'F32']}: {shown}. Export to bf16 or fp32",
            stacklevel=3,
        )


def _lightning_content(checkpoint: Reader, wanted: Wanted, trainer: dict[Any, Any]) -> dict[Any, Any]:
    """Lightning's dict for any other strategy, but for the module's state dict."""
    content = {key: value for key, value in checkpoint.put_back(trainer).items() if not _is_ours(key)}
    states = content.pop("optimizer_states", None)
    if wanted.with_optimizer:
        if states is None:
            raise CheckpointMismatchError(f"{checkpoint.directory} holds weights alone: no optimizer's state")
        content["optimizer_states"] = [_plain(state) for state in checkpoint.optimizer_states(states)]
        try:
            content["loops"] = plain_loops(content.get("loops", {}))
        except RecursionError as error:
            where = checkpoint.directory / checkpoint.manifest.trainer.name
            raise CorruptCheckpointError(f"{where}: the state of a data loader is too deep") from error
    return content


def require_suitable(output: Location, wanted: Wanted, max_shard_bytes: int | None) -> None:
    """Whether the output can be written, and can hold what is wanted.

    Raises:
        ValueError: it can't.
        FileExistsError: it is a folder that holds something else.
    """
    if not output.name:
        raise ValueError(f"{str(output)!r} names nothing to write; give a file's name, such as 'model.ckpt'")
    if not is_remote(output):
        if output.exists() and not output.is_file() and not output.is_dir():
            raise ValueError(f"{output} is a device or a pipe, and no file; name a new one")
        if max_shard_bytes is None and output.is_dir():
            raise ValueError(f"{output} is a directory; name a file, or give a shard size to have a folder of several")
        if max_shard_bytes is not None and output.is_file():
            raise ValueError(f"{output} is a file; with a shard size, give the name of a folder")
        if max_shard_bytes is not None and output.is_dir():
            if os.path.ismount(os.path.realpath(output)):
                raise ValueError(f"{output} is a mount point, which can't be replaced at once; name a folder in it")
            _beside_weights(output)
    if wanted.with_optimizer and not is_lightnings(output, max_shard_bytes):
        raise ValueError(f"an optimizer's state goes into one .ckpt, and not into {output.name!r}")


def is_lightnings(output: Location, max_shard_bytes: int | None) -> bool:
    """Whether it is a Lightning checkpoint, and not weights alone."""
    return max_shard_bytes is None and output.suffix not in (".safetensors", *PLAIN_STATE_DICTS)


def exported_bytes(checkpoint: Reader, output: Location, wanted: Wanted, max_shard_bytes: int | None = None) -> int:
    """The bytes of the tensors that an export writes: what `progress` adds up to."""
    tensors: list[object] = [*wanted.of(checkpoint).values()]
    if is_lightnings(output, max_shard_bytes):
        tensors += checkpoint.elsewhere().values()
    if wanted.with_optimizer:
        states = checkpoint.optimizer_states(None)
        tensors += (leaf for state in states for of in state["state"].values() for leaf in leaves_of(of))
    return sum(elements.nbytes for elements in {tensor for tensor in tensors if isinstance(tensor, Elements)})


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state without what only a ZeroStrategy looks for in it."""
    kept = {
        index: {name: value for name, value in of.items() if not _is_ours(name)} if isinstance(index, int) else of
        for index, of in state["state"].items()
    }
    return {**state, "state": kept}


def _is_ours(key: object) -> bool:
    return isinstance(key, str) and key.startswith(_OURS)


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


def parse_dtype(dtype: torch.dtype | str | None) -> str | None:
    """The code of a dtype that a model is exported in: torch's own, or `"bf16"`, `"fp16"`, `"fp32"`.

    Raises:
        ValueError: it is none.
    """
    if dtype is None:
        return None
    code = _DTYPES.get(str(dtype).removeprefix("torch."))
    if code is None:
        raise ValueError(f'{dtype!r} is not a dtype to export in; give "bf16", "fp16" or "fp32"')
    return code


@contextmanager
def _appears(output: Location, *, folder: bool) -> Iterator[Location]:
    """Where to write; what was written is there under its own name if all went well, and else goes."""
    if is_remote(output):
        yield from _appears_behind_url(output, folder)
        return
    output = Path(os.path.realpath(output))  # a link stays, and leads to what is written
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_dead(output)
    hidden = output.parent / f".{output.name}.{secrets.token_hex(4)}"
    try:
        if folder:
            hidden.mkdir()
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


def _remove_dead(output: Path) -> None:
    """Remove what a killed export to the same place has left, after a day: until then another may be writing it."""
    for name in names_in(output.parent):
        hidden = output.parent / name
        with suppress(OSError):
            if (
                re.fullmatch(rf"\.{re.escape(output.name)}\.[0-9a-f]{{8}}", name)
                and time.time() - hidden.lstat().st_mtime > _DEAD_SECONDS
            ):
                shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()


def _appears_behind_url(url: UPath, folder: bool) -> Iterator[UPath]:
    if folder and (there := _weights_in(url)):
        raise FileExistsError(f"{url} holds {there[0]!r}, and nothing there can be replaced at once; give a new folder")
    try:
        yield url
    except BaseException:
        for name in _weights_in(url) if folder else ():
            remove_file(url / name)
        raise


def _weights_in(folder: Location) -> list[str]:
    return [name for name in names_in(folder) if name.startswith("model") and "safetensors" in name]


def _beside_weights(folder: Path) -> list[str]:
    """What stays in a folder whose earlier export goes; anything else that is there is somebody's.

    Raises:
        FileExistsError: there is such a thing.
    """
    others = sorted(set(os.listdir(folder)).difference(_weights_in(folder)))
    foreign = [name for name in others if not name.endswith(_BESIDE_WEIGHTS) or not (folder / name).is_file()]
    if foreign:
        raise FileExistsError(f"{folder} exists and holds {foreign[0]!r}; give a new folder, or an empty one")
    return others


def _replace_folder(new: Path, output: Path) -> None:
    for name in _beside_weights(output):
        shutil.copy2(output / name, new / name)
    if not kernel.exchange(new, output):
        old = new.with_name(f"{new.name}.old")
        os.rename(output, old)
        os.rename(new, output)
        shutil.rmtree(old, ignore_errors=True)
