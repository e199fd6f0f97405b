"""`lightning-zero plan`: memory a rank, disk a checkpoint and traffic a step, before anything is rented."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from contextlib import redirect_stdout, suppress
from typing import TYPE_CHECKING, Any

from lightning_zero.cli.arguments import WrongUseError, add_command, positive
from lightning_zero.cli.output import bytes_text, print_json, print_table
from lightning_zero.errors import UnsupportedModelError
from lightning_zero.planning import OPTIMIZERS, PRECISIONS, Model, Plan, Setup, plan
from lightning_zero.segments import ParameterSpec

if TYPE_CHECKING:
    from lightning_zero.cli.arguments import Commands

_ELEMENT_BYTES = 4
_REDUCE_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

_ROWS = (
    ("memory a rank", "weights", "weights"),
    ("", "gradients", "gradients"),
    ("", "fp32 masters", "masters"),
    ("", "optimizer states", "states"),
    ("", "buckets under way", "buckets"),
    ("", "total", "memory"),
    ("disk", "a checkpoint", "checkpoint"),
    ("", "of that, once for all", "checkpoint_frozen"),
    ("host memory", "a rank's optimizer, offloaded", "offloaded"),
    ("host memory", "a rank, with async_save", "snapshot"),
    ("traffic a step", "a rank sends", "traffic"),
)


def add_to(commands: Commands) -> None:
    """Add the command."""
    text = "Tell memory a rank, disk a checkpoint and traffic a step, for DDP (stage 0) and for stages 1 and 2."
    example = (
        "  lightning-zero plan --params 7e9 --world-size 64 --precision bf16-true\n"
        "  lightning-zero plan --model train:Net --model-args '{\"width\": 512}' --world-size 8"
    )
    command = add_command(commands, "plan", _plan, text, example)
    model = command.add_mutually_exclusive_group(required=True)
    model.add_argument("--params", type=_count, metavar="P", help="the number of trained elements, such as 7e9 or 7B")
    model.add_argument("--model", metavar="MODULE:CLASS", help="make this module, without memory, and look at it")
    command.add_argument("--model-args", type=_arguments, metavar="JSON", help="what the class is made with")
    command.add_argument("--frozen", type=_count, metavar="P", help="with --params: elements that aren't trained")
    command.add_argument("--world-size", type=positive, required=True, metavar="N", help="the number of ranks")
    command.add_argument("--stage", type=int, choices=(0, 1, 2), help="only this one")
    command.add_argument("--precision", choices=PRECISIONS, default="32-true", help="the Trainer's; 32-true")
    command.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="adamw")
    command.add_argument("--partition", choices=("auto", "element", "parameter"), default="auto", help="ZeroStrategy's")
    command.add_argument("--bucket-size-mb", type=float, default=25.0, metavar="MB", help="ZeroStrategy's; 25")
    command.add_argument("--reduce-dtype", choices=_REDUCE_BYTES, help="ZeroStrategy's; the parameters' own")
    command.add_argument("--offload-optimizer", action="store_true", help="ZeroStrategy's; not DDP's")
    command.add_argument(
        "--accumulate", type=positive, default=1, metavar="N", help="the Trainer's accumulate_grad_batches; 1"
    )
    command.add_argument("--backend", choices=("nccl", "gloo"), default="nccl", help="nccl")


def _count(text: str) -> int:
    """A number of elements: `7e9`, `7B`."""
    suffix = text[-1:].upper()
    with suppress(ValueError):
        number = float(text[:-1]) * _SUFFIXES[suffix] if suffix in _SUFFIXES else float(text)
        if 1 <= number < 1e18:
            return round(number)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of parameters, such as 7e9 or 7B")


def _arguments(text: str) -> dict[str, Any]:
    """A JSON object."""
    with suppress(ValueError):
        if isinstance(arguments := json.loads(text), dict):
            return arguments
    raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"width\": 512}}'")


def _plan(options: argparse.Namespace) -> int:
    if options.model is None and options.model_args is not None:
        raise WrongUseError("--model-args goes with --model")
    if options.model is not None and options.frozen is not None:
        raise WrongUseError("--frozen goes with --params; a --model says by requires_grad what isn't trained")
    if not 0 < options.bucket_size_mb < 1e9:
        raise WrongUseError(f"--bucket-size-mb must be a positive number, not {options.bucket_size_mb}")
    optimizer = OPTIMIZERS[options.optimizer]
    setup = Setup(
        world_size=options.world_size,
        optimizer=optimizer,
        policy=optimizer.policy if options.partition == "auto" else options.partition,
        bucket_bytes=max(1, int(options.bucket_size_mb * 2**20)),
        accumulate=options.accumulate,
        reduce_bytes=_REDUCE_BYTES.get(options.reduce_dtype),
        equal_shards=options.backend == "nccl",
        offload=options.offload_optimizer,
    )
    model = _model_of_count(options) if options.model is None else _model_of_module(options)
    plans = [plan(model, setup, stage) for stage in ((0, 1, 2) if options.stage is None else (options.stage,))]
    if options.json:
        print_json(
            {
                "trained_parameters": model.trained,
                "frozen_bytes": model.frozen_bytes,
                "world_size": setup.world_size,
                "precision": options.precision,
                "optimizer": options.optimizer,
                "partition": setup.policy,
                "accumulate": setup.accumulate,
                "stages": [dataclasses.asdict(planned) | {"memory": planned.memory} for planned in plans],
            }
        )
    else:
        _print(options, model, setup, plans)
    return 0


def _print(options: argparse.Namespace, model: Model, setup: Setup, plans: list[Plan]) -> None:
    ranks = "1 rank" if setup.world_size == 1 else f"{setup.world_size} ranks"
    print(f"{_count_text(model.trained)} trained parameters, {options.precision}, {options.optimizer}, {ranks}\n")
    rows = [["", "", *("stage 0 (DDP)" if planned.stage == 0 else f"stage {planned.stage}" for planned in plans)]]
    for group, title, field in _ROWS:
        figures = [getattr(planned, field) for planned in plans]
        if any(figures):
            rows.append([group, title, *(bytes_text(figure) if figure else "-" for figure in figures)])
    print_table(rows, "<<" + ">" * len(plans))
    print("\nNot counted: activations, the kernels' temporary memory, what the process group and the allocator keep.")
    if options.precision.endswith("-mixed"):
        casts = bytes_text(2 * model.trained)
        print(f"While forward and backward run, autocast keeps 16-bit copies of weights: up to {casts} more.")
    if PRECISIONS[options.precision] is not None and plans[0].stage == 0:
        print("DDP has no fp32 masters: it trains the 16-bit weights themselves, and its states are 16-bit too.")


def _count_text(count: int) -> str:
    for power, unit in ((4, "T"), (3, "B"), (2, "M"), (1, "k")):
        if count >= 1000**power:
            return f"{count / 1000**power:.4g} {unit}"
    return str(count)


def _model_of_count(options: argparse.Namespace) -> Model:
    element_bytes = PRECISIONS[options.precision] or _ELEMENT_BYTES
    return Model(options.params, element_bytes, frozen_bytes=(options.frozen or 0) * element_bytes)


def _model_of_module(options: argparse.Namespace) -> Model:
    """Make the user's module on the meta device, and see what it holds.

    Raises:
        UnsupportedModelError: it can't be imported, or made so.
    """
    home, _, name = options.model.partition(":")
    if not home or not name:
        raise WrongUseError(f"--model is MODULE:CLASS, such as train:Net, not {options.model!r}")
    import torch

    sys.path.insert(0, os.getcwd())
    does = "imported"
    try:
        with redirect_stdout(sys.stderr):  # what the user's code prints is none of the plan
            made_by: Any = importlib.import_module(home)
            for part in name.split("."):
                made_by = getattr(made_by, part)
            does = "made on the meta device"
            with torch.device("meta"):
                module = made_by(**(options.model_args or {}))
                getattr(module, "configure_model", lambda: None)()
        return _model_of(module, PRECISIONS[options.precision])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnsupportedModelError(f"{options.model} can't be {does}: {reason}") from error


def _model_of(module: Any, converted_bytes: int | None) -> Model:
    """What a torch module holds, in the dtypes to which the precision converts it."""

    def element_bytes(tensor: Any) -> int:
        size: int = tensor.element_size()
        return converted_bytes if converted_bytes and tensor.is_floating_point() else size

    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    frozen = [p for p in module.parameters() if not p.requires_grad]
    in_state_dict = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    buffers = list(module.buffers())
    return Model(
        trained=sum(p.numel() for _, p in trained),
        parameters=tuple(ParameterSpec(name, tuple(p.shape), element_bytes(p)) for name, p in trained),
        frozen_bytes=sum(p.numel() * element_bytes(p) for p in frozen),
        buffer_bytes=sum(b.numel() * element_bytes(b) for b in buffers),
        saved_buffer_bytes=sum(b.numel() * element_bytes(b) for b in buffers if id(b) in in_state_dict),
    )
