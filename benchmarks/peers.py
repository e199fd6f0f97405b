"""The peers that no Trainer drives on CPUs, each in a plain loop: the same module, optimizer and data, step for step.

| peer | how it is set up |
|---|---|
| FSDP2 | `fully_shard` on every block, and on the root; checkpoints by `torch.distributed.checkpoint` (DCP) |
| DeepSpeed | `deepspeed.initialize` with torch's AdamW as the client's optimizer; no compiled operator, no clipping |

A step is a whole optimizer step over its micro-batches, as each of them accumulates by its own means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.gpt import GPT


class Steps(Protocol):
    """Whatever can be trained in a plain loop."""

    def step(self, batches: Sequence[Tensor]) -> None:
        """One optimizer step over micro-batches."""


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the optimizer's states on this rank."""
    found = 0
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                local = value.to_local() if hasattr(value, "to_local") else value
                found += local.nbytes
    return found


class ForwardAndBackward:
    """No optimizer and no traffic: what no contestant can be faster than."""

    def __init__(self, module: GPT) -> None:
        self.module = module

    def step(self, batches: Sequence[Tensor]) -> None:
        for batch in batches:
            (self.module(batch) / len(batches)).backward()
        self.module.zero_grad()


class Fsdp2:
    """Parameters, gradients and optimizer states cut along dimension 0.

    With `reshard=False`, the parameters stay whole between forward and backward, and gradients are reduced at the last
    micro-batch, as DDP's are under `no_sync`; with `reshard=True`, parameters are gathered again for backward, and
    gradients are reduced at every micro-batch, so that only this rank's part of them accumulates.
    """

    def __init__(self, module: GPT, *, reshard: bool) -> None:
        self.reshard = reshard
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in module.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        self.module: Any = fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
        self.optimizer = module.configure_optimizers()
        self._saving: Any = None

    def step(self, batches: Sequence[Tensor]) -> None:
        for number, batch in enumerate(batches):
            if not self.reshard:
                self.module.set_requires_gradient_sync(number == len(batches) - 1)
            (self.module(batch) / len(batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.module, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, path: Path) -> None:
        state_dict_saver.save(self._state(), checkpoint_id=path)

    def async_save(self, path: Path, done: Callable[[], None]) -> None:
        """`done` is called when the checkpoint is complete on disk."""
        if self._saving is None:
            self._saving = dist.new_group(backend="gloo")  # it hangs when it shares the training's
        future: Any = state_dict_saver.async_save(self._state(), checkpoint_id=path, process_group=self._saving)
        future = getattr(future, "upload_completion", future)
        future.add_done_callback(lambda _: done())

    def load(self, path: Path) -> None:
        state = self._state()
        state_dict_loader.load(state, checkpoint_id=path)
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )


class DeepSpeed:
    """Stages 1 to 3 of DeepSpeed's own ZeRO, in fp32."""

    TAG = "tag"

    def __init__(self, module: GPT, *, stage: int, accumulate: int = 1, rows: int = 1) -> None:
        import deepspeed

        for operator in deepspeed.ops.__compatible_ops__:
            deepspeed.ops.__compatible_ops__[operator] = False  # else it compiles its own all-reduce at the start
        config = {
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": accumulate,
            "gradient_clipping": 0.0,  # 1.0 by default
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        self.engine: Any
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=module.configure_optimizers(), config=config
        )

    def step(self, batches: Sequence[Tensor]) -> None:
        for batch in batches:
            self.engine.backward(self.engine(batch))
            self.engine.step()

    def save(self, path: Path) -> None:
        self.engine.save_checkpoint(path, tag=self.TAG)

    def load(self, path: Path) -> None:
        loaded, _ = self.engine.load_checkpoint(path, tag=self.TAG)
        if loaded is None:
            raise FileNotFoundError(f"DeepSpeed found no checkpoint in {path}")
