"""What the commands that import have in common: their options, and a checkpoint of another system's written as ours."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from lightning_zero.cli.arguments import location
from lightning_zero.cli.output import bytes_text, print_json
from lightning_zero.cli.progress import progress_bar

if TYPE_CHECKING:
    from lightning_zero.checkpoint.foreign import ForeignCheckpoint

    Read: TypeAlias = Callable[[Callable[[int], object]], ForeignCheckpoint]


def add_options(command: argparse.ArgumentParser, source: str) -> None:
    """SRC, which is what is said here, DST, and what is to be done with them."""
    command.add_argument("source", type=location, metavar="SRC", help=source)
    command.add_argument("dir", type=location, metavar="DST", help="the save directory that the tag is written into")
    command.add_argument(
        "--submodule",
        type=_submodule,
        metavar="NAME",
        default="",
        help="what was saved is this part of the LightningModule",
    )
    command.add_argument("--module-only", action="store_true", help="leave the optimizer out")
    command.add_argument("--no-verify", action="store_true", help="don't compare SRC with its own checksums first")
    command.add_argument(
        "--unsafe", action="store_true", help="keep what SRC holds of any class, which runs code when DST is loaded"
    )


def _submodule(text: str) -> str:
    """An argument that is a submodule's name."""
    from lightning_zero.checkpoint.foreign import prefix_of

    try:
        prefix_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def run(options: argparse.Namespace, read: Read) -> int:
    """Read it, write it, and say so.

    Args:
        options: of the command.
        read: opens SRC; it is given whom to tell of the bytes as they are read.
    """
    from lightning_zero.checkpoint.importing import write_imported

    verify = not options.no_verify
    told = [lambda nbytes: None]
    checkpoint = read(lambda nbytes: told[-1](nbytes))
    with progress_bar("importing", checkpoint.bytes_to_read(verify=verify), quiet=options.json) as progress:
        told.append(progress)
        report = write_imported(checkpoint, options.dir, weights_only=not options.unsafe, verify=verify)
    if options.json:
        print_json(
            {
                "source": str(checkpoint.directory),
                "checkpoint": str(report.path),
                "step": report.step,
                "stage": checkpoint.stage,
                "world_size": len(checkpoint.ranks),
                "bytes": report.bytes,
            }
        )
    else:
        print(f"{checkpoint.directory} → {report.path}, step {report.step}, {bytes_text(report.bytes)}")
    return 0
