"""Partitions, manifests and resume plans of models that nobody has the memory for, on ranks that nobody has.

    python -m benchmarks.scale [--quick] [--rounds 3] [--json FILE]

Everything but the tensors is real: the library plans the partition, lists what each rank would write, gathers, writes,
reads and checks the manifest, and finds for one rank what it has to read, from empty shard files of the right length.
One process plays one rank at a time. Each figure is measured in a child of its own, forked from a parent that has
imported the library and nothing else: its time is the median over the rounds (the table has the processor's), its
memory the most that the child had above what it was born with (VmHWM).
"""

import argparse
import gc
import json
import os
import pickle
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.scale.models import MODELS
from lightning_zero.checkpoint import finish
from lightning_zero.checkpoint.content import SharedContent
from lightning_zero.checkpoint.load import Checkpoint, as_tensor
from lightning_zero.checkpoint.manifest import Entry, FileEntry, Manifest, OptimizerEntry, StoredTensor, TrainerFile
from lightning_zero.checkpoint.plan import Plan
from lightning_zero.checkpoint.report import Written
from lightning_zero.checkpoint.shards import Item, safetensors_header, shard_name
from lightning_zero.segments import Bucket, Segment, plan_buckets

RANKS = (8, 64, 256, 1024, 4096)
BUCKET_BYTES = 25 << 20
STATES = ("exp_avg", "exp_avg_sq")
RANK_STATE_BYTES = 12_000
RANK = 3  # the one that is played, where one stands for all
STEP = 1000


def stopwatch() -> Callable[[], dict[str, float]]:
    """By the clock, and of the processor: where others use it too, the second says more."""
    began, cpu_began = time.perf_counter(), time.process_time()
    return lambda: {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu_began}


# ------------------------------------------------------------------------------------------- what a rank does


def partition(model: str, world_size: int, **options: int) -> list[Bucket]:
    """As `engine.partition.Partition` has it: backward reaches the last parameters first."""
    return plan_buckets(
        list(reversed(MODELS[model])), world_size, "element", BUCKET_BYTES, equal_shards=True, **options
    )


def segments_of(buckets: Sequence[Bucket], rank: int) -> list[Segment]:
    return [segment for bucket in buckets for segment, _ in bucket.owned(rank)]


def written(segments: list[Segment], rank: int, world_size: int) -> Written:
    """What `shards.write_shard` reports of a rank with AdamW, without writing a byte."""
    items = [Item("model", s.name, s.start, s.stop, "F32", (s.numel,), list) for s in segments]
    for s in segments:
        place = s.name, s.start, s.stop, "F32"
        items.append(Item("optimizer", *place, (), list, 0, "step"))
        items += [Item("optimizer", *place, (s.numel,), list, 0, state) for state in STATES]
    items.append(Item("rank", "state", 0, RANK_STATE_BYTES, "U8", (RANK_STATE_BYTES,), list))
    about = {"rank": str(rank), "step": str(STEP), "save_id": "0" * 16}
    header = safetensors_header(about, ((i.key, i.dtype, i.shape, i.nbytes) for i in items), 4096)
    tensors, offset = [], len(header)
    for i in items:
        checksum = os.urandom(8).hex()
        tensors.append(
            StoredTensor(
                i.kind, i.name, i.start, i.stop, i.dtype, i.shape, offset, i.nbytes, checksum, i.optimizer, i.state
            )
        )
        offset += i.nbytes
    name = shard_name(rank, world_size)
    digest = os.urandom(8).hex()
    file = FileEntry(name, rank, STEP, False, offset, len(header), digest, tuple(tensors), ())
    trainer = TrainerFile("trainer.pt", 1000, "0" * 16) if rank == 0 else None
    return Written((file,), trainer, offset, 1.0, 1.0)


def shared(model: str) -> SharedContent:
    names = tuple(parameter.name for parameter in MODELS[model])
    entries = [Entry(parameter.name, parameter.shape, "bfloat16", "parameter") for parameter in MODELS[model]]
    return SharedContent(0, 2, entries, {}, [OptimizerEntry("AdamW", (names,))], {})


def manifest_of(model: str, reports: list[Written], directory: Path) -> tuple[Manifest, bytes]:
    plan = Plan(directory, directory, "0" * 16, STEP, 0, len(reports), None, None)
    return finish._manifest(plan, reports, shared(model))


# ----------------------------------------------------------------------------------------- what is measured


def plan_partition(model: str, world_size: int, directory: Path) -> dict[str, float]:
    buckets = partition(model, world_size)
    return {"segments": len(segments_of(buckets, RANK)), "buckets": len(buckets)}


def report(model: str, world_size: int, directory: Path) -> dict[str, float]:
    segments, took = segments_of(partition(model, world_size), RANK), stopwatch()
    sent = pickle.dumps(written(segments, RANK, world_size))
    return {**took(), "bytes": len(sent)}


def commit(model: str, world_size: int, directory: Path) -> dict[str, float]:
    """Rank 0's part: what it gathers becomes a manifest that has been read again as a check."""
    with open(directory / "reports", "rb") as file:
        received, took = pickle.load(file), stopwatch()
    _, content = manifest_of(model, [pickle.loads(sent) for sent in received], directory)
    # gather_object has room for the longest report, as often as there are ranks
    return {**took(), "gathered_bytes": world_size * max(map(len, received)), "bytes": len(content)}


def resume(model: str, world_size: int, directory: Path, saved_on: int | None = None) -> dict[str, float]:
    """One rank's: the manifest read and checked, its states found, and the ranges of every piece that it owns."""
    took = stopwatch()
    checkpoint = Checkpoint(directory, "none")
    read = took()
    state_dict, (optimizer,) = checkpoint.state_dict(), checkpoint.optimizer_states(None, as_tensor)
    assert len(state_dict) == len(optimizer["state"]) == len(MODELS[model])
    opened = took()
    wanted = segments_of(partition(model, world_size), min(RANK, world_size - 1))
    labels = ("model", *(f"optimizer/0/{state}" for state in STATES))
    index = checkpoint.manifest.index
    ranges = sum(1 for s in wanted for of in labels for _ in index.find(Segment(f"{of}/{s.name}", s.start, s.stop)))
    return {
        **took(),
        "manifest_cpu_seconds": read["cpu_seconds"],
        "states_cpu_seconds": opened["cpu_seconds"] - read["cpu_seconds"],
        "ranges": ranges,
    }


def resume_on_half(model: str, world_size: int, directory: Path) -> dict[str, float]:
    return resume(model, world_size // 2, directory)


def prepare(model: str, world_size: int, directory: Path) -> dict[str, float]:
    """Everything that the others need: what all ranks report, the manifest, and shard files that are empty but long."""
    buckets = partition(model, world_size)
    owned: list[list[Segment]] = [[] for _ in range(world_size)]
    for bucket in buckets:
        for rank, *_ in bucket.shards:
            owned[rank] += [segment for segment, _ in bucket.owned(rank)]
    reports = [written(segments, rank, world_size) for rank, segments in enumerate(owned)]
    (directory / "reports").write_bytes(pickle.dumps([pickle.dumps(report) for report in reports]))
    manifest, content = manifest_of(model, reports, directory)
    (directory / "manifest.json").write_bytes(content)
    for file in manifest.files:
        with open(directory / file.name, "wb") as sparse:
            sparse.truncate(file.nbytes)
    elements = [sum(segment.numel for segment in segments) for segments in owned]
    segments = sum(map(len, owned))
    return {
        "segments": segments,
        "rows": sum(len(file.tensors) for file in manifest.files),
        "segments_without_rounds": sum(
            1
            for bucket in partition(model, world_size, most_cuts=10**12)
            for rank, *_ in bucket.shards
            for _ in bucket.owned(rank)
        ),
        "most_of_a_share": max(elements) / (sum(elements) / world_size),
    }


MEASURED = (plan_partition, report, commit, resume, resume_on_half)
TITLES = ("plan", "report", "rank 0: commit", "resume", "resume on half the ranks")


# ---------------------------------------------------------------------------------------------- a child each


def status(field: str) -> float:
    """In MB."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def in_a_child(action: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """What it gives, with the seconds that it took (if it hasn't said so itself) and the memory that it had."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # what the parent had at its most doesn't count
            born_with, took = status("VmRSS"), stopwatch()
            result = action(*arguments)
            found = {**took(), **result, "memory_mb": status("VmHWM") - born_with}
            os.write(writing, json.dumps(found).encode())
            os._exit(0)
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{action.__name__}{arguments} failed")
    told: dict[str, float] = json.loads(answer)
    return told


def measure(model: str, world_size: int, rounds: int, work: Path) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory(dir=work) as name:
        directory = Path(name)
        cell = {"manifest": in_a_child(prepare, model, world_size, directory)}
        for action in MEASURED:
            found = [in_a_child(action, model, world_size, directory) for _ in range(rounds)]
            cell[action.__name__] = {key: statistics.median(each[key] for each in found) for key in found[0]} | {
                "memory_mb": max(each["memory_mb"] for each in found),
                "slowest_seconds": max(each["seconds"] for each in found),
            }
    print(model, world_size, json.dumps(cell), file=sys.stderr)
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, on 8 and 1024 ranks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None, help="where to put the empty files; a temporary one")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    arguments = parser.parse_args()
    gc.collect()  # or the first action of every child would happen to pay for what the imports have made
    ranks, rounds = ((8, 1024), 1) if arguments.quick else (RANKS, arguments.rounds)
    models = {
        model: {str(count): measure(model, count, rounds, arguments.directory) for count in ranks} for model in MODELS
    }
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "import_mb": status("VmRSS"),
    }
    parameters = {
        model: {"tensors": len(specs), "elements": sum(spec.numel for spec in specs)} for model, specs in MODELS.items()
    }
    imports = f"the imports have {about['import_mb']:.0f} MB of their own"
    print(f"\n{about['machine']}, Python {about['python']}, torch {about['torch']}; {imports}\n")
    columns = ("model", "ranks", "segments", "each bucket cut", "manifest, MB", "gathered, MB", *TITLES)
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for model, cells in models.items():
        for count, cell in cells.items():
            cut = [f"{cell['manifest'][key]:,}" for key in ("segments", "segments_without_rounds")]
            sizes = [f"{cell['commit'][key] / 1e6:.1f}" for key in ("bytes", "gathered_bytes")]
            found = [
                f"{cell[a.__name__]['cpu_seconds']:.3f} s, {cell[a.__name__]['memory_mb']:.0f} MB" for a in MEASURED
            ]
            print(f"| {' | '.join([model, count, *cut, *sizes, *found])} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "models": parameters, "cells": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
