"""Our export beside DeepSpeed's and DCP's conversions of the same training: whole processes, imports included.

Contestants of `benchmarks.checkpoint` train GPT-2 for a moment and save; then every conversion runs as a user would run
it, in a process of its own, which is timed from its start to its end. The checkpoint is in the page cache. What an
interpreter takes that imports torch, or DeepSpeed, and does nothing else stands beside: no conversion can beat that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ranks import Figures, installed, run_ranks
from benchmarks.rounds import median, median_ratio, rotated

BAR = 0.4
PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class Conversion:
    """One way to turn a checkpoint into one file, or into a state dict.

    Attributes:
        name: in the table.
        source: which contestant's checkpoint it reads; nothing, if it only imports.
        command: arguments to Python; `{saved}` and `{out}` are filled in.
        out: the name of what it writes, if anything.
        beside: the conversion whose time counts as 1.
        package: what has to be installed.
    """

    name: str
    source: str | None
    command: tuple[str, ...]
    out: str | None = None
    beside: str | None = None
    package: str | None = None


def _ours(name: str, out: str, beside: str, *options: str) -> Conversion:
    command = ("-m", "lightning_zero", "export", "{saved}", "{out}", *options)
    return Conversion(f"**lightning_zero, {name}**", "zero", command, out, beside)


def _call(module: str, call: str) -> tuple[str, str]:
    function = call.split("(")[0]
    return "-c", f"from {module} import {function}; {call}"


def _deepspeed(name: str, out: str | None, call: str) -> Conversion:
    command = _call("deepspeed.utils.zero_to_fp32", call)
    return Conversion(f"DeepSpeed ZeRO-2, {name}", "deepspeed", command, out, package="deepspeed")


_GET = "get_fp32_state_dict_from_zero_checkpoint({saved!r})"
_CONVERT = "convert_zero_checkpoint_to_fp32_state_dict({saved!r}, {out!r}"
_ONE_FILE = "max_shard_size=None"  # DeepSpeed needs another package to write several
CONVERSIONS = {
    "zero_state_dict": Conversion(
        "**lightning_zero, state dict**", "zero", _call("lightning_zero", _GET), beside="deepspeed_state_dict"
    ),
    "zero_function": Conversion(
        "**lightning_zero, to .ckpt by the function**",
        "zero",
        _call("lightning_zero", f"{_CONVERT})"),
        "by_function.ckpt",
        "deepspeed_bin",
    ),
    "zero_ckpt": _ours("to .ckpt", "model.ckpt", "deepspeed_bin"),
    "zero_safetensors": _ours("to .safetensors", "model.safetensors", "deepspeed_safetensors"),
    "zero_training": _ours("to .ckpt with optimizer", "training.ckpt", "dcp_to_torch", "--with-optimizer"),
    "deepspeed_state_dict": _deepspeed("state dict", None, _GET),
    "deepspeed_bin": _deepspeed("to .bin", "bin", f"{_CONVERT}, {_ONE_FILE})"),
    "deepspeed_safetensors": _deepspeed(
        "to .safetensors", "folder", f"{_CONVERT}, {_ONE_FILE}, safe_serialization=True)"
    ),
    "dcp_to_torch": Conversion(
        "DCP to torch.save, with optimizer",
        "fsdp2",
        _call("torch.distributed.checkpoint.format_utils", "dcp_to_torch_save({saved!r}, {out!r})"),
        "dcp.pt",
    ),
    "import_torch": Conversion("`import torch` alone", None, ("-c", "import torch")),
    "import_deepspeed": Conversion("`import deepspeed` alone", None, ("-c", "import deepspeed"), package="deepspeed"),
}


def wanted(names: Sequence[str]) -> list[str]:
    """Those of the given conversions whose package is there; a line tells of the others."""
    found = list(names)
    for package in {CONVERSIONS[name].package for name in names}:
        of_package = [name for name in names if CONVERSIONS[name].package == package]
        if not installed(package, beside=of_package):
            found = [name for name in found if name not in of_package]
    return found


def measure(names: Sequence[str], directory: Path, size: str, rounds: int) -> list[dict[str, Figures]]:
    """Seconds and peak memory of each conversion's process, in every round."""
    for contestant in {CONVERSIONS[name].source for name in names} - {None}:
        home = directory / str(contestant)
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        options = ("--size", size, "--directory", home, "--turns", 1)
        ranks = run_ranks("benchmarks.checkpoint.contestants", contestant, "save", *options)
        parameters = ranks[0]["parameters"]
    found: list[dict[str, Figures]] = []
    for number in range(rounds):
        found.append({})
        for name in rotated(names, number):
            found[-1][name] = _convert(CONVERSIONS[name], directory, parameters)
            print(f"round {number}: {name}: {found[-1][name]}", file=sys.stderr)
    return found


def _convert(conversion: Conversion, directory: Path, parameters: int) -> Figures:
    saved, out = directory / str(conversion.source) / "saved", directory / str(conversion.out)
    if conversion.source is not None:
        into_page_cache(saved)
    # A value may be quoted, within Python's own source, or not, within a command's arguments
    command = [part.format(saved=str(saved), out=str(out)) for part in conversion.command]
    figures = whole_process(command)
    if conversion.out is not None:
        written = sum(file.stat().st_size for file in (out.rglob("*") if out.is_dir() else [out]) if file.is_file())
        if written < 4 * parameters:
            raise SystemExit(f"{conversion.name} wrote {written} bytes for {parameters} parameters")
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        os.sync()
    return figures


def into_page_cache(directory: Path) -> None:
    """Read every file once."""
    buffer = bytearray(PIECE_BYTES)
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def whole_process(command: Sequence[str]) -> Figures:
    """Run Python with these arguments, from start to end."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    return {"seconds": took, "peak_mib": usage.ru_maxrss / 1024}


def figures_of(rounds: Sequence[dict[str, Figures]]) -> dict[str, Figures]:
    """Medians over all rounds."""
    found = {}
    for name, conversion in CONVERSIONS.items():
        if name in rounds[0]:
            beside = conversion.beside if conversion.beside in rounds[0] else None
            found[name] = {
                "name": conversion.name.strip("*"),
                "seconds": median(rounds, name, "seconds"),
                "peak_mib": max(each[name]["peak_mib"] for each in rounds),
                "beside": beside,
                "ratio": beside and median_ratio(rounds, name, beside, "seconds"),
                "bar": BAR if beside and beside.startswith("deepspeed") else None,
            }
    return found


def table(figures: dict[str, Figures]) -> str:
    """As Markdown."""
    lines = ["| | whole process, s | time, its counterpart = 1 | bar | peak memory, MiB |", "|---|---|---|---|---|"]
    for name, found in figures.items():
        ratio = f"{found['ratio']:.2f} ({CONVERSIONS[found['beside']].name})" if found["beside"] else ""
        bar = f"≤ {found['bar']:g}" if found["bar"] else ""
        lines.append(
            f"| {CONVERSIONS[name].name} | {found['seconds']:.2f} | {ratio} | {bar} | {found['peak_mib']:.0f} |"
        )
    return "\n".join(lines)
