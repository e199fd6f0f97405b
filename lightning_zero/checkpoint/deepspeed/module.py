"""The module's state dict, as a model's file holds it: names, shapes, and what isn't trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from lightning_zero.checkpoint.descriptions import item, require, sizes
from lightning_zero.checkpoint.elements import NAMES, Elements
from lightning_zero.checkpoint.foreign import prefix_of
from lightning_zero.checkpoint.manifest import Entry, Role
from lightning_zero.checkpoint.torch_file import is_tensor, unread_tensor
from lightning_zero.errors import CorruptCheckpointError, IncompleteCheckpointError

Shapes: TypeAlias = "dict[str, tuple[int, ...]]"
_OLD_LIGHTNING_PREFIX = "_forward_module."


def read_shapes(value: object, where: str) -> Shapes:
    """Names and shapes."""
    return {
        require(name, str, f"{where}: a name"): sizes(shape, f"{where}: the shape of {name!r:.80}")
        for name, shape in require(value, dict, where).items()
    }


class Module:
    """The state dict in a model's file.

    Attributes:
        names: of everything in it, in its order.
        tensors: unread; at stage 3 those of parameters are empty.
        parameters: those that are no buffers, each under one name.
        ties: the other name of a tied tensor, to the first.
        odd: what is no tensor.
    """

    def __init__(self, model: Mapping[Any, Any], where: str, stage: int) -> None:
        saved = item(model, "module", dict, where)
        self._where = where
        self._stage = stage
        self.names = [require(name, str, f"{where}: a name in 'module'") for name in saved]
        self.odd = {name: value for name, value in saved.items() if not is_tensor(value)}
        self.tensors = {
            name: unread_tensor(value, f"{where}: {name!r:.200}")
            for name, value in saved.items()
            if name not in self.odd
        }
        buffers = require(model.get("buffer_names") or [], list, f"{where}: 'buffer_names'")
        self._buffers = {require(name, str, f"{where}: a name in 'buffer_names'") for name in buffers}
        shared = require(model.get("shared_params") or {}, dict, f"{where}: 'shared_params'")
        self.ties = {
            alias: stored
            for alias, stored in shared.items()
            if alias in self.tensors and require(stored, str, f"{where}: a name in 'shared_params'") in self.tensors
        }
        if not self.ties.keys().isdisjoint(self.ties.values()):
            raise CorruptCheckpointError(f"{where}: 'shared_params' ties to one name what is tied to another")
        first: dict[object, str] = {}
        for name, tensor in self.tensors.items():
            if tensor.numel and name not in self.ties:
                stored = first.setdefault((tensor.source, tensor.shape, tensor.stored), name)
                self.ties |= {name: stored} if stored != name else {}
        self.parameters = {
            name: tensor for name, tensor in self.tensors.items() if name not in self._buffers and name not in self.ties
        }

    def require(self, shapes: list[Shapes]) -> None:
        """Whether the trained parameters are those of this module."""
        for of in shapes:
            for name, shape in of.items():
                tensor = self.parameters.get(name)
                if tensor is not None and tensor.shape != shape and self._stage != 3:
                    raise CorruptCheckpointError(
                        f"{self._where}: {name!r} has the shape {tensor.shape}, and {shape} in 'param_shapes'"
                    )

    def entries(
        self, trained: Shapes, frozen: Shapes
    ) -> tuple[list[Entry], dict[str, str], list[tuple[Entry, Elements]]]:
        """The state dict's entries, the tied names, and the entries that this file holds whole."""
        entries: list[Entry] = []
        whole: list[tuple[Entry, Elements]] = []
        for name, tensor in self.tensors.items():
            dtype = NAMES[tensor.stored]
            if name in self.ties:
                continue
            if name in trained or name in frozen:
                shape = trained[name] if name in trained else frozen[name]
                entries.append(Entry(name, shape, dtype, "parameter" if name in trained else "frozen"))
                continue
            if self._stage == 3 and name not in self._buffers and not tensor.numel:
                raise IncompleteCheckpointError(f"{self._where}: {name!r} is stored nowhere")
            unknown: Role = "frozen" if trained and self._stage < 3 else "given"
            entries.append(Entry(name, tensor.shape, dtype, "buffer" if name in self._buffers else unknown))
            whole.append((entries[-1], tensor))
        # What a hook took out of the state dict is trained all the same
        entries += [
            Entry(name, shape, "float32", "parameter") for name, shape in trained.items() if name not in self.tensors
        ]
        return entries, self.ties, whole


def renaming(names: list[str], submodule: str, *, is_lightnings: bool) -> Callable[[str], str]:
    """From DeepSpeed's name of a tensor to the module's own. Lightning before 2.1 wrapped the module."""
    wrapped = is_lightnings and all(name.startswith(_OLD_LIGHTNING_PREFIX) for name in names)
    prefix = prefix_of(submodule)
    return lambda name: prefix + (name.removeprefix(_OLD_LIGHTNING_PREFIX) if wrapped else name)
