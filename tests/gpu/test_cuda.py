"""The same on a GPU: one rank on NCCL, and two that share it over gloo."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import DDPStrategy

from lightning_zero import Fp32Export, ZeroCheckpoint, ZeroStrategy
from lightning_zero.checkpoint.content import RankContent, TensorToSave
from lightning_zero.checkpoint.snapshot import Snapshot
from tests.launch import run_ranks
from tests.models import quiet_trainer
from tests.plugin.parity import ROUNDED, Plain, assert_same_modules

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HALF = {"rtol": 1e-3, "atol": 1e-4}


def fused(params, lr):
    return torch.optim.AdamW(params, lr=lr, fused=True)


def fit(make, strategy, callbacks=(), ckpt_path=None, **options):
    seed_everything(3, verbose=False)
    model = make()
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    shared = [torch.device("cuda", 0)] * world_size
    trainer = quiet_trainer(
        strategy(parallel_devices=shared, process_group_backend="nccl" if world_size == 1 else "gloo"),
        world_size=world_size,
        callbacks=list(callbacks),
        **{"accelerator": "auto", "devices": "auto", "max_epochs": 2, **options},
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    return model, trainer


def ddp(**options):
    return DDPStrategy(**options)


def parity(kind, options, tolerance):
    make = lambda: Plain(kind)  # noqa: E731
    theirs, _ = fit(make, ddp, **copy.deepcopy(options))
    for stage in (1, 2):
        ours, trainer = fit(make, lambda stage=stage, **more: ZeroStrategy(stage=stage, **more), **options)
        assert trainer.strategy.root_device.type == "cuda"
        assert_same_modules(ours, theirs, tolerance)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        (torch.optim.AdamW, {}, ROUNDED),
        (fused, {}, ROUNDED),
        (torch.optim.SGD, {"gradient_clip_val": 0.1}, ROUNDED),
        (torch.optim.SGD, {"accumulate_grad_batches": 3}, ROUNDED),
        (torch.optim.AdamW, {"precision": "16-mixed"}, HALF),
        (fused, {"precision": "16-mixed"}, HALF),
        (torch.optim.AdamW, {"precision": "bf16-mixed"}, HALF),
    ],
    ids=["adamw", "fused", "clipped", "accumulated", "16-mixed", "fused 16-mixed", "bf16-mixed"],
)
def test_a_fit_on_cuda_equals_ddps(world_size, kind, options, tolerance):
    run_ranks(parity, world_size, kind, options, tolerance, process_group=False)


class InHostMemory(Callback):
    def on_train_batch_end(self, trainer, *args):
        for segment in trainer.strategy.segments(trainer.optimizers[0]):
            assert segment.master.is_cpu
            assert segment.state
            assert all(value.is_cpu for value in segment.state.values())


def offload(**options):
    return ZeroStrategy(offload_optimizer=True, **options)


def offloaded(precision, clip):
    options = {"precision": precision, "gradient_clip_val": clip}
    theirs, _ = fit(lambda: Plain(fused), ZeroStrategy, **options)
    ours, _ = fit(lambda: Plain(fused), offload, [InHostMemory()], **options)
    assert_same_modules(ours, theirs, HALF)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-mixed"])
def test_an_offloaded_optimizer_trains_alike_in_host_memory(world_size, precision):
    clip = None if precision == "16-mixed" else 0.1  # a fused optimizer unscales by itself
    run_ranks(offloaded, world_size, precision, clip, process_group=False)


class Wide(Plain):
    def __init__(self):
        super().__init__(fused)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 1 << 20), torch.nn.Linear(1 << 20, 8))


class MostMemory(Callback):
    """The most that is allocated on the GPU between two steps."""

    nbytes = 0

    def on_train_batch_end(self, *args):
        self.nbytes = max(self.nbytes, torch.cuda.memory_allocated())


def leaves_memory():
    looks = MostMemory(), MostMemory()
    for strategy, look in zip((ZeroStrategy, offload), looks, strict=True):
        model, _ = fit(Wide, strategy, [look], max_steps=3)
    states = 8 * sum(p.numel() for p in model.parameters())  # AdamW's two
    assert looks[0].nbytes - looks[1].nbytes > 0.9 * states


def test_an_offloaded_optimizer_leaves_its_memory_on_the_gpu_free():
    run_ranks(leaves_memory, 1, process_group=False)


def compiled():
    whole = lambda: torch.compile(Plain())  # noqa: E731
    theirs, _ = fit(whole, ddp)
    ours, _ = fit(whole, ZeroStrategy)
    assert_same_modules(ours._orig_mod, theirs._orig_mod, ROUNDED)


def test_a_compiled_module_on_cuda_equals_ddps():
    run_ranks(compiled, 1, process_group=False, timeout_seconds=300)


def resumed(directory, precision, kind, async_save):
    make = lambda: Plain(kind)  # noqa: E731
    whole, _ = fit(make, ZeroStrategy, precision=precision)
    epoch = 16 // dist.get_world_size()
    saving = ZeroCheckpoint(directory, every_n_train_steps=epoch // 2, async_save=async_save)
    callbacks = [saving, Fp32Export(directory / "model.ckpt")]
    fit(make, ZeroStrategy, callbacks, max_steps=epoch, precision=precision)
    half, _ = fit(make, ZeroStrategy, ckpt_path=directory, precision=precision)
    half.losses = whole.losses
    assert_same_modules(half, whole)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("precision", "kind", "async_save"),
    [
        ("32-true", torch.optim.AdamW, False),
        ("32-true", fused, True),  # whose states' steps are on the GPU
        ("bf16-true", torch.optim.AdamW, True),
        ("bf16-true", fused, False),
        ("16-mixed", torch.optim.AdamW, True),
    ],
    ids=["fp32", "fp32 fused behind", "bf16 behind", "bf16 fused", "16-mixed behind"],
)
def test_a_run_on_cuda_is_saved_exported_and_resumed_bit_for_bit(tmp_path, world_size, precision, kind, async_save):
    run_ranks(resumed, world_size, tmp_path, precision, kind, async_save, process_group=False)


def test_a_snapshot_is_pinned_until_it_is_released():
    snapshot = Snapshot()
    values = torch.arange(3 << 18, dtype=torch.float32, device="cuda")
    content = RankContent([TensorToSave("model", "values", 0, len(values), values)], [], b"", 0)
    copy = snapshot.take(content).tensors[0].tensor
    snapshot.wait()
    assert copy.is_pinned()
    assert torch.equal(copy, values.cpu())
    snapshot.release()
    assert not copy.is_pinned()
