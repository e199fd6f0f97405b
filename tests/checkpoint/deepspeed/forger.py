"""Writes directories as DeepSpeed lays them out, without DeepSpeed: what its ranks would have held, and their files.

Its own classes in its pickles are stand-ins, which go by DeepSpeed's names only while a file is saved.
"""

import enum
import math
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale = 1.0


class ZeroStageEnum(int, enum.Enum):
    optimizer_states = 1
    gradients = 2
    weights = 3


@dataclass
class fragment_address:
    numel: int
    start: int


HOMES = {
    LossScaler: "deepspeed.runtime.fp16.loss_scaler",
    ZeroStageEnum: "deepspeed.runtime.zero.config",
    fragment_address: "deepspeed.utils.tensor_fragment",
}


@contextmanager
def deepspeeds_names() -> Iterator[None]:
    modules: dict[str, types.ModuleType] = {}
    for stand_in, home in HOMES.items():
        parts = home.split(".")
        for depth in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        setattr(modules[home], stand_in.__name__, stand_in)
        stand_in.__module__ = home
    try:
        with mock.patch.dict(sys.modules, modules):
            yield
    finally:
        for stand_in in HOMES:
            stand_in.__module__ = __name__


@dataclass
class Run:
    """A training under DeepSpeed: a module, its AdamW, and how they are cut.

    `stage` may be `"bf16"` for BF16_Optimizer.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    stage: int | str = 2
    world_size: int = 3
    step: int = 5
    client_state: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Any = None
    sub_groups: bool = True
    prefix: str = ""

    def __post_init__(self) -> None:
        self.names = {parameter: self.prefix + name for name, parameter in self.module.named_parameters()}

    @property
    def groups(self) -> list[list[nn.Parameter]]:
        """The flat groups; at stage 3 a param group of several parameters makes two."""
        groups = [[p for p in group["params"] if p.requires_grad] for group in self.optimizer.param_groups]
        if self.stage == 3 and self.sub_groups:
            groups = [part for group in groups for part in (group[:1], group[1:]) if part]
        return groups

    def whole(self, parameter: nn.Parameter, state: str | None) -> Tensor:
        value = parameter if state is None else self.optimizer.state[parameter][state]
        return value.detach().float().reshape(-1)

    def flat(self, group: list[nn.Parameter], rank: int, state: str | None = None) -> Tensor:
        """A rank's part of a flat group, with its padding."""
        if self.stage == 3:
            return torch.cat([self.part(self.whole(parameter, state), rank) for parameter in group])
        together = torch.cat([self.whole(parameter, state) for parameter in group])
        each = math.ceil(len(together) / (2 * self.world_size)) * 2
        padded = nn.functional.pad(together, (0, each * self.world_size - len(together)), value=torch.nan)
        return padded[rank * each : (rank + 1) * each].clone()

    def part(self, whole: Tensor, rank: int) -> Tensor:
        each = math.ceil(len(whole) / self.world_size)
        return nn.functional.pad(whole, (0, each * self.world_size - len(whole)), value=torch.nan)[
            rank * each : (rank + 1) * each
        ].clone()

    def padding(self, group: list[nn.Parameter], rank: int) -> int:
        total = sum(parameter.numel() for parameter in group)
        each = len(self.flat(group, rank))
        return min(each, max(0, (rank + 1) * each - total))

    def base_optimizer(self, rank: int) -> dict[str, Any]:
        base, numbers = self.optimizer.state_dict(), iter(range(len(self.groups)))
        groups = []
        for group in base["param_groups"]:
            count = 2 if self.stage == 3 and self.sub_groups and len(group["params"]) > 1 else 1
            groups.append({**group, "params": [next(numbers) for _ in range(count)]})
        step = torch.tensor(float(self.step))
        states = {
            number: {"step": step, **{key: self.flat(group, rank, key) for key in ("exp_avg", "exp_avg_sq")}}
            for number, group in enumerate(self.groups)
        }
        return {"state": states, "param_groups": groups}

    def optimizer_file(self, rank: int) -> dict[str, Any]:
        flats = [self.flat(group, rank) for group in self.groups]
        paddings = [self.padding(group, rank) for group in self.groups]
        if self.stage == 3:
            saved = {
                "zero_stage": ZeroStageEnum.weights,
                "loss_scaler": LossScaler(),
                "partition_count": self.world_size,
                "optimizer_state_dict": self.base_optimizer(rank),
                "fp32_flat_groups": [nn.Parameter(flat) for flat in flats],
            }
            saved["fp32_flat_groups"][0].ds_id = "1_6"
            return {"optimizer_state_dict": saved, "ds_version": "0.19.8"}
        saved = {
            "clip_grad": 0.0,
            "base_optimizer_state": self.base_optimizer(rank),
            "single_partition_of_fp32_groups": flats,
            "partition_count": [self.world_size] * len(flats),
            "param_slice_mappings": [OrderedDict(x=fragment_address(numel=1, start=0)) for _ in flats],
        }
        if self.stage == "bf16":  # which strips nothing, and has all of the padding in the last rank's account
            total = [sum(self.padding(group, r) for r in range(self.world_size)) for group in self.groups]
            last = rank == self.world_size - 1
            saved["group_paddings"] = total if last else [0] * len(flats)
        else:
            saved |= {
                "zero_stage": ZeroStageEnum(self.stage),
                "loss_scaler": LossScaler(),
                "group_paddings": paddings,
                "param_alignment_paddings": [[0] * len(group) for group in self.groups],
                "single_partition_of_fp32_groups": [
                    flat[: len(flat) - padding] for flat, padding in zip(flats, paddings, strict=True)
                ],
            }
        return {"optimizer_state_dict": saved, "ds_version": "0.19.8"}

    def shapes(self, parameters: list[nn.Parameter]) -> OrderedDict[str, torch.Size]:
        return OrderedDict((self.names[parameter], parameter.shape) for parameter in parameters)

    def model_file(self, rank: int) -> dict[str, Any]:
        buffers = [self.prefix + name for name, _ in self.module.named_buffers()]
        module = OrderedDict((self.prefix + name, value) for name, value in self.module.state_dict().items())
        frozen = [parameter for parameter in self.names if not parameter.requires_grad]
        first: dict[nn.Parameter, str] = {}
        shared = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            stored = first.setdefault(parameter, self.prefix + name)
            if stored != self.prefix + name and rank == 0:
                shared[self.prefix + name] = stored
        zero = self.stage != 0
        narrow = torch.bfloat16 if self.stage == "bf16" else torch.float32
        if self.stage == 3:
            module = OrderedDict((n, v if n in buffers else torch.empty(0)) for n, v in module.items())
        if self.stage == "bf16":
            module = OrderedDict((n, v if n in buffers else v.to(narrow)) for n, v in module.items())
        fragments = OrderedDict(
            (self.names[p], self.part(p.detach().reshape(-1), rank) if self.stage == 3 else p.detach()) for p in frozen
        )
        return {
            "module": module,
            "buffer_names": buffers,
            "optimizer": None if zero else self.optimizer.state_dict(),
            "param_shapes": [self.shapes(group) for group in self.groups] if zero else None,
            "frozen_param_shapes": self.shapes(frozen) if self.stage in (2, 3) else None,
            "shared_params": shared if zero else None,
            "frozen_param_fragments": fragments if self.stage in (2, 3) else None,
            "lr_scheduler": self.scheduler,
            "data_sampler": None,
            "random_ltd": None,
            "sparse_tensor_module_names": set(),
            "skipped_steps": 0,
            "global_steps": self.step,
            "global_samples": 4 * self.step,
            "dp_world_size": self.world_size,
            "mp_world_size": 1,
            "ds_config": {"zero_optimization": {"stage": self.stage if zero else 0}},
            "ds_version": "0.19.8",
            **self.client_state,
        }

    def save(self, save_dir: Path, tag: str = "global_step5", *, latest: bool = True) -> Path:
        directory = save_dir / tag
        directory.mkdir(parents=True, exist_ok=True)
        with deepspeeds_names():
            for rank in range(self.world_size):
                own = f"zero_pp_rank_{rank}_mp_rank_00"
                if self.stage == 3 or rank == 0:
                    name = own if self.stage == 3 else "mp_rank_00"
                    torch.save(self.model_file(rank), directory / f"{name}_model_states.pt")
                if self.stage != 0:
                    name = f"{'bf16_' if self.stage == 'bf16' else ''}{own}_optim_states.pt"
                    torch.save(self.optimizer_file(rank), directory / name)
        if latest:
            (save_dir / "latest").write_text(tag)
        return directory


def edit(path: Path, change: Any) -> None:
    """Save a file again, with a change."""
    with deepspeeds_names():
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)
