"""A small checkpoint of any number of ranks, with a bit of everything, made without a process group."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lightning_zero.checkpoint import commit, finish
from lightning_zero.checkpoint.content import RankContent, SharedContent, TensorToSave
from lightning_zero.checkpoint.manifest import Entry, OptimizerEntry, StoredValue
from lightning_zero.checkpoint.plan import Plan
from lightning_zero.checkpoint.report import Written
from lightning_zero.checkpoint.save import prepare, save_checkpoint, write
from lightning_zero.segments import ParameterSpec, plan_buckets

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (7, 5),
    "scale": (),
    "empty": (0, 3),
    "layer.weight": (64, 33),
    "bias": (19,),
}


@dataclass
class Sample:
    """The tensors of a training, and how they are put into a checkpoint of `world_size` ranks."""

    world_size: int = 1
    step: int = 3
    seed: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict(SHAPES))
    trainer: dict[str, object] = field(default_factory=dict)
    frozen_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(1000 * self.seed + self.step)
        self.masters = {name: torch.randn(shape, generator=random) for name, shape in self.shapes.items()}
        self.moments = {name: torch.randn(shape, generator=random) for name, shape in self.shapes.items()}
        self.frozen = torch.randn(11, 3, generator=random).to(self.frozen_dtype)
        self.counter = torch.tensor(2**40 + self.step)
        self.average = torch.randn((4, 6), generator=random)

    def rank(self, rank: int) -> RankContent:
        specs = [ParameterSpec(name, shape, 4) for name, shape in self.shapes.items()]
        tensors: list[TensorToSave] = []
        values: list[StoredValue] = []
        for bucket in plan_buckets(specs, self.world_size, "element", 2000):
            for segment, _ in bucket.owned(rank):
                name, start, stop = segment.name, segment.start, segment.stop
                part = slice(start, stop)
                tensors += [
                    TensorToSave("model", name, start, stop, self.masters[name].view(-1)[part]),
                    TensorToSave("optimizer", name, start, stop, self.moments[name].view(-1)[part], 0, "exp_avg"),
                    TensorToSave("optimizer", name, start, stop, torch.tensor(float(self.step)), 0, "step"),
                    TensorToSave("optimizer", name, start, stop, torch.arange(3.0), 0, "factors"),
                ]
                values.append(StoredValue(0, name, start, stop, "bound", float("inf")))
        frozen, frozen_part = ParameterSpec("frozen", (11, 3), self.frozen_dtype.itemsize), []
        for segment, _ in plan_buckets([frozen], self.world_size, "element", 10**6)[0].owned(rank):
            part = self.frozen.view(-1)[segment.start : segment.stop]
            frozen_part.append(TensorToSave("model", "frozen", segment.start, segment.stop, part))
        if rank == 0:
            tensors.append(TensorToSave("model", "counter", 0, 1, self.counter.view(1)))
            tensors.append(TensorToSave("model", "<average>", 0, 24, self.average.view(-1)))
        return RankContent(tensors, values, f"rank {rank}".encode(), self.step, frozen_part)

    @property
    def shared(self) -> SharedContent:
        return self._shared({"head.weight": next(iter(self.shapes))})

    def _shared(self, aliases: dict[str, str]) -> SharedContent:
        entries = [Entry(name, shape, "bfloat16", "parameter") for name, shape in self.shapes.items()]
        entries += [
            Entry("frozen", (11, 3), str(self.frozen_dtype).removeprefix("torch."), "frozen"),
            Entry("counter", (), "int64", "buffer"),
            Entry("<average>", (4, 6), "float32", "elsewhere"),
        ]
        groups = [{"lr": 0.1, "params": list(range(len(self.shapes)))}]
        trainer = {
            "epoch": 1,
            "global_step": self.step,
            "pytorch-lightning_version": "2.6.6",
            "hyper_parameters": {"width": 5},
            "average": {"lightning_zero_tensor": "<average>"},
            "optimizer_states": [{"state": {}, "param_groups": groups}],
            **self.trainer,
        }
        return SharedContent(
            1,
            2,
            entries,
            aliases,
            [OptimizerEntry("AdamW", (tuple(self.shapes),))],
            trainer,
        )

    def save(self, directory: Path, *, update_latest: bool = True, aliases: dict[str, str] | None = None) -> Path:
        shared = self.shared if aliases is None else self._shared(aliases)
        if self.world_size == 1:
            return save_checkpoint(
                directory, self.rank(0), shared, group=None, update_latest=update_latest, fsync=False
            ).path
        save_id = f"{self.seed:08x}{self.step:08x}"
        staging = commit.staging_directory(directory.parent, directory.name, save_id)
        commit.Staging(staging, save_id).release()
        plans = [
            Plan(directory, staging, save_id, self.step, rank, self.world_size, None, None)
            for rank in range(self.world_size)
        ]
        prepared = [prepare(plan.rank, directory, self.rank(plan.rank), shared) for plan in plans]
        reports = [write(plan, ready, fsync=False) for plan, ready in zip(plans, prepared, strict=True)]
        written = [report for report in reports if isinstance(report, Written)]
        assert len(written) == self.world_size, reports
        finish._commit(plans[0], written, shared, update_latest, False)
        return directory

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """What a load should give."""
        tensors = {**self.masters, "frozen": self.frozen, "counter": self.counter}
        return {**tensors, "head.weight": self.masters[next(iter(self.shapes))]}
