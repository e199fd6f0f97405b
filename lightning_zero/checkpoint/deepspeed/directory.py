"""A DeepSpeed checkpoint directory, read as segments: what each of its ranks held, and what they had in common.

Without DeepSpeed, without torch, and without executing anything: its files are torch's, and `torch_file` describes
them. Tensors stay unread. What is found is consistent: every element of every trained parameter is there exactly once.

[Note: DeepSpeed's layout]
A rank keeps its fp32 masters, and each state of the optimizer, in one flat tensor for each *flat group*, whose
parameters `param_shapes` lists in their order. Which elements of them lie in a rank's flat tensor:

| | flat group | cut |
|---|---|---|
| stage 0 | one parameter | not at all, and it is in the model's file |
| stages 1, 2, `BF16_Optimizer` | a param group | one parameter behind the other, in equal parts; the last is padded |
| stage 3 | a part of a param group | each parameter by itself, in equal parts; the last is padded |

At stages 0 to 2, rank 0's model file holds frozen parameters and buffers whole; at stage 3 frozen parameters are cut as
trained ones are, and the model's file of each rank holds its part. What isn't Lightning's or a user's own in there, and
isn't mentioned here, a resume has no use for. Source: the files that DeepSpeed 0.19 writes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.deepspeed.files import LIGHTNING_TAG, Files, is_deepspeed_tag
from lightning_zero.checkpoint.deepspeed.flat_groups import (
    FlatGroups,
    frozen_pieces,
    read_flat_groups,
    read_groups,
    trained_pieces,
)
from lightning_zero.checkpoint.deepspeed.module import Module, Shapes, read_shapes, renaming
from lightning_zero.checkpoint.descriptions import integers, item, require
from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.foreign import (
    LIGHTNING_VERSION,
    ForeignCheckpoint,
    Optimizer,
    ParameterGroup,
    Piece,
    Rank,
    refuse_ours,
)
from lightning_zero.checkpoint.origins import advice
from lightning_zero.checkpoint.pickled import Object
from lightning_zero.checkpoint.storage import Location, PathOrUrl, absolute, locate, names_in
from lightning_zero.checkpoint.torch_file import Progress, is_tensor, part_of, unread_tensor
from lightning_zero.errors import (
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsupportedModelError,
)
from lightning_zero.segments import Segment

_OWN = frozenset(
    (
        "buffer_names",
        "checkpoint_parallel_dimensions",
        "csr_tensor_module_names",
        "data_sampler",
        "dp_world_size",
        "ds_config",
        "ds_version",
        "frozen_param_fragments",
        "frozen_param_shapes",
        "global_samples",
        "global_steps",
        "lr_scheduler",
        "module",
        "mp_world_size",
        "num_experts",
        "optimizer",
        "param_shapes",
        "random_ltd",
        "shared_params",
        "skipped_steps",
        "sparse_tensor_module_names",
        "universal_checkpoint_info",
    )
)
"""What DeepSpeed itself puts into the model's file: all else there is the client state."""


def find_deepspeed_tag(path: PathOrUrl, tag: str | None = None) -> Location:
    """The directory of the tag that is meant.

    Args:
        path: a save directory, a tag's, a file in one of them, or one of Lightning's `NAME.ckpt`.
        tag: of the save directory; DeepSpeed's own `latest` decides where it is None, or there is but one.

    Raises:
        CheckpointNotFoundError: there is none, or it can't be told which one.
        CorruptCheckpointError: `latest` is damaged.
    """
    given = absolute(locate(path))
    where = given.parent if given.is_file() else given
    if tag is None and is_deepspeed_tag(where):
        return where
    refuse_ours(where)
    there = sorted(name for name in names_in(where) if is_deepspeed_tag(where / name))
    if tag is None:
        tag = commit.read_latest(where) or (there[0] if len(there) == 1 else None)
        if tag is None:
            if there:
                problem = f"has no `latest` to say which of {there} is meant; give the tag"
            elif where is not given:
                where, problem = given, "is no file of a DeepSpeed checkpoint's"
            else:
                problem = f"holds no checkpoint of DeepSpeed{advice(where)}" if where.is_dir() else "is no directory"
            raise CheckpointNotFoundError(f"{where} {problem}")
    directory = where / commit.validate_tag(tag)
    if not is_deepspeed_tag(directory):
        refuse_ours(directory)
        raise CheckpointNotFoundError(
            f"there is no checkpoint {tag!r} of DeepSpeed in {where}; there {f'are {there}' if there else 'is none'}"
        )
    return directory


def read_deepspeed(
    directory: Location,
    *,
    module_only: bool = False,
    submodule: str = "",
    weights_only: bool = True,
    verify: bool = True,
    progress: Progress = lambda nbytes: None,
) -> ForeignCheckpoint:
    """Open a tag's directory; its tensors stay unread.

    Args:
        directory: as `find_deepspeed_tag` gives it.
        module_only: leave the optimizer out.
        submodule: the name that the saved module has within the one that it is to be loaded into; none if it is that.
        weights_only: refuse files that name what would run code when they are loaded.
        verify: compare the descriptions in the files with their checksums.
        progress: is told of the tensors' bytes as they are read.

    Raises:
        UntrustedContentError: a file does.
        IncompleteCheckpointError: a file is missing, or holds less than it should.
        CorruptCheckpointError: a file isn't what DeepSpeed writes, or they don't fit together.
        CheckpointMismatchError: it can't be told which state is which parameter's.
        UnsupportedModelError: experts, or a model that is itself cut over ranks.
    """
    files = Files(directory, progress, weights_only=weights_only, verify=verify)
    stage, count = 0, 1
    if "optim" in files.kinds:
        stage, count = _stage_and_count(files.describe("optim", 0), files.where("optim", 0))
    models_rank = 0 if stage == 3 else None
    model, where = files.describe("model", models_rank), files.where("model", models_rank)
    client_state = {key: value for key, value in model.items() if key not in _OWN}
    step = item(model, "global_steps", int, where)
    module = Module(model, where, stage)

    optimizers: list[FlatGroups] = []
    shapes: list[Shapes] = []
    if stage > 0:
        named = enumerate(item(model, "param_shapes", list, where))
        shapes = [read_shapes(of, f"{where}: 'param_shapes' of flat group {flat}") for flat, of in named]
        optimizers = [
            read_flat_groups(files.describe("optim", rank), files.where("optim", rank)) for rank in range(count)
        ]
    elif "zero" in names_in(directory):
        raise UnsupportedModelError(f"{directory} is a universal checkpoint: import the tag that it was made from")
    elif model.get("param_shapes") is not None:
        raise IncompleteCheckpointError(f"{directory} lacks the optimizer's files of all ranks")
    elif model.get("optimizer") is not None and not module_only:
        optimizers, shapes = _whole_optimizer(model, where, module)
    module.require(shapes)
    pieces = trained_pieces(shapes, optimizers, stage, None if module_only else step)
    ranks = [Rank(held) for held in pieces] or [Rank()]
    trained = {name: shape for of in shapes for name, shape in of.items()}
    frozen: Shapes = {}
    if stage == 3 and model.get("frozen_param_shapes"):
        frozen = read_shapes(model["frozen_param_shapes"], f"{where}: 'frozen_param_shapes'")
        for rank, held in enumerate(ranks):
            own, whose = files.describe("model", rank) if rank else model, files.where("model", rank)
            fragments = item(own, "frozen_param_fragments", dict, whose)
            held.frozen.extend(frozen_pieces(frozen, fragments, rank, count, whose))
    entries, aliases, whole = module.entries(trained, frozen)
    for entry, tensor in whole:
        if tensor.numel:
            of_kind = ranks[0].frozen if entry.role == "frozen" else ranks[0].others
            of_kind.append(Piece(Segment(entry.name, 0, tensor.numel), part_of(tensor, 0, tensor.numel)))

    is_lightnings = LIGHTNING_VERSION in client_state
    rename = renaming(module.names, submodule, is_lightnings=is_lightnings)
    groups = [] if module_only or not optimizers else _parameter_groups(optimizers[0], shapes, model, module)
    config = model.get("ds_config")
    class_name = _class_name(groups, config if isinstance(config, dict) else {})
    return ForeignCheckpoint(
        directory=directory,
        name=directory.parent.name if is_lightnings and directory.name == LIGHTNING_TAG else directory.name,
        stage=stage,
        step=step,
        entries=[msgspec.structs.replace(entry, name=rename(entry.name)) for entry in entries],
        aliases={rename(alias): rename(stored) for alias, stored in aliases.items()},
        odd={rename(name): value for name, value in module.odd.items()},
        optimizers=[Optimizer(class_name, groups).renamed(rename)] if groups else [],
        ranks=[held.renamed(rename) for held in ranks],
        client_state=client_state,
        schedulers=[] if is_lightnings else _schedulers(model.get("lr_scheduler"), step, directory),
    )


def _schedulers(state: object, step: int, directory: Location) -> list[Any]:
    if isinstance(state, dict) and "last_epoch" in state:
        return [state]
    if state is not None:
        warnings.warn(
            f"{directory} has the state of a scheduler of DeepSpeed's own, which no other takes: it isn't imported. "
            f"Have yours begin at step {step} (last_epoch={step}, once each param group has its 'initial_lr')",
            stacklevel=4,
        )
    return []


def _stage_and_count(content: Mapping[Any, Any], where: str) -> tuple[int, int]:
    """The stage, and how many ranks there were; files of an older run with more may still lie there."""
    saved = item(content, "optimizer_state_dict", dict, where)
    stage: Any = saved.get("zero_stage", 1)  # BF16_Optimizer says nothing
    if type(stage) is Object and len(stage.arguments) == 1:  # an enum's
        stage = stage.arguments[0]
    if "fp32_flat_groups" in saved:
        stage = 3
    counts = saved.get("partition_count")
    counts = {counts} if type(counts) is int else set(integers(counts, f"{where}: 'partition_count'"))
    if stage not in (1, 2, 3) or not counts:
        raise CorruptCheckpointError(f"{where}: 'zero_stage' or 'partition_count' is nothing that DeepSpeed writes")
    if len(counts) > 1 or saved.get("ds_zero_partition_groups"):
        raise UnsupportedModelError(f"{where}: not all parameters are cut over the same ranks (experts)")
    return stage, counts.pop()


def _whole_optimizer(model: Mapping[Any, Any], where: str, module: Module) -> tuple[list[FlatGroups], list[Shapes]]:
    """Stage 0: torch's own state dict, which numbers the parameters and doesn't name them."""
    saved = item(model, "optimizer", dict, where)
    if "fp32_groups_flat" in saved or "fp32_groups" in saved:
        raise UnsupportedModelError(
            f"{where} holds the states of DeepSpeed's FP16_Optimizer, which doesn't say whose they are; "
            "import the weights alone (module_only=True, --module-only)"
        )
    states, groups = item(saved, "state", dict, where), read_groups(saved, where)
    numbers = [number for group in groups for number in group["params"]]
    known = {
        number: tensor.shape
        for number, state in states.items()
        for tensor in _tensors(require(state, dict, f"{where}: a state"), where)
        if tensor.shape
    }
    names = _only_match([known.get(number) for number in numbers], module.parameters)
    if len(groups) != 1 or numbers != list(range(len(numbers))) or names is None:
        raise CheckpointMismatchError(
            f"{where}: without ZeRO, DeepSpeed doesn't say which state is which parameter's, and with several param "
            "groups, or frozen parameters of the same shapes, it can't be told; import the weights alone "
            "(module_only=True, --module-only)"
        )
    masters = [module.parameters[name] for name in names]
    shapes = [{name: master.shape} for name, master in zip(names, masters, strict=True)]
    return [FlatGroups(where, masters, states, groups, None)], shapes


def _only_match(shapes: list[tuple[int, ...] | None], parameters: Mapping[str, Elements]) -> list[str] | None:
    """The parameters that have these shapes, in their order, if there is but one way to choose them."""

    def match(shapes: list[tuple[int, ...] | None], names: list[str]) -> list[str | None]:
        left = iter(names)
        return [next((name for name in left if shape in (None, parameters[name].shape)), None) for shape in shapes]

    names = list(parameters)
    first, last = match(shapes, names), match(shapes[::-1], names[::-1])[::-1]
    found = [name for name in first if name is not None]
    return found if first == last and len(found) == len(first) else None


def _tensors(state: Mapping[Any, Any], where: str) -> Iterator[Elements]:
    yield from (unread_tensor(value, f"{where}: a state") for value in state.values() if is_tensor(value))


def _parameter_groups(
    optimizer: FlatGroups, shapes: list[Shapes], model: Mapping[Any, Any], module: Module
) -> list[ParameterGroup]:
    zero = model["ds_config"].get("zero_optimization") if isinstance(model.get("ds_config"), dict) else None
    shuffled = isinstance(zero, dict) and bool(zero.get("round_robin_gradients"))
    order = {name: position for position, name in enumerate(module.names)}
    groups = []
    for group in optimizer.groups:
        if any(flat >= len(shapes) for flat in group["params"]):
            raise CorruptCheckpointError(f"{optimizer.where}: a param group has flat groups that there aren't")
        names = [name for flat in group["params"] for name in shapes[flat]]
        if shuffled:  # for the network's sake; an optimizer has its parameters in the module's order, as a rule
            names.sort(key=lambda name: order.get(name, len(order)))
        settings = {key: value for key, value in group.items() if key not in ("params", "step")}
        groups.append(ParameterGroup(tuple(names), settings))
    return groups


def _class_name(groups: list[ParameterGroup], config: Mapping[Any, Any]) -> str:
    """Of the optimizer: what its settings or DeepSpeed's configuration say; nothing, where they don't."""
    decoupled = groups[0].settings.get("decoupled_weight_decay") if groups else None
    if isinstance(decoupled, bool):
        return "AdamW" if decoupled else "Adam"
    configured = config.get("optimizer")
    kind = configured.get("type") if isinstance(configured, dict) else None
    if not isinstance(kind, str):
        return ""
    asked = configured.get("params") if isinstance(configured, dict) else None
    decoupled = not isinstance(asked, dict) or bool(asked.get("adam_w_mode", True))
    return "AdamW" if kind.lower() == "adam" and decoupled else kind  # DeepSpeed's "Adam" is AdamW if nothing is said
