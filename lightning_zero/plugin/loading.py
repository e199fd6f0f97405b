"""A checkpoint's dict, brought to the live module and optimizers; or an error that says why it doesn't fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning.pytorch.callbacks
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.saving import _load_state
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.resolution import resolve
from lightning_zero.checkpoint.storage import PathOrUrl
from lightning_zero.checkpoint.tensors import LazyTensor
from lightning_zero.engine.partition import Partition
from lightning_zero.errors import CheckpointMismatchError
from lightning_zero.plugin.checkpoint_io import LoadedCheckpoint
from lightning_zero.plugin.ranks import Ranks

_Module = TypeVar("_Module", bound=LightningModule)

_PIECE_NUMEL = 16 << 20
"""As much as is read by one rank at a time: enough for many requests at once."""


@contextmanager
def fits_module(
    path: object, source: Checkpoint | None = None, *, module: Module | None = None, names: Iterable[str] = ()
) -> Iterator[None]:
    """What torch says of a state dict that doesn't fit, as an error of ours; `path` is where it is from.

    Torch says it of one that `source` has found damaged, too: that error it is then. If the `names` in the state dict
    are those of a part of the `module`, the error says so.
    """
    try:
        yield
    except RuntimeError as error:
        damage = None if source is None else source.damage
        advice = "" if module is None else _advice(module, set(names))
        raise damage or CheckpointMismatchError(f"{path} doesn't fit the module: {error}{advice}") from None


def _advice(module: Module, names: set[str]) -> str:
    """A loop without Lightning has saved what is a part of the module here."""
    for name, part in module.named_children():
        if names and names <= part.state_dict().keys():
            return f"\nThey are the names of its {name!r}: if this was imported, import it with --submodule {name}"
    return ""


def load_module(module: Module, state_dict: Mapping[str, Any], path: str, *, strict: bool) -> None:
    """Load a module's state dict.

    Raises:
        CheckpointMismatchError: it doesn't fit; `path` is where it is from.
    """
    with fits_module(path, module=module, names=state_dict):
        missing, unexpected = module.load_state_dict(state_dict, strict=strict)
    if missing or unexpected:
        rank_zero_warn(f"{path} was loaded in part: missing {list(missing)}, unexpected {list(unexpected)}")


def load_averages(
    trainer: Trainer, module: LightningModule, checkpoint: Mapping[str, Any], *, strict: bool
) -> Mapping[str, Any]:
    """Let a callback that averages weights have its average, and the module the weights that are trained.

    Such a callback saves the average as the module's state dict, and the module's own beside it.

    Returns:
        The state dict that the module has then.
    """
    kinds = ("state_dict", "current_model_state")
    saved: dict[str, Mapping[str, Any]] = {kind: checkpoint[kind] for kind in kinds if kind in checkpoint}
    averaging: type[Callback] | None = getattr(lightning.pytorch.callbacks, "WeightAveraging", None)  # Lightning 2.6's
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    for callback in callbacks:
        if averaging is None or not isinstance(callback, averaging):
            continue
        if not strict:  # the callback is
            own = module.state_dict()
            saved = {kind: {name: weights.get(name, own[name]) for name in own} for kind, weights in saved.items()}
        callback.on_load_checkpoint(trainer, module, {**checkpoint, **saved})
        return saved.get("current_model_state", saved["state_dict"])
    return saved["state_dict"]


def read_together(module: Module, state_dict: Mapping[str, Any], ranks: Ranks) -> Mapping[str, Any]:
    """Read a state dict into a module, each piece of it by one rank, which gives it to the others. A collective.

    For a checkpoint behind a URL, where else every rank would fetch all of the model for itself.

    Returns:
        The state dict, with the module's own tensors in the place of those that were read: `load_state_dict` does what
        is left, and says what doesn't fit.

    Raises:
        UnsupportedModelError: the ranks' modules differ.
        ZeroError: a rank couldn't read; the same on all.
    """
    own, together = module.state_dict(), dict(state_dict)
    targets: dict[int, tuple[LazyTensor, Tensor]] = {}
    for name, value in state_dict.items():
        if isinstance(value, LazyTensor) and value.is_unread:
            _, target = targets.get(id(value), (value, own.get(name)))
            if isinstance(target, Tensor) and target.shape == value.shape and target.is_contiguous():
                targets[id(value)], together[name] = (value, target), target
    pieces: list[list[tuple[LazyTensor, int, Tensor]]] = [[] for _ in range(ranks.count)]
    nbytes, done = sum(target.nbytes for _, target in targets.values()), 0
    for value, target in targets.values():
        flat = target.view(-1)
        for start in range(0, len(flat), _PIECE_NUMEL):
            part = flat[start : start + _PIECE_NUMEL]
            pieces[done * ranks.count // nbytes].append((value, start, part))  # what is one rank's lies side by side
            done += part.nbytes
    tensors = [target for _, target in targets.values()]
    ranks.require_same("modules", lambda: [f"{tuple(t.shape)}, {t.dtype}, {t.device.type}" for t in tensors])

    def read() -> None:
        for value, start, part in pieces[ranks.rank]:
            value.read_range(start, start + len(part), part)

    ranks.all_or_none(read)
    for reader, read_there in enumerate(pieces):
        ranks.give([part for _, _, part in read_there], reader)
    return together


def load_from_zero_checkpoint(
    module_class: type[_Module],
    checkpoint_dir: PathOrUrl,
    tag: str | None = None,
    *,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **hyper_parameters: Any,
) -> _Module:
    """Make a LightningModule out of a checkpoint directory, as `load_from_checkpoint` does out of a file.

    Args:
        module_class: whose `__init__` gets the hyper-parameters that were saved; its hooks are called as ever.
        checkpoint_dir: a save directory, or a tag's, such as `ModelCheckpoint.best_model_path`.
        tag: of the save directory; `latest` decides where it is None.
        strict: whether names may be missing, or be too many; as the module says by default.
        weights_only: False for hyper-parameters that are objects of any class: it runs what the file says.
        hyper_parameters: take the place of saved ones.

    Returns:
        The module, on the CPU, each tensor read straight into its memory and compared with its checksum.

    Raises:
        TypeError: it is no LightningModule's class.
        CheckpointMismatchError: the weights don't fit the module.
        ZeroError: there is no such checkpoint, or it is damaged.
    """
    _require_module_class(module_class)
    source = Checkpoint(resolve(checkpoint_dir, tag), check_reads=True)
    checkpoint = source.lightning_checkpoint(weights_only=weights_only is not False)
    checkpoint.setdefault(module_class.CHECKPOINT_HYPER_PARAMS_KEY, {}).update(hyper_parameters)
    with fits_module(source.directory, source):
        module = _load_state(module_class, checkpoint, strict=strict, **hyper_parameters)
    assert isinstance(module, module_class)
    return module


def _require_module_class(module_class: object) -> None:
    if not (isinstance(module_class, type) and issubclass(module_class, LightningModule)):
        raise TypeError(
            "load_from_zero_checkpoint makes a LightningModule and takes the class of it, not "
            f"{module_class if isinstance(module_class, type) else type(module_class)}; "
            "load_state_dict_from_zero_checkpoint(module, checkpoint_dir) fills any module that is there"
        )


def restore_optimizer_states(
    checkpoint: Mapping[str, Any], module: Module, optimizers: Sequence[Optimizer], partition: Partition
) -> None:
    """Give the optimizers their states, whoever saved them: ZeRO or DDP. Nothing but a warning, if there are none.

    Raises:
        CheckpointMismatchError: they are of other optimizers, or of parameters in another order.
    """
    states = checkpoint.get("optimizer_states")
    if states is not None and not states and optimizers:
        rank_zero_warn("the checkpoint has no optimizer states: the optimizers start afresh")
        return
    if states is None or len(states) != len(optimizers):
        raise CheckpointMismatchError(
            f"the checkpoint has the states of {len(states or ())} optimizers, configure_optimizers gave "
            f"{len(optimizers)}; load its weights alone (load_module_only=True, or fit without ckpt_path)"
        )
    if isinstance(checkpoint, LoadedCheckpoint):
        saved = [entry.class_name for entry in checkpoint.source.manifest.optimizers]
        live = [type(getattr(optimizer, "optimizer", optimizer)).__name__ for optimizer in optimizers]
        if any(before not in ("", now) for before, now in zip(saved, live, strict=True)):
            rank_zero_warn(
                f"the checkpoint's optimizers are {saved}, configure_optimizers gave {live}, which get states that "
                "aren't their own. If that isn't meant, load the weights alone (load_module_only=True, or an export)"
            )
        for entry, optimizer in zip(checkpoint.source.manifest.optimizers, optimizers, strict=True):
            _require_same_order(entry.parameters, optimizer, module)
    for optimizer, state in zip(optimizers, states, strict=True):
        partition.load_state(optimizer, state)


def _require_same_order(saved: Sequence[Sequence[str]], optimizer: Optimizer, module: Module) -> None:
    """A state belongs to a parameter by its place in the optimizer, as everywhere in torch."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    for before, group in zip(saved, optimizer.param_groups, strict=False):
        known = set(before)
        now = [name for name in map(names.get, group["params"]) if name in known]
        if now != list(before) and sorted(now) == sorted(before):
            raise CheckpointMismatchError(
                f"{type(optimizer).__name__} has its parameters in another order than the checkpoint, from "
                f"{now[0]!r} on and not from {before[0]!r}: their states would be mixed up. Give it the parameters "
                f"in the checkpoint's order, which begins {', '.join(before[:5])}; or load without its states"
            )
