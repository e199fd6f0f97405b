"""What users write when they make a strategy: dtypes by name, and arguments that only other strategies have."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

_IN_ANY_CASE = {
    "gradients have their buckets here in any case": ("gradient_as_bucket_view", "contiguous_gradients"),
    "gradients are reduced while backward goes on in any case": ("overlap_comm", "backward_prefetch"),
    "every rank begins with the first one's parameters in any case": ("init_sync", "sync_module_states"),
    "checkpoints are sharded in any case, and lightning-zero export makes one file of them": (
        "state_dict_type",
        "save_distributed_checkpoint",
    ),
    "nothing here depends on it; leave it out": (
        "static_graph",
        "skip_all_reduce_unused_params",
        "delay_all_reduce_named_params",
        "allgather_partitions",
        "reduce_scatter",
        "logging_batch_size_per_gpu",
        "logging_level",
    ),
}
_BY_OTHER_MEANS = {
    "it is called bucket_size_mb here": ("bucket_cap_mb",),
    "bucket_size_mb says how many MiB travel as one message": ("allgather_bucket_size", "reduce_bucket_size"),
    "gradients can travel in another dtype by reduce_dtype": ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper"),
    "Trainer(devices=...) says that": ("device_ids",),
    "what DeepSpeed's JSON holds are arguments of the Trainer and of ZeroStrategy here": ("config",),
    "stage says how far": ("zero_optimization",),
    "any optimizer can be cut; partition says how": ("zero_allow_untested_optimizer",),
    "ckpt_path takes a plain checkpoint too": ("load_full_weights",),
    "save_zero_checkpoint and the exports take it": ("exclude_frozen_parameters",),
    "Trainer(precision=...) says that, and reduce_dtype in what gradients travel": ("mixed_precision",),
    "Trainer(precision='16-mixed') scales the loss; plugins=[MixedPrecision(...)] takes a GradScaler of your own": (
        "loss_scale",
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "min_loss_scale",
    ),
    "recompute activations by torch.utils.checkpoint, or by apply_activation_checkpointing in configure_model": (
        "activation_checkpointing",
        "activation_checkpointing_policy",
        "partition_activations",
        "cpu_checkpointing",
        "contiguous_memory_optimization",
        "synchronize_checkpoint_boundary",
    ),
}
_BY_OTHER_STRATEGIES = {
    "post-local SGD keeps a whole optimizer on every rank; use DDPStrategy for it": ("model_averaging_period",),
    "stage=2 is nearest to SHARD_GRAD_OP; use FSDPStrategy for FULL_SHARD": ("sharding_strategy",),
    "the optimizer is shared out over all ranks; use FSDPStrategy for HYBRID_SHARD": ("device_mesh",),
    "parameters stay whole; leave it out, or use FSDPStrategy where they no longer fit": (
        "auto_wrap_policy",
        "ignored_modules",
        "use_orig_params",
        "limit_all_gathers",
        "forward_prefetch",
        "data_parallel_size",
        "tensor_parallel_size",
    ),
    "offload_optimizer=True keeps the optimizer in host memory, and nothing else; use FSDPStrategy(cpu_offload=True)": (
        "cpu_offload",
        "remote_device",
        "offload_optimizer_device",
        "offload_parameters",
        "offload_params_device",
        "nvme_path",
        "pin_memory",
        "params_buffer_count",
        "params_buffer_size",
        "max_in_cpu",
        "optimizer_buffer_count",
        "block_size",
        "queue_depth",
        "single_submit",
        "overlap_events",
        "thread_count",
        "sub_group_size",
    ),
}

_ELSEWHERE = {
    name: instead
    for hints in (_IN_ANY_CASE, _BY_OTHER_MEANS, _BY_OTHER_STRATEGIES)
    for instead, names in hints.items()
    for name in names
}
"""What users of other strategies pass, and what they find here instead."""


def refuse_unknown(unknown: Mapping[str, Any], valid: Iterable[str]) -> None:
    """Say what to write instead of an argument that isn't known.

    Raises:
        TypeError: there is one.
    """
    valid = list(valid)
    hints = []
    for name in unknown:
        close = difflib.get_close_matches(name, valid, n=1)
        instead = _ELSEWHERE.get(name) or (f"did you mean {close[0]!r}?" if close else None)
        hints.append(f"{name!r}" + (f" ({instead})" if instead else ""))
    if hints:
        raise TypeError(f"ZeroStrategy has no argument {', '.join(hints)}; it takes {', '.join(valid)}")


def require_instance(name: str, value: object, kind: type) -> None:
    """Make sure that a plugin is one, and neither its name nor its class: it may be hours until it is used.

    Raises:
        TypeError: it isn't, nor None.
    """
    if value is not None and not isinstance(value, kind):
        call = f"; did you mean {value.__name__}()?" if isinstance(value, type) else ""
        raise TypeError(f"{name} must be an instance of {kind.__name__}, not {value!r}{call}")


def require_bool(name: str, value: object) -> None:
    """Make sure that a switch is one: what isn't, such as DeepSpeed's `{"device": "none"}`, would switch it on.

    Raises:
        TypeError: it isn't.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def require_count(name: str, value: object) -> None:
    """Make sure that it is a number of things, or None. True isn't: `keep_last=True` would keep one of all tags.

    Raises:
        ValueError: it isn't.
    """
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name} must be a whole number from 1 on, or None, not {value!r}")


_REDUCIBLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What backends add up."""


def floating_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by its name.

    Raises:
        ValueError: it isn't one that gradients can be added up in.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if name is not None and dtype not in _REDUCIBLE:
        names = ", ".join(f'"{str(known).removeprefix("torch.")}"' for known in _REDUCIBLE)
        raise ValueError(f"reduce_dtype must be one of {names}, or None, not {name!r}")
    return dtype
