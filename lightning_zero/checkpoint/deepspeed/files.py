"""Which files a DeepSpeed checkpoint has, and what must be in them.

Nothing is believed before it was looked at: what a file holds in another place, or as another kind of thing, than
DeepSpeed writes it, is an error that names the file.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

from lightning_zero.checkpoint.descriptions import require
from lightning_zero.checkpoint.pickled import Global
from lightning_zero.checkpoint.storage import Location, is_remote, names_in, open_file
from lightning_zero.checkpoint.torch_file import Progress, describe_torch_file, harmless
from lightning_zero.errors import (
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsupportedModelError,
    UntrustedContentError,
)

Kind = Literal["model", "optim"]

LIGHTNING_TAG = "checkpoint"
"""The tag's directory in what Lightning's `DeepSpeedStrategy` saves."""

_STATES = re.compile(r"(?:bf16_|fp16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_?(model|optim)_states\.pt")
_EXPERTS_OR_LAYERS = re.compile(r"(layer|expert|expp_rank)_.*_states\.pt")


def is_deepspeed_tag(directory: Location) -> bool:
    """Whether a directory holds a checkpoint of DeepSpeed's."""
    return any(_STATES.fullmatch(name) or _EXPERTS_OR_LAYERS.fullmatch(name) for name in names_in(directory))


class Files:
    """The files of a tag's directory, by what they hold and whose they are."""

    def __init__(self, directory: Location, progress: Progress, *, weights_only: bool, verify: bool) -> None:
        self._directory = directory
        self._progress = progress
        self._weights_only = weights_only
        self._verify = verify
        # With a thousand ranks there are more than may be open; and a hub's are links
        self._open = lru_cache(maxsize=64)(lambda path: open_file(path if is_remote(path) else path.resolve()))
        self._names: dict[tuple[str, int | None], str] = {}
        for name in sorted(names_in(directory)):
            if _EXPERTS_OR_LAYERS.fullmatch(name):
                raise UnsupportedModelError(
                    f"{directory / name} holds experts, or a pipeline's layer, which live on some ranks alone; "
                    "only models that are whole on every rank can be imported"
                )
            if (found := _STATES.fullmatch(name)) is None:
                continue
            data_rank, model_rank, kind = found.groups()
            if int(model_rank) > 0:
                raise UnsupportedModelError(
                    f"{directory / name} belongs to a model that is itself cut over ranks (tensor parallelism); "
                    "only models that are whole on every rank can be imported"
                )
            rank = None if data_rank is None else int(data_rank)
            if (kind, rank) in self._names:
                raise CorruptCheckpointError(
                    f"{directory} holds both {self._names[kind, rank]} and {name}, of different runs: "
                    "remove what is older"
                )
            self._names[kind, rank] = name

    @property
    def kinds(self) -> set[str]:
        """What there are files of."""
        return {kind for kind, _ in self._names}

    def where(self, kind: Kind, rank: int | None) -> str:
        """Its path, for the messages."""
        return str(self._directory / self._names.get((kind, rank), f"{kind} states of rank {rank or 0}"))

    def describe(self, kind: Kind, rank: int | None) -> dict[Any, Any]:
        """What is in it, in the terms of `pickled`."""
        name = self._names.get((kind, rank))
        if name is None:
            raise IncompleteCheckpointError(
                f"{self._directory} lacks the file of the {'optimizer' if kind == 'optim' else 'model'} of rank "
                f"{rank or 0}; the files of all ranks have to be there (from every node, if each wrote to its own disk)"
            )
        path = self._directory / name
        found = describe_torch_file(path, self._open, self._progress, verify=self._verify)
        if self._weights_only:
            _require_harmless(found.names, path)
        return require(found.value, dict, str(path))


def _require_harmless(names: frozenset[Global], path: Location) -> None:
    spelled = sorted(f"{name.module}.{name.name}" for name in names - harmless(names))
    foreign = [name for name in spelled if not name.startswith("deepspeed.")]
    if foreign:
        shown = ", ".join(f"{name if name.isprintable() else ascii(name):.100}" for name in foreign[:10])
        raise UntrustedContentError(
            f"{path} names {shown}, which would run when the file is loaded; here it didn't. If you trust whoever "
            "wrote it, import it with weights_only=False (--unsafe): what is kept of it runs when that is loaded so"
        )
