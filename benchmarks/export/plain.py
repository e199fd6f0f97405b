"""Our exports beside a plain loop that reads and writes the same bytes: does time, or memory, grow with the model?

Two ranks save checkpoints of each size: one of a model alone, and one of a training with AdamW's moments. Then each
kind of export runs in a fresh process, and before each the plain loop: `read` into a warm buffer of 4 MiB, `write`,
and one `fsync`, of the same bytes. The checkpoint is in the page cache for both. Peak memory is the whole
process's. Every export of the first round is read back and compared, element by element.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.export.conversions import into_page_cache
from benchmarks.ranks import WORLD_SIZE, Figures, run_ranks

if TYPE_CHECKING:
    import torch

# The output's name, the arguments, the checkpoint, bytes written for each that is read
EXPORTS: dict[str, tuple[str, dict[str, Any], str, float]] = {
    ".ckpt": ("model.ckpt", {}, "model", 1.0),
    ".safetensors": ("model.safetensors", {}, "model", 1.0),
    'max_shard_size="500MB"': ("folder", {"max_shard_size": "500MB"}, "model", 1.0),
    ".ckpt, with_optimizer": ("training.ckpt", {"with_optimizer": True}, "training", 1.0),
    ".safetensors, bf16": ("bf16.safetensors", {"dtype": "bf16"}, "model", 0.5),
}
WIDTH = 4096
BUFFER_BYTES = 4 << 20
STATES = ("exp_avg", "exp_avg_sq")


# ------------------------------------------------------------------------------------------- checkpoints


def shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    layers = max(1, round(parameters / WIDTH**2))
    return {
        name: shape
        for layer in range(layers)
        for name, shape in ((f"layers.{layer}.weight", (WIDTH, WIDTH)), (f"layers.{layer}.bias", (WIDTH,)))
    }


def values(name: str, of: str, start: int, stop: int) -> torch.Tensor:
    """What is stored: the same in whatever pieces it is asked for, and different everywhere."""
    import torch

    seed = sum(map(ord, f"{name}/{of}")) * 7919
    return (torch.arange(start, stop, dtype=torch.int64) * 2654435761 + seed).bitwise_and_(0xFFFFFF).float().sub_(2**23)


def make(directory: Path, kind: str, gigabytes: float) -> None:
    """One rank of a save."""
    import torch
    import torch.distributed as dist

    from lightning_zero.checkpoint.content import RankContent, SharedContent, TensorToSave
    from lightning_zero.checkpoint.manifest import Entry, OptimizerEntry
    from lightning_zero.checkpoint.save import save_checkpoint
    from lightning_zero.segments import ParameterSpec, plan_buckets

    dist.init_process_group("gloo")
    states = STATES if kind == "training" else ()
    sizes = shapes(gigabytes * 1e9 / 4 / (1 + len(states)))
    tensors = []
    for bucket in plan_buckets([ParameterSpec(n, s, 4) for n, s in sizes.items()], WORLD_SIZE, "element", 25 << 20):
        for segment, _ in bucket.owned(dist.get_rank()):
            place = segment.name, segment.start, segment.stop
            tensors.append(TensorToSave("model", *place, values(segment.name, "model", segment.start, segment.stop)))
            for state in states:
                part = values(segment.name, state, segment.start, segment.stop)
                tensors.append(TensorToSave("optimizer", *place, part, 0, state))
    if dist.get_rank() == 0:
        tensors.append(TensorToSave("model", "counter", 0, 1, torch.tensor([2**40 + 1])))
    entries = [Entry(name, shape, "bfloat16", "parameter") for name, shape in sizes.items()]
    entries.append(Entry("counter", (1,), "int64", "buffer"))
    group = {"lr": 1e-3, "params": list(range(len(sizes)))}
    trainer = {
        "epoch": 0,
        "global_step": 1,
        "pytorch-lightning_version": "2.6.0",
        "optimizer_states": [{"state": {}, "param_groups": [group]}],
    }
    aliases = {"tied.weight": "layers.0.weight"}
    shared = SharedContent(0, 2, entries, aliases, [OptimizerEntry("AdamW", (tuple(sizes),))], trainer)
    save_checkpoint(directory / kind, RankContent(tensors, [], b"", 1), shared, group=dist.group.WORLD)
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- contestants


def export(directory: Path, name: str) -> Figures:
    from benchmarks.memory import peak_mib
    from lightning_zero.checkpoint.export import convert_zero_checkpoint_to_fp32_state_dict

    file, arguments, kind, _ = EXPORTS[name]
    began = time.perf_counter()
    convert_zero_checkpoint_to_fp32_state_dict(directory / kind, directory / "out" / file, **arguments)
    return {"seconds": time.perf_counter() - began, "peak_mib": peak_mib()}


def plain(directory: Path, kind: str, written: float) -> Figures:
    buffer = memoryview(bytearray(BUFFER_BYTES))
    began = time.perf_counter()
    with open(directory / "out" / "plain", "xb", buffering=0) as out:
        for shard in sorted((directory / kind).glob("*.safetensors")):
            with open(shard, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    out.write(buffer[: int(count * written)])
        os.fsync(out.fileno())
    return {"seconds": time.perf_counter() - began}


def check(directory: Path, name: str) -> None:
    """Read an export back, and compare every element."""
    import torch
    from safetensors.torch import load_file

    file, arguments, *_ = EXPORTS[name]
    path = directory / "out" / file

    def same(found: torch.Tensor, tensor_name: str, of: str = "model") -> bool:
        """Row by row."""
        rows = found if found.dim() == 2 else found[None]
        return all(
            torch.equal(row, values(tensor_name, of, i * len(row), (i + 1) * len(row)).to(row.dtype))
            for i, row in enumerate(rows)
        )

    if path.suffix == ".ckpt":
        loaded = torch.load(path, weights_only=True, mmap=True)
        tensors = loaded["state_dict"]
        assert tensors["tied.weight"].data_ptr() == tensors["layers.0.weight"].data_ptr()
        del tensors["tied.weight"]
        if arguments:
            (optimizer,) = loaded["optimizer_states"]
            parameters = [name for name in tensors if name != "counter"]
            for number, parameter in enumerate(parameters):
                assert all(same(optimizer["state"][number][state], parameter, state) for state in STATES)
    else:
        tensors = {}
        for part in path.glob("*.safetensors") if path.is_dir() else [path]:
            tensors |= load_file(part)
    assert tensors.pop("counter").tolist() == [2**40 + 1]
    expected = shapes(sum(t.numel() for n, t in tensors.items() if n.endswith("weight")))
    assert tensors.keys() == expected.keys()
    assert all(same(tensor, tensor_name) for tensor_name, tensor in tensors.items()), name


def fresh(directory: Path, action: str, name: str) -> Figures:
    """Run in a process of its own."""
    line = [sys.executable, "-m", "benchmarks.export.plain", action, name, "--directory", str(directory)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    result: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(gigabytes: float, rounds: int, directory: Path) -> dict[str, Figures]:
    """Every export of one size of checkpoint, and the plain loop beside it."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "out").mkdir(parents=True)
    for kind in ("model", "training"):
        run_ranks("benchmarks.export.plain", "make", kind, "--gigabytes", gigabytes, "--directory", directory)
    found: dict[str, list[Figures]] = {name: [] for name in EXPORTS}
    for number in range(rounds):
        for name, (file, _, kind, _) in EXPORTS.items():
            into_page_cache(directory / kind)
            beside = fresh(directory, "plain", name)
            (directory / "out" / "plain").unlink()
            os.sync()
            found[name].append({**fresh(directory, "export", name), "plain_seconds": beside["seconds"]})
            if number == 0:
                check(directory, name)
            output = directory / "out" / file
            shutil.rmtree(output) if output.is_dir() else output.unlink()
            os.sync()
            print(f"{gigabytes:g} GB, round {number}: {name}: {found[name][-1]}", file=sys.stderr)
    shutil.rmtree(directory)
    return {
        name: {
            "ratio": statistics.median(each["seconds"] / each["plain_seconds"] for each in each_round),
            "seconds": statistics.median(each["seconds"] for each in each_round),
            "peak_mib": max(each["peak_mib"] for each in each_round),
            "rounds": each_round,
        }
        for name, each_round in found.items()
    }


def table(results: dict[str, dict[str, Figures]]) -> str:
    """As Markdown; results by gigabytes."""
    lines = ["| checkpoint | export | time, plain = 1 | time, s | peak memory, MiB |"]
    lines.append("|---|---|---|---|---|")
    for gigabytes, exports in results.items():
        for name, found in exports.items():
            ratio, seconds, memory = found["ratio"], found["seconds"], found["peak_mib"]
            lines.append(f"| {gigabytes} GB | `{name}` | {ratio:.2f} | {seconds:.2f} | {memory:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """One process's part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "export", "plain"))
    parser.add_argument("name")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=1)
    arguments = parser.parse_args(argv)
    if arguments.action == "make":
        make(arguments.directory, arguments.name, arguments.gigabytes)
        print("{}")
    elif arguments.action == "export":
        print(json.dumps(export(arguments.directory, arguments.name)))
    else:
        kind, written = EXPORTS[arguments.name][2:]
        print(json.dumps(plain(arguments.directory, kind, written)))


if __name__ == "__main__":
    main()
