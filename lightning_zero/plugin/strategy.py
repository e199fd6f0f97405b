"""`ZeroStrategy`: what Lightning calls, brought to the engine and to the checkpoint rooms.

[Note: when random states are restored]
A resumed run must draw the numbers that the uninterrupted one would have drawn, and makes its data loaders and their
iterators anew on the way.

| the checkpoint was saved    | its iterator was made      | so the states are restored                          |
|-----------------------------|----------------------------|-----------------------------------------------------|
| in the middle of an epoch   | before                     | when all iterators are there (`on_train_start`)     |
| at an epoch's end           | after, for the next epoch  | between loader and iterator (`process_dataloader`), |
|                             |                            | and again where two were made (`on_train_start`)    |
"""

from __future__ import annotations

import atexit
import difflib
import inspect
import io
import os
import pickle
import shutil
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins.io.async_plugin import AsyncCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.types import STEP_OUTPUT
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_zero.checkpoint.export import convert_zero_checkpoint_to_fp32_state_dict
from lightning_zero.checkpoint.integrity import Depth
from lightning_zero.checkpoint.load import is_checkpoint, resolve
from lightning_zero.checkpoint.save import RankContent, SharedContent
from lightning_zero.engine.collectives import Collectives, collectives_for
from lightning_zero.engine.optimizer import OwnedSegment
from lightning_zero.engine.partition import Partition
from lightning_zero.errors import CheckpointMismatchError, CheckpointWriteError, UnsupportedModelError, ZeroError
from lightning_zero.plugin.checkpoint_io import PREPARED, LoadedCheckpoint, PreparedSave, ZeroCheckpointIO
from lightning_zero.plugin.contents import contents
from lightning_zero.plugin.loader_state import (
    Iterators,
    draw_once,
    finish_epochs,
    is_at_epochs_end,
    make_resumable,
    next_epoch,
)
from lightning_zero.plugin.metric_state import MetricState, get_metric_states, set_metric_states
from lightning_zero.plugin.precision import route_clipping
from lightning_zero.plugin.random_state import set_random_state
from lightning_zero.plugin.signals import SharedSignals

_T = TypeVar("_T")
_CLIENT_STATE = "lightning_zero_client_state"

_ARRIVAL_SECONDS = 10
"""How long a rank that saves after an exception waits for the others."""

_OF_DDP_ALONE = {
    "gradient_as_bucket_view": "gradients have their buckets here in any case",
    "static_graph": "nothing here depends on the graph; leave it out",
    "bucket_cap_mb": "it is called bucket_size_mb here",
    "ddp_comm_hook": "gradients can travel in another dtype by reduce_dtype",
    "ddp_comm_state": "gradients can travel in another dtype by reduce_dtype",
    "ddp_comm_wrapper": "gradients can travel in another dtype by reduce_dtype",
    "model_averaging_period": "post-local SGD keeps a whole optimizer on every rank; use DDPStrategy for it",
    "config": "what DeepSpeed's JSON holds are arguments of the Trainer and of ZeroStrategy here",
}
"""What users of other strategies pass, and what they find here instead."""


@dataclass(frozen=True)
class _Groups:
    """Process groups of our own, and the one that they were made in."""

    world: dist.ProcessGroup
    data: dist.ProcessGroup
    control: dist.ProcessGroup
    collectives: Collectives


@dataclass(frozen=True)
class _Resume:
    """What a resumed fit still has to do when its loaders are there."""

    random_state: dict[str, Any]
    epoch: int
    iterators: Iterators


class ZeroStrategy(DDPStrategy):
    """ZeRO stages 1 and 2: optimizer states, and at stage 2 gradients, partitioned over the ranks.

    It stands where `DDPStrategy` stands: the module, its optimizers, callbacks and precision stay as they are.

    Args:
        stage: 1: optimizer states are partitioned. 2: gradients too; under gradient accumulation each backward is
            reduced at once, where stage 1 keeps whole gradients and reduces them with the last.
        partition: how optimizer states are cut. `"element"`: flat slices, for optimizers whose update of an
            element looks at that element alone. `"parameter"`: whole parameters, for any optimizer. `"auto"`:
            by element for the optimizers of `torch.optim` that are known to be element-wise, else by parameter.
        bucket_size_mb: about how many MiB of gradients travel as one message.
        reduce_dtype: the dtype in which gradients travel, such as `"float32"`; the parameters' own by default.
        find_unused_parameters: set this where a parameter may have a gradient on one rank and none on another.
            On gloo it works without; on NCCL it costs a synchronisation a backward.
        broadcast_buffers: give every rank the first rank's buffers before each forward, as DDP does.
        accelerator: as for `DDPStrategy`, like all that follow.
        parallel_devices: the devices of this node.
        cluster_environment: who started the processes.
        checkpoint_io: a `ZeroCheckpointIO`, or a wrapper around one. Any other gets whole checkpoints on rank 0, as
            under DDP, and rank 0 the memory to put them together.
        precision_plugin: the precision plugin.
        process_group_backend: `"gloo"` or `"nccl"`; by default whichever fits the device.
        timeout: of the process group's collectives.
        start_method: how processes are started: `"popen"`, `"spawn"`, `"fork"` or `"forkserver"`.

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020.
    """

    strategy_name = "zero"

    def __init__(
        self,
        stage: int = 2,
        *,
        partition: Literal["auto", "element", "parameter"] = "auto",
        bucket_size_mb: float = 25.0,
        reduce_dtype: str | torch.dtype | None = None,
        find_unused_parameters: bool = False,
        broadcast_buffers: bool = True,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = dist.constants.default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(_unknown_arguments(unknown))
        if stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, not {stage!r}; use DDPStrategy for stage 0, FSDPStrategy for 3")
        if partition not in ("auto", "element", "parameter"):
            raise ValueError(f'partition must be "auto", "element" or "parameter", not {partition!r}')
        if bucket_size_mb <= 0:
            raise ValueError(f"bucket_size_mb must be positive, not {bucket_size_mb!r}")
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self.stage = stage
        self._partition_by = partition
        self._bucket_bytes = max(1, int(bucket_size_mb * 2**20))
        self._reduce_dtype = _dtype(reduce_dtype)
        self._find_unused_parameters = find_unused_parameters
        self._broadcast_buffers = broadcast_buffers
        self._buffers_due = True
        self._partition: Partition | None = None
        self._groups: _Groups | None = None
        self._resume: _Resume | None = None
        self._signals: SharedSignals | None = None
        self._all_arrived: bool | None = None
        self._metrics: list[dict[str, MetricState]] = []
        self._metric_names: set[str] = set()

    # --- plugins ---

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = ZeroCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = ZeroCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @property
    def _innermost_io(self) -> CheckpointIO | None:
        innermost: CheckpointIO | None = self.checkpoint_io
        while isinstance(innermost, _WrappingCheckpointIO):
            innermost = innermost.checkpoint_io
        return innermost

    @property
    def _verify(self) -> Depth:
        """How sound a checkpoint has to be for it to be chosen."""
        innermost = self._innermost_io
        return innermost.verify if isinstance(innermost, ZeroCheckpointIO) else "sizes"

    @property
    @override
    def precision_plugin(self) -> Precision:
        return self._precision_plugin if self._precision_plugin is not None else Precision()

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        self._precision_plugin = precision_plugin
        if precision_plugin is not None:
            route_clipping(precision_plugin, self._clip_by_norm, self._clip_by_value)

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        self._partitioned.clip_grad_norm_(float(clip_val), optimizer)

    def _clip_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        self._partitioned.clip_grad_value_(float(clip_val), optimizer)

    # --- setting up and tearing down ---

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        self._resume = None  # a fit that was stopped before it began leaves nothing to the next
        self._signals = self._all_arrived = None
        self._metrics, self._metric_names = [], set()

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and self._layer_sync:
            self.model = self._layer_sync.apply(self.model)
        self._materialize()
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        _require_shapes(self.model)
        _sync_module_states(self.model)
        if fitting:
            self._partition = None
            self._renew_groups()
            self.setup_optimizers(trainer)
        self._signals = SharedSignals(trainer, self._control_group if self.world_size > 1 else None)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)
            self._buffers_due = True
            self._partition = Partition(
                self.model,
                self.optimizers,
                self._collectives,
                stage=self.stage,
                partition=self._partition_by,
                bucket_bytes=self._bucket_bytes,
                reduce_dtype=self._reduce_dtype,
                find_unused_parameters=self._find_unused_parameters,
            )
            if self.world_size > 1:
                for optimizer, cut in zip(self.optimizers, self._partition.cuts, strict=True):
                    rank_zero_info(f"{type(optimizer).__name__} is partitioned by {cut.policy}: {cut.reason}")
        elif self._partition is not None:
            self._partition.rebase()

    def _materialize(self) -> None:
        """Give a module that was made on the meta device its memory, by its layers' `reset_parameters`."""
        assert self.model is not None
        _materialize_distributed_module(self.model, self.root_device)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._materialize()
        super().load_model_state_dict(checkpoint, strict=strict)
        if self._metric_names:
            assert self.lightning_module is not None
            set_metric_states(self.lightning_module, self._metrics, self._metric_names)
            self._metrics, self._metric_names = [], set()

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self._signals is None or not self._signals.all_stopped:
            atexit.unregister(_leave_groups)  # a thread of a group may wait for a peer for ever, and we not for it
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        # No collectives here: after an exception this rank may be the only one to come by.
        if self._partition is not None:
            self._partition.detach()
        super().teardown()
        if self._partition is not None:
            self._partition.rebase()

    def _renew_groups(self) -> None:
        """Begin a fit with groups in which nothing is under way: the last one may have ended in an exception."""
        groups, self._groups = self._groups, None
        if groups is not None and groups.world is dist.group.WORLD:
            for group in (groups.data, groups.control):
                dist.destroy_process_group(group)

    def _own_groups(self) -> _Groups:
        """Groups of our own: Lightning's signal handlers use the default one whenever they like."""
        world = dist.group.WORLD
        if self._groups is None or self._groups.world is not world:
            assert world is not None
            data = dist.new_group(timeout=self._timeout)
            control = dist.new_group(timeout=self._timeout, backend="gloo")
            self._groups = _Groups(world, data, control, collectives_for(data, self.root_device))
            atexit.register(_leave_groups, weakref.ref(self))
        return self._groups

    @property
    def _collectives(self) -> Collectives:
        return self._own_groups().collectives

    @property
    def _control_group(self) -> dist.ProcessGroup:
        """For what the ranks tell each other as Python objects; on gloo, so that no device has to stop for it."""
        return self._own_groups().control

    @property
    def _partitioned(self) -> Partition:
        if self._partition is None:
            raise UnsupportedModelError("nothing is partitioned yet; this can be called from the start of fit on")
        return self._partition

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_groups": None, "_partition": None, "_signals": None}

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self._interrupted:
            super().barrier(*args, **kwargs)
        elif self._all_are_here():
            dist.barrier(group=self._control_group)

    @property
    def _interrupted(self) -> bool:
        """An exception is under way: the other ranks may not know of it."""
        module = self.lightning_module
        trainer = module._trainer if module is not None else None
        return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED and self.world_size > 1

    def _all_are_here(self) -> bool:
        """After an exception: whether it is every rank's, so that they can still do something together.

        Nobody waits in a collective for one that may never come: each tells the store that it is here, and looks for
        the others for a while. They then begin anew in groups in which nothing is under way.
        """
        if self._signals is not None and self._signals.all_stopped:
            return True
        if self._all_arrived is None:
            store = dist.distributed_c10d._get_default_store()
            arrived, deadline = store.add("lightning_zero/after an exception", 1), time.monotonic() + _ARRIVAL_SECONDS
            while arrived % self.world_size and time.monotonic() < deadline:
                time.sleep(0.05)
                arrived = store.add("lightning_zero/after an exception", 0)
            self._all_arrived = arrived % self.world_size == 0
            if self._all_arrived:
                self._renew_groups()
        return self._all_arrived

    # --- a step ---

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._before_forward()
        return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        if self.lightning_module is not None and self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            self._before_forward()
        return super().validation_step(*args, **kwargs)

    def _before_forward(self) -> None:
        """Give every rank the first rank's buffers, just when DDP does: not after a forward that wasn't reduced."""
        if self._broadcast_buffers and self._buffers_due:
            assert self.model is not None
            ignored = getattr(self.model, "_ddp_params_and_buffers_to_ignore", ())
            self._collectives.broadcast_all([b for name, b in self.model.named_buffers() if name not in ignored])
        self._buffers_due = torch.is_grad_enabled() and not self._blocked

    _blocked = False

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None]:
        """Let gradients accumulate without communication, at stage 1; stage 2 reduces them all the same."""
        self._blocked = True
        try:
            with self._partitioned.no_sync():
                yield
        finally:
            self._blocked = False

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        pass  # DDP prepares its reducer here

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        if self._partition is not None:
            self._partition.flush()

    # --- what users ask ---

    def segments(self, optimizer: Optimizer) -> list[OwnedSegment]:
        """What this rank owns of an optimizer's parameters: from the start of fit on.

        Returns:
            Segments with `.name`, `.start`, `.stop` (in flattened elements), `.master` (the fp32 tensor that the
            optimizer steps on) and `.state` (its optimizer state by name).
        """
        return self._partitioned.segments(optimizer)

    def full_state(self, parameter: Parameter) -> dict[str, Any]:
        """The whole fp32 `"param"` and every optimizer state of one parameter. Called on every rank."""
        return self._partitioned.full_state(parameter)

    def full_grad(self, parameter: Parameter) -> Tensor | None:
        """The whole averaged gradient of one parameter, before the step. Called on every rank.

        Returns:
            A tensor of the parameter's shape, the same on every rank; None where no rank has a gradient.
        """
        return self._partitioned.full_grad(parameter)

    def grad_norm(self) -> Tensor:
        """The 2-norm of the averaged gradients of all optimizers, before the step. Called on every rank.

        Returns:
            A 0-d fp32 tensor, the same on every rank.
        """
        return self._partitioned.grad_norm()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients of all optimizers by their global norm, before the step. Called on every rank.

        Returns:
            The norm before clipping, as `torch.nn.utils.clip_grad_norm_` does.
        """
        return self._partitioned.clip_grad_norm_(max_norm, norm_type=norm_type)

    # --- checkpoints ---

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's part of an optimizer's state, in the shape of torch's own: indices, and groups of indices."""
        return self._partitioned.state_dict(optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Save a directory, all ranks together. A checkpoint of weights alone doesn't become `latest`."""
        if self._interrupted and not self._all_are_here():
            warnings.warn(
                f"{filepath} is not saved: training was interrupted on rank {self.global_rank}, and a sharded "
                "checkpoint needs every rank. `latest` still names the last one that was committed.",
                stacklevel=2,
            )
            return
        passing = Path(filepath).name.startswith(".")  # `lr_find` saves one, and removes it
        full = "optimizer_states" in checkpoint and self._partition is not None
        self._save(checkpoint, filepath, storage_options, update_latest=full and not passing)

    def _save(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None, *, update_latest: bool
    ) -> None:
        assert self.lightning_module is not None
        # After a fit in spawned processes, the one that is left has the weights, and no process group.
        group = self._control_group if dist.is_initialized() else None
        module, partition = self.lightning_module, self._partition
        if not isinstance(self._innermost_io, ZeroCheckpointIO):
            self._save_by_rank_zero(checkpoint, path, storage_options)
            return

        def describe() -> tuple[RankContent, SharedContent]:
            if partition is not None and partition.is_stepping:
                raise CheckpointWriteError(
                    f"{os.fspath(path)} is not saved: a step of the optimizer was broken off, and what is in memory is "
                    "half of the step before and half of this one. Resume from the last checkpoint"
                )
            if partition is not None:
                partition.take_over_outside_writes()
            rank, world_size = (0, 1) if group is None else (self.global_rank, self.world_size)
            metrics = get_metric_states(module, without=self._finished_metrics(checkpoint)) if partition else {}
            return contents(
                checkpoint, module, partition, rank=rank, world_size=world_size, stage=self.stage, metrics=metrics
            )

        content, shared = describe() if group is None else self._all_or_none(describe)
        prepared = PreparedSave(content, shared, group, update_latest=update_latest)
        self.checkpoint_io.save_checkpoint({**checkpoint, PREPARED: prepared}, path, storage_options=storage_options)
        self._wait_for_threads()

    def _save_by_rank_zero(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None) -> None:
        """Save as DDP does, by a `CheckpointIO` that knows no shards: put together, and written by one rank."""
        if self._partition is not None and "optimizer_states" in checkpoint:
            states = [self._partition.whole_state_dict(optimizer) for optimizer in self.optimizers]
            checkpoint = {**checkpoint, "optimizer_states": states}
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def _wait_for_threads(self) -> None:
        """Lightning's `AsyncCheckpointIO` saves in a thread, where the ranks would agree while they train.

        So it is waited for: everything that comes through it is as safe as without it, and not faster.
        """
        io: CheckpointIO | None = self.checkpoint_io
        while isinstance(io, _WrappingCheckpointIO):
            if isinstance(io, AsyncCheckpointIO) and io._executor is not None:
                io._executor.submit(lambda: None).result()
                if io._error is not None:
                    error, io._error = io._error, None
                    raise error
            io = io.checkpoint_io

    def save_zero_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> None:
        """Save everything under `save_dir/tag`, as DeepSpeed's `save_checkpoint` does. Called on every rank.

        Args:
            save_dir: the save directory.
            tag: `global_step{N}` by default; the same on every rank.
            client_state: what `load_zero_checkpoint` is to give back: plain values and tensors.
            save_latest: let `latest` name the tag.
            exclude_frozen_parameters: leave out what isn't trained; such a checkpoint is loaded with
                `load_module_strict=False`.

        Raises:
            TagMismatchError: the ranks gave different tags.
            CheckpointWriteError: a rank could not write its part; nothing has changed.
        """
        trainer = self._trainer
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        checkpoint[_CLIENT_STATE] = dict(client_state or {})
        if exclude_frozen_parameters:
            frozen = {name for name, p in trainer.lightning_module.named_parameters() if not p.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        self._save(
            checkpoint, Path(save_dir) / (tag or f"global_step{trainer.global_step}"), None, update_latest=save_latest
        )

    def load_zero_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[[dict[str, Any], Module], object] | None = None,
    ) -> tuple[str | None, dict[str, Any]]:
        """Load into the live module, optimizers and schedulers, as DeepSpeed's does. Called on every rank.

        Args:
            load_dir: the save directory, or one tag's.
            tag: by default the one that `latest` names.
            load_module_strict: if False, names that only one side has are warned of and passed over.
            load_optimizer_states: the optimizers' states and hyper-parameters too.
            load_lr_scheduler_states: the schedulers' too.
            load_module_only: neither of both.
            custom_load_fn: called with the state dict and the module, instead of `module.load_state_dict`.

        Returns:
            The tag's directory, and the client state that was saved with it; `(None, {})`, with a warning, where
            there is no checkpoint.

        Raises:
            CheckpointNotFoundError: the tag that was asked for isn't there, or no tag is sound.
            CheckpointMismatchError: the checkpoint doesn't fit the module or its optimizers.
        """
        module = self._trainer.lightning_module

        def choose() -> str | None:
            there = tag is not None or is_checkpoint(load_dir)
            return os.fspath(resolve(load_dir, tag, verify=self._verify)) if there else None

        path = self._rank_zero_decides(choose)
        if path is None:
            rank_zero_warn(f"there is no checkpoint in {load_dir}: nothing is loaded")
            return None, {}

        def load() -> dict[str, Any]:
            checkpoint = self.checkpoint_io.load_checkpoint(path)
            state_dict = checkpoint["state_dict"]
            if custom_load_fn is not None:
                custom_load_fn(state_dict, module)
            else:
                _load_module(module, state_dict, path, strict=load_module_strict)
            self._partitioned.load_masters(state_dict)
            if load_optimizer_states and not load_module_only:
                self._load_optimizer_states(checkpoint)
            if load_lr_scheduler_states and not load_module_only:
                for config, state in zip(self.lr_scheduler_configs, checkpoint.get("lr_schedulers", ()), strict=False):
                    config.scheduler.load_state_dict(state)
            client_state: dict[str, Any] = checkpoint.get(_CLIENT_STATE, {})
            return client_state

        return path, self._all_or_none(load)

    def export(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """Write one fp32 file from Lightning's dict and the live masters. Called on every rank.

        The way leads over a sharded checkpoint of the weights beside the file, so that no rank ever holds a second
        copy of the model.
        """
        weights = {key: value for key, value in checkpoint.items() if key != "optimizer_states"}
        shards = path.parent / f".{path.name}.shards" / "weights"
        self._save(weights, shards, None, update_latest=False)

        def convert() -> None:
            try:
                convert_zero_checkpoint_to_fp32_state_dict(shards, path)
            finally:
                shutil.rmtree(shards.parent, ignore_errors=True)

        self._rank_zero_decides(convert)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint directory, or a plain file; every rank the one that rank 0 has chosen."""

        def choose() -> str:
            path = os.fspath(checkpoint_path)
            return os.fspath(resolve(path, verify=self._verify)) if is_checkpoint(path) else path

        path = self._rank_zero_decides(choose)
        checkpoint = self._all_or_none(lambda: self.checkpoint_io.load_checkpoint(path, weights_only=weights_only))
        if isinstance(checkpoint, LoadedCheckpoint) and self.lightning_module is not None:
            self._take_rank_state(checkpoint, weights_only)
        return checkpoint

    def _take_rank_state(self, checkpoint: LoadedCheckpoint, weights_only: bool | None) -> None:
        """What belongs to this rank alone: its random number generators, its metrics, and where its data loader is."""
        source, saved_by = checkpoint.source, checkpoint.source.manifest.world_size

        def of(rank: int) -> dict[str, Any]:
            stored = source.rank_state(rank)
            return {} if stored is None else torch.load(io.BytesIO(stored), weights_only=weights_only is not False)

        own = of(self.global_rank)
        if self._trainer.state.fn == TrainerFn.FITTING:
            others = [of(rank) for rank in range(self.global_rank + self.world_size, saved_by, self.world_size)]
            self._metrics = [state.get("metrics", {}) for state in (own, *others) if state]
            self._metric_names = set(of(0).get("metrics", {}))
        if not own:
            return
        if saved_by == self.world_size and own["loops"] is not None:
            checkpoint["loops"] = own["loops"]
        if self._trainer.state.fn != TrainerFn.FITTING:
            return
        loops = checkpoint.get("loops", {})
        iterators = finish_epochs(loops, by_steps=self._trainer.max_steps != -1)
        self._resume = _Resume(own["random"], next_epoch(loops), iterators)

    def _finished_metrics(self, checkpoint: Mapping[str, Any]) -> list[Metric]:
        """Metrics whose epoch is over, and which are about to be reset: Lightning resets those that were logged.

        A save with an epoch's last batch comes before whatever the module does with its metrics when the epoch ends,
        which a resumed run doesn't do: it begins the next one. Only those that are to persist are then kept.
        """
        trainer, loops = self._trainer, checkpoint.get("loops", {})
        if is_at_epochs_end(loops):
            epoch = loops["fit_loop"]["epoch_progress"]["current"]
            if epoch["processed"] == epoch["completed"]:
                metrics = [child for child in trainer.lightning_module.modules() if isinstance(child, Metric)]
                return [metric for metric in metrics if not any(metric._persistent.values())]
        loop = trainer.fit_loop.epoch_loop
        results = [loop.val_loop._results, *([loop._results] if is_at_epochs_end(loops) else ())]
        return [metric.value for result in results for metric in result.values() if not metric.is_tensor]

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of the optimizer states and masters, whoever saved them: ZeRO or DDP."""

        def load() -> None:
            self._partitioned.load_masters(checkpoint["state_dict"])
            self._load_optimizer_states(checkpoint)

        self._all_or_none(load)

    def _load_optimizer_states(self, checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint.get("optimizer_states")
        if states is not None and not states and self.optimizers:
            rank_zero_warn("the checkpoint has no optimizer states: the optimizers start afresh")
            return
        if states is None or len(states) != len(self.optimizers):
            raise CheckpointMismatchError(
                f"the checkpoint has the states of {len(states or ())} optimizers, configure_optimizers gave "
                f"{len(self.optimizers)}; load its weights alone (load_module_only=True, or fit without ckpt_path)"
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            self._partitioned.load_state(optimizer, state)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Called when a loader is there and its iterator isn't: see [Note: when random states are restored]."""
        make_resumable(dataloader)
        if self._resume is not None:
            _set_sampler_epoch(dataloader, self._resume.epoch)
            if not self._in_mid_epoch:
                set_random_state(self._resume.random_state)
        return super().process_dataloader(dataloader)

    @override
    def on_train_start(self) -> None:
        """Called when the iterators are there: see [Note: when random states are restored]."""
        super().on_train_start()
        resume, self._resume = self._resume, None
        if resume is not None and (self._in_mid_epoch or resume.iterators != "one"):
            set_random_state(resume.random_state)
            loader = self._trainer.fit_loop._combined_loader
            if resume.iterators == "two" and loader is not None:
                draw_once(loader.flattened)

    @property
    def _trainer(self) -> Trainer:
        if self.lightning_module is None or self.lightning_module._trainer is None:
            raise UnsupportedModelError("no module is attached to the strategy yet; call this during fit, or after it")
        return self.lightning_module.trainer

    @property
    def _in_mid_epoch(self) -> bool:
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        return progress.current.ready > 0 and not progress.is_last_batch

    def _rank_zero_decides(self, decide: Callable[[], _T]) -> _T:
        """What `decide` gives on rank 0, or the error that it raises there, on every rank."""
        outcome: list[Any] = [None]
        if self.global_rank == 0:
            outcome = [_outcome(decide)]
        dist.broadcast_object_list(outcome, src=0, group=self._control_group)
        error, value = outcome[0]
        if error is not None:
            raise error
        decided: _T = value
        return decided

    def _all_or_none(self, function: Callable[[], _T]) -> _T:
        """Call a function on every rank. If it fails on one, it fails on all, with the first rank's error."""
        error, value = _outcome(function)
        errors: list[Exception | None] = [None] * self.world_size
        dist.all_gather_object(errors, error, group=self._control_group)
        first = next(((rank, error) for rank, error in enumerate(errors) if error is not None), None)
        if first is not None:
            rank, failure = first
            if isinstance(failure, ZeroError):
                raise type(failure)(f"rank {rank}: {failure}") from error
            raise failure
        return value  # type: ignore[return-value]


def _leave_groups(of: weakref.ref[ZeroStrategy]) -> None:
    """Join the groups' threads while Python still stands.

    One that lets go of a tensor after that wants the interpreter's lock, and takes the process down ("terminate called
    without an active exception"), as a loaded machine shows. A group joins its threads when the last reference to it
    goes, and not when it is destroyed.
    """
    strategy = of()
    groups = None if strategy is None else strategy._groups
    if strategy is not None and groups is not None:
        groups.collectives.release()
        if strategy._signals is not None:
            strategy._signals.release()
        strategy._groups = groups = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _unknown_arguments(unknown: Mapping[str, Any]) -> str:
    valid = [name for name in inspect.signature(ZeroStrategy).parameters if name != "unknown"]
    hints = []
    for name in unknown:
        close = difflib.get_close_matches(name, valid, n=1)
        instead = _OF_DDP_ALONE.get(name) or (f"did you mean {close[0]!r}?" if close else None)
        hints.append(f"{name!r}" + (f" ({instead})" if instead else ""))
    return f"ZeroStrategy has no argument {', '.join(hints)}; it takes {', '.join(valid)}"


def _require_shapes(module: Module) -> None:
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise UnsupportedModelError(
                f"the parameter {name!r} has no shape yet; run a batch through its lazy module in `configure_model`, "
                "or before fit"
            )


def _outcome(function: Callable[[], _T]) -> tuple[Exception | None, _T | None]:
    try:
        return None, function()
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return RuntimeError(f"{type(error).__name__}: {error}"), None
        return error, None


def _load_module(module: Module, state_dict: dict[str, Any], path: str, *, strict: bool) -> None:
    try:
        missing, unexpected = module.load_state_dict(state_dict, strict=strict)
    except RuntimeError as error:
        raise CheckpointMismatchError(f"{path} doesn't fit the module: {error}") from None
    if missing or unexpected:
        rank_zero_warn(f"{path} was loaded in part: missing {list(missing)}, unexpected {list(unexpected)}")


def _dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f'reduce_dtype must be a floating-point dtype such as "float32", not {name!r}')
    return dtype
