"""`ZeroStrategy`: what Lightning calls, brought to the engine and to the checkpoint rooms."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.types import STEP_OUTPUT
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_zero.checkpoint.commit import validate_tag
from lightning_zero.checkpoint.content import CLIENT_STATE, RankContent, SharedContent
from lightning_zero.checkpoint.origins import advice
from lightning_zero.checkpoint.plan import TagValidation
from lightning_zero.checkpoint.storage import locate
from lightning_zero.engine.optimizer import OwnedSegment
from lightning_zero.engine.partition import Partition
from lightning_zero.errors import CheckpointWriteError, UnsupportedModelError
from lightning_zero.memory import keep_freed_memory
from lightning_zero.plugin import restarts
from lightning_zero.plugin.alike import give_first_ranks_values, ignored_names, module_lines, optimizer_lines
from lightning_zero.plugin.arguments import floating_dtype, refuse_unknown, require_bool, require_instance
from lightning_zero.plugin.checkpoint_io import LoadedCheckpoint, ZeroCheckpointIO, weights_option
from lightning_zero.plugin.contents import contents
from lightning_zero.plugin.loading import fits_module, load_averages, load_module, restore_optimizer_states
from lightning_zero.plugin.loads import Loads
from lightning_zero.plugin.logged_metrics import get_logged
from lightning_zero.plugin.materialize import materialize, require_values
from lightning_zero.plugin.metric_state import finished_metrics, get_metric_states
from lightning_zero.plugin.overlap import GatherOverlap
from lightning_zero.plugin.precision import route_clipping, unroute_clipping
from lightning_zero.plugin.ranks import Ranks, stay_at_exit
from lightning_zero.plugin.resume import Resume
from lightning_zero.plugin.savers import OTHER
from lightning_zero.plugin.saves import Saves
from lightning_zero.plugin.signals import SharedSignals
from lightning_zero.plugin.training_data import TrainingData

_T = TypeVar("_T")
_BROKEN_OFF = (
    "{} is not saved: a step of the optimizer was broken off, and what is in memory is half of the step before and "
    "half of this one. Resume from the last checkpoint"
)
_IN_ITS_PROCESS = ", in a process that trains (of spawned or forked ones, in a callback: fit ends them)"
_START_METHODS = ("popen", "spawn", "fork", "forkserver")


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
        overlap_gather: let the gather of updated parameters go on beside the next forward, in which each module waits
            for its own. For a forward that reads no parameter of a module before that one's own forward is called.
            Where a callback or a hook may look at parameters in between, or a part of the module is compiled, it is
            waited for as ever, and a line in the log says so. On NCCL a module with buffers needs
            `broadcast_buffers=False` too: their broadcast would wait for the gather.
        offload_optimizer: keep the fp32 masters and the optimizer's states in host memory, and have it step there, as
            DeepSpeed's `offload_optimizer` does. `torch.optim.AdamW(..., fused=True)` is fast on CPUs; give each rank
            its share of the cores (`OMP_NUM_THREADS`). Where there is no GPU nothing changes.
        tag_validation: what to do where the ranks give `save_zero_checkpoint` different tags: `"fail"`, or take the
            first rank's, and `"warn"` of it, or `"ignore"` it. Of names that Lightning's callbacks have made, with a
            rank's own metrics perhaps, the first rank's is taken in any case, as under DDP.
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
        overlap_gather: bool = False,
        offload_optimizer: bool = False,
        tag_validation: TagValidation = "fail",
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
        refuse_unknown(unknown, [name for name in inspect.signature(ZeroStrategy).parameters if name != "unknown"])
        if type(stage) is not int or stage not in (1, 2):  # 2.0 and True would only fail when a manifest is written
            raise ValueError(f"stage must be 1 or 2, not {stage!r}; use DDPStrategy for stage 0, FSDPStrategy for 3")
        if partition not in ("auto", "element", "parameter"):
            raise ValueError(f'partition must be "auto", "element" or "parameter", not {partition!r}')
        if not isinstance(bucket_size_mb, (int, float)) or not 0 < bucket_size_mb < math.inf:
            raise ValueError(f"bucket_size_mb must be a positive number, not {bucket_size_mb!r}")
        _require_tag_validation(tag_validation)
        if timeout is not None and not isinstance(timeout, timedelta):
            raise ValueError(f"timeout must be a datetime.timedelta, such as timedelta(minutes=30), not {timeout!r}")
        if start_method not in _START_METHODS:
            raise ValueError(f"start_method must be one of {_START_METHODS}, not {start_method!r}")
        require_bool("find_unused_parameters", find_unused_parameters)
        require_bool("broadcast_buffers", broadcast_buffers)
        require_bool("overlap_gather", overlap_gather)
        require_bool("offload_optimizer", offload_optimizer)
        require_instance("accelerator", accelerator, Accelerator)
        require_instance("cluster_environment", cluster_environment, ClusterEnvironment)
        require_instance("checkpoint_io", checkpoint_io, CheckpointIO)
        require_instance("precision_plugin", precision_plugin, Precision)
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
        self._partition_by: Literal["auto", "element", "parameter"] = partition
        self._bucket_bytes = max(1, int(bucket_size_mb * 2**20))
        self._reduce_dtype = floating_dtype(reduce_dtype)
        self._find_unused_parameters = find_unused_parameters
        self._broadcast_buffers = broadcast_buffers
        self._overlap_gather = overlap_gather
        self._master_device = torch.device("cpu") if offload_optimizer else None
        self._buffers_due = True
        self._met = False
        self._partition: Partition | None = None
        self._ranks = Ranks(timeout)
        self.saves = Saves(self, self._ranks, tag_validation)
        """What callbacks ask about saves, and have done around them."""
        self._loads = Loads(self, self._ranks)
        self._data = TrainingData()
        self._signals: SharedSignals | None = None

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
        self._uninitialized: set[str] = set()
        self._loads.begin()
        self._data.forget()
        self._signals = None

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._ranks.device = self.root_device
        if self.root_device.type == "cpu":
            keep_freed_memory()
        self._ranks.meet()

    @override
    def setup_distributed(self) -> None:
        """Join the ranks; those that torchrun has started again in a store of their own."""
        if restarts.store_is_lent() and not dist.is_initialized():
            device = self.root_device if self.root_device.type != "cpu" else None
            restarts.init_process_group(self._get_process_group_backend(), self._timeout, device_id=device)
        super().setup_distributed()

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self._loads.require_same_start(None)
        self.accelerator.setup(trainer)
        fitting = self._is_fitting
        if fitting and self._layer_sync:
            self.model = self._layer_sync.apply(self.model)
        self._uninitialized |= materialize(self.model, self.root_device)
        require_values(self.model, self._uninitialized)
        self.precision_plugin.convert_module(self.model)
        route_clipping(self.precision_plugin, self._clip_by_norm, self._clip_by_value)
        self.model_to_device()
        self._ranks.require_same("modules", partial(module_lines, self.model))
        if self._ranks.count > 1:
            give_first_ranks_values(self.model, self._ranks)
        if fitting:
            self._data.enter()
            self._partition = None
            self._ranks.renew()
            GatherOverlap.install(trainer, wanted=self._overlap_gather)
            self.setup_optimizers(trainer)
        self._signals = SharedSignals(trainer, self._ranks.control if self.world_size > 1 else None)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)
            self._buffers_due = True
            self._ranks.require_same("optimizers or settings", self._deciding_lines)
            resume = self._data.resume
            self._partition = self._make_partition(None if resume is None else resume.state_bytes)
            if self.world_size > 1:
                for optimizer, cut in zip(self.optimizers, self._partition.cuts, strict=True):
                    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
                        continue  # Lightning makes one up where there is none
                    rank_zero_info(f"{type(optimizer).__name__} is partitioned by {cut.policy}: {cut.reason}")
        elif self._partition is not None:
            self._partition.come_to_rest()

    def _make_partition(self, state_bytes_to_load: Mapping[str, int] | None = None) -> Partition:
        assert self.model is not None
        return Partition(
            self.model,
            self.optimizers,
            self._ranks.collectives,
            stage=self.stage,
            partition=self._partition_by,
            bucket_bytes=self._bucket_bytes,
            reduce_dtype=self._reduce_dtype,
            find_unused_parameters=self._find_unused_parameters,
            before_change=self.saves.before_step,
            master_device=self._master_device,
            state_bytes_to_load=state_bytes_to_load,
        )

    @property
    @override
    def optimizers(self) -> list[Optimizer]:
        return self._optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        """Whatever is set in mid-fit is partitioned in place of what was; gradients stay, whole till the next flush."""
        DDPStrategy.optimizers.fset(self, optimizers)  # type: ignore[attr-defined]
        former, fitting = self._partition, self._is_fitting and self._trainer.state.stage is not None
        if former is None or not fitting or [one.optimizer for one in former.segmented] == list(optimizers):
            return
        former.arrivals.wait()
        gradients = former.whole_gradients()
        overlaps = former.arrivals.is_watching
        former.detach()
        former.come_to_rest()
        _optimizers_to_device(optimizers, self.root_device)
        self._partition = self._make_partition()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        if overlaps:
            self.begin_overlap()

    def _deciding_lines(self) -> list[str]:
        """What decides what the ranks send each other, a line each."""
        return [
            f"stage={self.stage}",
            f"partition={self._partition_by!r}",
            f"bucket_size_mb={self._bucket_bytes / 2**20}",
            f"reduce_dtype={self._reduce_dtype}",
            f"find_unused_parameters={self._find_unused_parameters}",
            f"broadcast_buffers={self._broadcast_buffers}",
            *optimizer_lines(self.optimizers, self._module),
        ]

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._uninitialized = materialize(self._module, self.root_device)
        if isinstance(self.precision_plugin, DoublePrecision):
            self.precision_plugin.convert_module(self._module)  # `setup` would, when fp32 has rounded what is loaded
        ours = checkpoint.source.directory if isinstance(checkpoint, LoadedCheckpoint) else None
        state_dict = self._loads.state_dict(checkpoint, self._module)

        def load() -> None:
            with nullcontext() if ours is None else fits_module(ours, module=self._module, names=state_dict):
                whole = {**checkpoint, "state_dict": state_dict}
                super(ZeroStrategy, self).load_model_state_dict(whole, strict=strict)
            self._uninitialized -= checkpoint["state_dict"].keys()
            if self._data.resume is not None:
                self._data.resume.restore_metrics(self._module)

        self._ranks.all_or_none(load)

    @override
    def on_exception(self, exception: BaseException) -> None:
        self.saves.join_quietly()
        if not self.stopped_together:
            stay_at_exit()
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        # No collectives here: after an exception this rank may be the only one to come by.
        if self._partition is not None:
            self._partition.detach()
        if self._signals is not None:
            self._signals.restore()
        unroute_clipping(self.precision_plugin)
        if self.trainer_if_any is not None:
            self._data.leave(self._trainer)
        super().teardown()
        if self._partition is not None:
            self._partition.come_to_rest()

    def begin_overlap(self) -> None:
        """From now on, let a step's gather go on until somebody calls `wait_for_parameters`, or a module needs it."""
        self._partitioned.overlap_gather()

    @property
    def _partitioned(self) -> Partition:
        if self._partition is None:
            raise UnsupportedModelError(f"nothing is partitioned; call this from the start of fit on{_IN_ITS_PROCESS}")
        return self._partition

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_partition": None, "_signals": None}

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        met, self._met = self._met, False
        if met and args == ("Trainer.save_checkpoint",):
            return  # all ranks have met in the save already
        if not self._interrupted:
            super().barrier(*args, **kwargs)
        elif self.all_ranks_are_here():
            dist.barrier(group=self._ranks.control)

    @override
    def broadcast(self, obj: _T, src: int = 0) -> _T:
        if not self._interrupted:
            return super().broadcast(obj, src)
        if not self.all_ranks_are_here():
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src=src, group=self._ranks.control)
        return objects[0]

    @property
    def _interrupted(self) -> bool:
        """An exception is under way: the other ranks may not know of it."""
        trainer = self.trainer_if_any
        return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED and self.world_size > 1

    @property
    def stopped_together(self) -> bool:
        """Whether all ranks were told to stop, and have stopped between the same two batches."""
        return self._signals is not None and self._signals.all_stopped

    def all_ranks_are_here(self) -> bool:
        """Whether the ranks can do something together: after an exception only if every rank had one at its step."""
        if not self._interrupted or self.stopped_together:
            return True
        self.saves.join_quietly()  # all ranks' savers end together, and with them this wait
        stepping = self._partition is not None and self._partition.is_stepping
        where = f"step {self._trainer.global_step}{', in its middle' if stepping else ''}"
        return self._ranks.all_are_here(where, self.wait_for_parameters)

    # --- a step ---

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self.saves.log()
        self._before_forward()
        self._partitioned.arrivals.before_forward()
        result = super().training_step(*args, **kwargs)
        self.wait_for_parameters()  # those of modules that this forward didn't call
        return result

    def wait_for_parameters(self) -> None:
        """With `overlap_gather`, return when every parameter is what the last step has made of it."""
        if self._partition is not None:
            self._partition.arrivals.wait()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if not self._interrupted:  # else the ranks may not be there; it is waited for when they are known to be
            self.wait_for_parameters()
        return super().lightning_module_state_dict()

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        if self._is_fitting:
            self._before_forward()
        return super().validation_step(*args, **kwargs)

    def _before_forward(self) -> None:
        """Give every rank the first rank's buffers, just when DDP does: not after a forward that wasn't reduced."""
        if self._broadcast_buffers and self._buffers_due:
            assert self.model is not None
            ignored = ignored_names(self.model)
            self._ranks.collectives.broadcast_all([b for name, b in self.model.named_buffers() if name not in ignored])
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
            optimizer steps on) and `.state` (its optimizer state by name). They may be written to until the next save
            or batch: what a save behind training has to copy of them is copied first.
        """
        self.saves.before_step()
        return self._partitioned.segments(optimizer)

    def full_state(self, parameter: Parameter) -> dict[str, Any]:
        """The whole fp32 `"param"` and every optimizer state of one parameter. Called on every rank."""
        self.wait_for_parameters()
        with self._ranks.reaching_all():
            return self._partitioned.full_state(parameter)

    def full_grad(self, parameter: Parameter) -> Tensor | None:
        """The whole averaged gradient of one parameter, before the step. Called on every rank.

        Returns:
            A tensor of the parameter's shape, the same on every rank; None where no rank has a gradient.
        """
        with self._ranks.reaching_all():
            return self._partitioned.full_grad(parameter)

    def grad_norm(self) -> Tensor:
        """The 2-norm of the averaged gradients of all optimizers, before the step. Called on every rank.

        Returns:
            A 0-d fp32 tensor, the same on every rank.
        """
        with self._ranks.reaching_all():
            return self._partitioned.grad_norm()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients of all optimizers by their global norm, before the step. Called on every rank.

        Returns:
            The norm before clipping, as `torch.nn.utils.clip_grad_norm_` does.
        """
        with self._ranks.reaching_all():
            return self._partitioned.clip_grad_norm_(max_norm, norm_type=norm_type)

    def memory_bytes(self) -> dict[str, float]:
        """What this rank holds, in bytes and by kind: parameters, masters, optimizer states, gradients, buckets."""
        held = self._partitioned.memory_bytes()
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self._module.parameters()}
        return {"parameters": sum(storages.values()), **held}

    # --- checkpoints ---

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's part of an optimizer's state, in the shape of torch's own: indices, and groups of indices."""
        return self._partitioned.state_dict(optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Save a directory, all ranks together. A checkpoint of weights alone doesn't become `latest`."""
        self._met = False
        if not self.all_ranks_are_here():
            warnings.warn(
                f"{filepath} is not saved: training was interrupted on rank {self.global_rank}, and a sharded "
                "checkpoint needs every rank, at the same step. `latest` still names the last one that was committed.",
                stacklevel=2,
            )
            return
        if self._interrupted and self._partition is not None and self._partition.is_stepping:
            warnings.warn(_BROKEN_OFF.format(filepath), stacklevel=2)
            return
        passing = locate(filepath).name.startswith(".")  # `lr_find` saves one, and removes it
        full = "optimizer_states" in checkpoint and self._partition is not None
        if not self.saves.writes_directories:
            self._save_by_rank_zero(checkpoint, filepath, storage_options)
            return
        try:
            self.saves.save(
                checkpoint,
                filepath,
                storage_options,
                update_latest=full and not passing,
                tag_validation="warn" if self.saves.tag_validation == "fail" else self.saves.tag_validation,
            )
        except CheckpointWriteError as error:
            if not self._interrupted:
                raise
            warnings.warn(f"while training was interrupted: {error}", stacklevel=2)
        self._met = True

    def contents(self, checkpoint: Mapping[str, Any], path: _PATH) -> tuple[RankContent, SharedContent]:
        """What this rank puts into a checkpoint, and what the ranks share. Not a collective."""
        module, partition = self._module, self._partition
        if partition is not None:
            if partition.is_stepping:
                raise CheckpointWriteError(_BROKEN_OFF.format(os.fspath(path)))
            partition.take_in_new_parameters()
            self.saves.before_step()
            partition.take_over_outside_writes()
        loops = checkpoint.get("loops", {})
        metrics = get_metric_states(module, without=finished_metrics(module, loops)) if partition else {}
        return contents(
            checkpoint,
            module,
            partition,
            rank=self._ranks.rank,
            world_size=self._ranks.count,
            stage=self.stage,
            metrics=metrics,
            loaders=self._data.where(self._trainer) if partition else (),
            logged=get_logged(self._trainer) if partition else None,
            validating=partition is not None and self._trainer.validating,
        )

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        """Remove a checkpoint, unless a callback of ours still wants it: see `Savers`.

        While a newer one is being saved, it waits for that one's commit.
        """
        if self.saves.tends_directory and self.saves.savers.let_go(filepath, OTHER):
            self.checkpoint_io.remove_checkpoint(filepath)

    def _save_by_rank_zero(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None) -> None:
        """Save as DDP does, by a `CheckpointIO` that knows no shards: put together, and written by one rank."""
        self.wait_for_parameters()
        if self._partition is not None and "optimizer_states" in checkpoint:
            if self._interrupted:
                self._partition.meet_again(self._ranks.collectives)
            self._partition.take_in_new_parameters()
            states = [self._partition.whole_state_dict(optimizer) for optimizer in self.optimizers]
            checkpoint = {**checkpoint, "optimizer_states": states}
        io = self.checkpoint_io
        self._ranks.done_by_first(partial(io.save_checkpoint, checkpoint, path, storage_options=storage_options))

    def save_zero_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | int | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        tag_validation: TagValidation | None = None,
    ) -> None:
        """Save everything under `save_dir/tag`, as DeepSpeed's `save_checkpoint` does. Called on every rank.

        Args:
            save_dir: the save directory, a path or a URL.
            tag: `global_step{N}` by default; the same on every rank. A number is taken as its digits.
            client_state: what `load_zero_checkpoint` is to give back: plain values and tensors.
            tag_validation: where the ranks give different tags, `"fail"`, or take the first rank's, and `"warn"` of
                it, or `"ignore"` it; the strategy's own by default.
            save_latest: let `latest` name the tag; weights alone, as there are before a fit, it never names.
            exclude_frozen_parameters: leave out what isn't trained; such a checkpoint is loaded with
                `load_module_strict=False`.

        Raises:
            TagMismatchError: the ranks gave different tags.
            CheckpointWriteError: a rank could not write its part, or didn't call this at all; nothing has changed.
        """
        if tag_validation is not None:
            _require_tag_validation(tag_validation)
        trainer = self._trainer
        tag = f"global_step{trainer.global_step}" if tag is None else _as_tag(tag)

        def dump() -> dict[str, Any]:
            validate_tag(tag)
            if client_state is not None and not isinstance(client_state, Mapping):
                raise TypeError(f"client_state must be a dict, not {client_state!r:.80}")
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            checkpoint[CLIENT_STATE] = dict(client_state or {})
            if exclude_frozen_parameters:
                parameters = trainer.lightning_module.named_parameters(remove_duplicate=False)
                frozen = {name for name, p in parameters if not p.requires_grad}
                checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
            return checkpoint

        self.saves.save(
            dump,
            str(locate(save_dir) / str(tag)),
            update_latest=save_latest and self._partition is not None,
            io=self.saves.sharded_io,
            tag_validation=tag_validation,
        )

    def load_zero_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | int | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[[dict[str, Any], Module], object] | None = None,
        *,
        weights_only: bool | None = None,
    ) -> tuple[str | None, dict[str, Any]]:
        """Load into the live module, optimizers and schedulers, as DeepSpeed's does. Called on every rank.

        Args:
            load_dir: the save directory, or one tag's.
            tag: by default the one that `latest` names.
            load_module_strict: if False, names that only one side has are warned of and passed over.
            load_optimizer_states: the optimizers' states and hyper-parameters too.
            load_lr_scheduler_states: the schedulers' too.
            load_module_only: neither of both; so it can be called without a fit, in a validation, say.
            custom_load_fn: called with the state dict and the module, instead of `module.load_state_dict`.
            weights_only: False to load a client state with objects of any class: it runs what the file says.

        Returns:
            The tag's directory, and the client state that was saved with it; `(None, {})`, with a warning, where
            there is no checkpoint.

        Raises:
            TagMismatchError: the ranks gave different tags, or other arguments.
            CheckpointNotFoundError: the tag that was asked for isn't there, or no tag is sound.
            CheckpointMismatchError: the checkpoint doesn't fit the module or its optimizers.
        """
        module = self._trainer.lightning_module
        self.wait_for_parameters()  # what arrived later would take the place of what was loaded
        tag = None if tag is None else _as_tag(tag)
        options = {
            "load_module_strict": load_module_strict,
            "load_optimizer_states": load_optimizer_states,
            "load_lr_scheduler_states": load_lr_scheduler_states,
            "load_module_only": load_module_only,
            "custom_load_fn": custom_load_fn is not None,
            "weights_only": weights_only,
        }
        self._loads.require_same(options | ({"tag": tag} if self.saves.tag_validation == "fail" else {}))
        choice = self._loads.choose(load_dir, tag)
        if choice is None:
            rank_zero_warn(f"there is no checkpoint in {load_dir}: nothing is loaded{advice(locate(load_dir))}")
            return None, {}

        partition = self._partition if load_module_only else self._partitioned  # without a fit there is none
        checkpoint = self._ranks.all_or_none(partial(self._loads.read, choice, weights_only))
        state_dict = {} if custom_load_fn is not None else self._loads.state_dict(checkpoint, module)

        def load() -> dict[str, Any]:
            weights: Mapping[str, Any] = checkpoint["state_dict"]
            if custom_load_fn is not None:
                custom_load_fn(checkpoint["state_dict"], module)
            else:
                load_module(module, state_dict, choice.path, strict=load_module_strict)
                if not load_module_only:
                    weights = load_averages(self._trainer, module, checkpoint, strict=load_module_strict)
            if partition is not None:
                partition.load_masters(weights, in_part=custom_load_fn is not None)
            if load_optimizer_states and not load_module_only:
                restore_optimizer_states(checkpoint, module, self.optimizers, self._partitioned)
            if load_lr_scheduler_states and not load_module_only:
                for config, state in zip(self.lr_scheduler_configs, checkpoint.get("lr_schedulers", ()), strict=False):
                    config.scheduler.load_state_dict(state)
            client_state: dict[str, Any] = checkpoint.get(CLIENT_STATE, {})
            return client_state

        return choice.path, self._ranks.all_or_none(load)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint directory, or a plain file; every rank the one that rank 0 has chosen."""
        self.saves.join()
        self._loads.require_same_start(checkpoint_path)
        choice = self._loads.choose(checkpoint_path, required=True)
        if choice is not None and choice.path != str(checkpoint_path):
            rank_zero_info(f"of {checkpoint_path}, {choice.path} is loaded")

        def load() -> dict[str, Any]:
            if choice is None:
                return self.checkpoint_io.load_checkpoint(os.fspath(checkpoint_path), **weights_option(weights_only))
            checkpoint = self._loads.read(choice, weights_only)
            if self._is_fitting and isinstance(checkpoint, LoadedCheckpoint):
                self._data.resume = Resume(
                    checkpoint,
                    rank=self._ranks.rank,
                    world_size=self._ranks.count,
                    by_steps=self._trainer.max_steps != -1,
                    weights_only=weights_only is not False,
                )
            return checkpoint

        self._data.resume = None
        return self._ranks.all_or_none(load)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of the optimizer states and masters, whoever saved them: ZeRO or DDP."""

        def load() -> None:
            self._partitioned.load_masters(checkpoint["state_dict"])
            restore_optimizer_states(checkpoint, self._module, self.optimizers, self._partitioned)

        self._ranks.all_or_none(load)
        self._data.load_states(self._trainer)  # Lightning calls no other hook between its loops' states and a batch

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Called when a loader is there and its iterator isn't."""
        self._data.note(dataloader, self._trainer)
        return super().process_dataloader(dataloader)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Step; and after the first, when the optimizers have their states, get memory for saves behind training."""
        result = super().optimizer_step(*args, **kwargs)
        self.saves.after_step()
        return result

    def snapshot_bytes(self) -> int:
        """About how much this rank's part of a checkpoint takes in memory, when the optimizers have their states."""
        assert self.model is not None
        frozen = sum(p.nbytes for p in self.model.parameters() if not p.requires_grad)
        buffers = sum(buffer.nbytes for buffer in self.model.buffers())
        owned, tensors = self._partitioned.owned_bytes()
        nbytes = owned + frozen // self.world_size + (buffers if self.is_global_zero else 0) + 128 * tensors
        return int(1.01 * nbytes) + 2**20

    @override
    def on_train_end(self) -> None:
        """Wait for the last commit: what failed is raised before fit says that all went well."""
        super().on_train_end()
        self.saves.wait()
        if self._signals is not None:
            self._signals.act_at_the_end()

    @override
    def on_train_start(self) -> None:
        """Called when the iterators are there."""
        super().on_train_start()
        self._partitioned.release_state_memory()
        self._partitioned.reducer.let_others_hooks_go_first()  # Lightning's hooks are where users add them
        if self._signals is not None:
            self._signals.watch_interrupts()
        self.saves.begin_fit()
        self._data.start(self._trainer)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._data.start_batch(self._trainer)

    @property
    def trainer_if_any(self) -> Trainer | None:
        """Whose strategy this is, once a module is attached."""
        return self.lightning_module._trainer if self.lightning_module is not None else None

    @property
    def _is_fitting(self) -> bool:
        return self.trainer_if_any is not None and self.trainer_if_any.state.fn == TrainerFn.FITTING

    @property
    def _trainer(self) -> Trainer:
        if self.trainer_if_any is None:
            raise UnsupportedModelError(
                f"no module is attached to the strategy; call this during fit, or after it{_IN_ITS_PROCESS}"
            )
        return self.trainer_if_any

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None  # Lightning connects it before it calls anything else
        return self.lightning_module


def _require_tag_validation(value: object) -> None:
    if value not in get_args(TagValidation):
        raise ValueError(f"tag_validation must be one of {get_args(TagValidation)}, not {value!r}")


def _as_tag(tag: str | int) -> str:
    """DeepSpeed makes a string of it, and its users give it numbers."""
    return str(tag) if isinstance(tag, int) else tag
