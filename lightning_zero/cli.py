"""`lightning-zero`, the command.

What only looks (`ls`, `verify`) imports neither torch nor Lightning, and so answers at once. A wrong use ends in 2, a
`ZeroError` in 1, with one line on stderr and no traceback; with `--json`, what goes to stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.integrity import find_problems, read_manifest
from lightning_zero.checkpoint.manifest import MANIFEST_NAME, Manifest
from lightning_zero.checkpoint.shards import Problem
from lightning_zero.checkpoint.storage import Location, absolute, locate
from lightning_zero.errors import CheckpointNotFoundError, ZeroError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and give back its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    warnings.showwarning = _show_warning
    try:
        status: int = options.run(options)
    except commit.InvalidTagError as error:
        parser.error(str(error))
    except (ZeroError, OSError) as error:
        print(f"lightning-zero: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return status


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"lightning-zero: {' '.join(str(message).split())}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-zero", description="Looks after the checkpoints of lightning_zero.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("dir", type=locate, metavar="DIR", help="a save directory or one tag's, a path or a URL")
    common.add_argument("--json", action="store_true", help="print JSON")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, parents=[common], help=text, description=text)
        command.set_defaults(run=run)
        return command

    add("ls", _ls, "List the checkpoints: step, epoch, world size, stage, bytes, age, and which is the latest.")
    verify = add("verify", _verify, "Read every byte against its checksum. Exits with 1 if something is wrong.")
    export = add("export", _export, "Write the model, as a Lightning checkpoint or .safetensors, in fp32 or narrower.")
    export.add_argument("out", type=Path, metavar="OUT", help="a .ckpt, a .safetensors, or a folder for several")
    export.add_argument("--max-shard-size", metavar="SIZE", help='write a folder of files of this size, such as "5GB"')
    export.add_argument("--exclude-frozen", action="store_true", help="leave out parameters that were not trained")
    export.add_argument("--dtype", metavar="D", help="of the parameters: bf16, fp16 or fp32; buffers keep their own")
    export.add_argument("--submodule", metavar="NAME", default="", help="write this part of the module alone")
    export.add_argument(
        "--with-optimizer", action="store_true", help="write a .ckpt from which any other strategy resumes training"
    )
    export.add_argument(
        "--unsafe", action="store_true", help="load hyper-parameters of any class: runs what the checkpoint says"
    )
    for command in (verify, export):
        command.add_argument("--tag", metavar="T", help="which checkpoint; the one that `latest` names if not given")
    return parser


# --------------------------------------------------------------------------------------------------------- ls


def _ls(options: argparse.Namespace) -> int:
    save_dir: Location = absolute(options.dir)
    only = None
    if (save_dir / MANIFEST_NAME).is_file():
        save_dir, only = save_dir.parent, save_dir.name
    if not save_dir.is_dir():
        raise CheckpointNotFoundError(f"there is no directory {save_dir}")
    try:
        latest = commit.read_latest(save_dir)
    except ZeroError as error:
        latest = None
        print(f"lightning-zero: {error}", file=sys.stderr)
    rows = [_row(tag, latest) for tag in commit.list_tags(save_dir) if only in (None, tag.name)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print(f"no checkpoints in {save_dir}")
        return 0
    table = [["tag", "step", "epoch", "world size", "stage", "bytes", "age", ""]]
    for row in rows:
        cells = ["-" if row[key] is None else str(row[key]) for key in ("tag", "step", "epoch", "world_size", "stage")]
        size = "-" if row["bytes"] is None else _bytes_text(row["bytes"])
        remarks = ["latest"] * row["latest"] + ["INCOMPLETE"] * (not row["complete"])
        table.append([*cells, size, _age_text(row["age_seconds"]), ", ".join(remarks)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        aligned = [cells[0].ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(cells[1:-1], widths[1:-1], strict=True)]
        print("  ".join([*aligned, cells[-1]]).rstrip())
    return 0


def _row(tag: commit.TagInfo, latest: str | None) -> dict[str, Any]:
    manifest = tag.manifest
    return {
        "tag": tag.name,
        "step": manifest.step if manifest else None,
        "epoch": manifest.epoch if manifest else None,
        "world_size": manifest.world_size if manifest else None,
        "stage": manifest.stage if manifest else None,
        "bytes": manifest.nbytes if manifest else None,
        "created": manifest.created if manifest else None,
        "age_seconds": round(max(0.0, time.time() - tag.modified)),
        "latest": tag.name == latest,
        "complete": tag.complete,
        "problem": tag.problem,
    }


def _bytes_text(nbytes: int) -> str:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if nbytes >= 1000**power:
            return f"{nbytes / 1000**power:.1f} {unit}"
    return f"{nbytes} B"


def _age_text(seconds: int) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


# ----------------------------------------------------------------------------------------------------- verify


def _verify(options: argparse.Namespace) -> int:
    directory, problems = _find_tag(options.dir, options.tag)
    manifest: Manifest | None = None
    if directory is not None:
        try:
            commit.check_link(directory)
            manifest = read_manifest(directory)
        except ZeroError as error:
            problems.append(Problem(MANIFEST_NAME, None, 0, 0, str(error)))
        else:
            with _progress("verifying", manifest.nbytes, quiet=options.json) as progress:
                problems += find_problems(directory, manifest, "full", progress)
    if options.json:
        found = [
            {"file": item.file, "tensor": item.tensor, "start": item.start, "stop": item.stop, "problem": item.text}
            for item in problems
        ]
        print(json.dumps({"path": str(directory), "sound": not problems, "problems": found}, indent=2))
    else:
        for problem in problems:
            print(problem)
        if manifest is not None and not problems:
            print(f"{directory}: sound, {_bytes_text(manifest.nbytes)} in {len(manifest.files)} shards")
    return 1 if problems else 0


def _find_tag(path: Location, tag: str | None) -> tuple[Location | None, list[Problem]]:
    """The directory to verify; what is wrong with `latest` is a finding too, and no reason to look elsewhere."""
    if tag is None and (path / MANIFEST_NAME).is_file():
        return path, []
    problems = []
    if tag is None:
        try:
            tag = commit.read_latest(path)
            missing = f"it names {tag!r}, which is not there"
        except ZeroError as error:
            missing = str(error)
        if tag is None or not (path / tag).is_dir():
            tags = commit.list_tags(path)
            if not tags:
                raise CheckpointNotFoundError(f"there is no checkpoint in {path}")
            text = "it is missing" if tag is None and not (path / commit.LATEST).exists() else missing
            problems.append(Problem(commit.LATEST, None, 0, 0, text))
            tag = tags[0].name
    directory = path / commit.validate_tag(tag)
    if not directory.is_dir():
        there = [found.name for found in commit.list_tags(path)]
        raise CheckpointNotFoundError(f"there is no checkpoint {tag!r} in {path}; there are {there}")
    return directory, problems


# ----------------------------------------------------------------------------------------------------- export


def _export(options: argparse.Namespace) -> int:
    from lightning_zero.checkpoint import export
    from lightning_zero.checkpoint.load import Checkpoint, resolve

    try:
        size = None if options.max_shard_size is None else export.parse_size(options.max_shard_size)
        wanted = export.Wanted(
            exclude_frozen_parameters=options.exclude_frozen,
            dtype=export.parse_dtype(options.dtype),
            with_optimizer=options.with_optimizer,
            submodule=options.submodule,
        )
        export.require_suitable(options.out, wanted, size)
    except ValueError as error:
        _parser().error(str(error))
    checkpoint = Checkpoint(resolve(options.dir, options.tag))
    nbytes = export.exported_bytes(checkpoint, wanted)
    with _progress("exporting", nbytes, quiet=options.json) as progress:
        export.export(
            checkpoint, options.out, wanted, max_shard_bytes=size, progress=progress, weights_only=not options.unsafe
        )
    if options.json:
        print(json.dumps({"checkpoint": str(checkpoint.directory), "output": str(options.out), "bytes": nbytes}))
    else:
        print(f"{checkpoint.directory} → {options.out}, {_bytes_text(nbytes)}")
    return 0


# --------------------------------------------------------------------------------------------------- progress


@contextmanager
def _progress(what: str, total_bytes: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal and rich is installed; else nothing."""
    try:
        if quiet or not sys.stderr.isatty():
            raise ModuleNotFoundError
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        yield lambda nbytes: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, lock = bar.add_task(what, total=total_bytes), threading.Lock()

        def advance(nbytes: int) -> None:
            with lock:  # several threads verify
                bar.update(task, advance=nbytes)

        yield advance


if __name__ == "__main__":
    sys.exit(main())
