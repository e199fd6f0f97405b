"""A checkpoint as torch's tensors: the dicts hold `LazyTensor`s, each of which is read when it is wanted.

So what a rank needs is read straight into its place, and what it doesn't need is never read: see `reader`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.reader import Reader, require_trainer
from lightning_zero.checkpoint.tensors import DTYPES_BY_CODE, LazyTensor, tensor_bytes
from lightning_zero.checkpoint.torch_file import require_dict
from lightning_zero.checkpoint.trust import unpickle
from lightning_zero.errors import CorruptCheckpointError


class Checkpoint(Reader):
    """One tag's directory, open for reading; see `Reader`."""

    def state_dict(self) -> dict[str, Tensor]:
        """The module's state dict, unread, as it is stored (fp32 or wider for what was trained); see `model`."""
        model = self.model()
        tensors = {elements: LazyTensor(elements) for elements in model.values()}
        return {name: tensors[elements] for name, elements in model.items()}

    def trainer(self, weights_only: bool = True) -> dict[str, Any]:
        """Everything that is no tensor of the model or of an optimizer: `trainer.pt`, with placeholders for large ones.

        Args:
            weights_only: refuse whatever would run code.

        Raises:
            UntrustedContentError: there is such a thing in it.
            IncompleteCheckpointError: the file is missing, or cut short.
            CorruptCheckpointError: its checksum doesn't match, or it is not what Lightning keeps there.
        """
        where = str(self.directory / self.manifest.trainer.name)
        return require_trainer(unpickle(self.trainer_bytes(), where, weights_only), where)

    def settings(self, *names: str) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
        """What `trainer` has under some names, and each optimizer's param groups without their parameters.

        Raises:
            CorruptCheckpointError: they are no param groups; or what `trainer` raises.
        """
        trainer = self.trainer()
        where, groups = f"{self.directory / self.manifest.trainer.name}: an optimizer's param groups", []
        for state in trainer.get("optimizer_states", []):
            found = require_dict(state, where).get("param_groups")
            if not isinstance(found, list):
                raise CorruptCheckpointError(f"{where} are no list")
            group_dicts = (require_dict(group, where) for group in found)
            groups.append([{key: value for key, value in group.items() if key != "params"} for group in group_dicts])
        return {name: trainer[name] for name in names if name in trainer}, groups

    def lightning_checkpoint(self, weights_only: bool = True) -> dict[str, Any]:
        """What a plain Lightning checkpoint holds: `trainer`, with the state dict and the optimizers' put back, unread.

        Args:
            weights_only: see `trainer`, whose errors this raises.
        """
        # What is elsewhere is read at once: whoever gets it may keep it, and the checkpoint may go
        checkpoint = self.put_back(self.trainer(weights_only), lambda elements: LazyTensor(elements).contiguous())
        checkpoint["state_dict"] = self.state_dict() | checkpoint.get("state_dict", {})
        if self.manifest.optimizers:
            states = checkpoint.get("optimizer_states", [])
            checkpoint["optimizer_states"] = self.optimizer_states(states, as_tensor)
        return checkpoint


def as_tensor(elements: Elements, whole: bool) -> Tensor:
    """An optimizer's state, unread; read, if it is one number that belongs to the whole of its parameter."""
    if not whole or elements.numel != 1:
        return LazyTensor(elements)
    number = torch.empty(elements.shape, dtype=DTYPES_BY_CODE[elements.stored])
    elements.source.read(0, 1, tensor_bytes(number))
    return number
