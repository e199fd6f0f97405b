"""`lightning-zero import-deepspeed`: what DeepSpeed has saved, as a checkpoint of ours."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lightning_zero.cli.arguments import add_command, location
from lightning_zero.cli.output import bytes_text, print_json
from lightning_zero.cli.progress import progress_bar

if TYPE_CHECKING:
    from lightning_zero.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    """Add the command."""
    text = (
        "Write a DeepSpeed checkpoint (ZeRO stages 0 to 3; also what Lightning's DeepSpeedStrategy saved) as one of\n"
        "ours, which resumes on any number of ranks. DeepSpeed needn't be installed, and nothing pickled is executed."
    )
    examples = (
        "  lightning-zero import-deepspeed logs/epoch=3-step=500.ckpt ckpts\n"
        "  lightning-zero import-deepspeed deepspeed_run ckpts --tag global_step500 --submodule model"
    )
    command = add_command(commands, "import-deepspeed", _import, text, examples)
    command.add_argument(
        "source", type=location, metavar="SRC", help="DeepSpeed's save directory, one tag's, or Lightning's NAME.ckpt"
    )
    command.add_argument("dir", type=location, metavar="DST", help="the save directory that the tag is written into")
    command.add_argument("--tag", metavar="T", help="which one of SRC; the one that its `latest` names if not given")
    command.add_argument(
        "--submodule", metavar="NAME", default="", help="what was saved is this part of the LightningModule"
    )
    command.add_argument("--module-only", action="store_true", help="leave the optimizer out")
    command.add_argument("--no-verify", action="store_true", help="don't compare SRC with its own checksums first")
    command.add_argument(
        "--unsafe", action="store_true", help="keep what SRC holds of any class, which runs code when DST is loaded"
    )


def _import(options: argparse.Namespace) -> int:
    from lightning_zero.checkpoint.deepspeed.directory import read_deepspeed
    from lightning_zero.checkpoint.deepspeed.files import find_deepspeed_tag
    from lightning_zero.checkpoint.deepspeed.importing import bytes_to_read, write_imported

    verify = not options.no_verify
    directory = find_deepspeed_tag(options.source, options.tag)
    read = [lambda nbytes: None]
    checkpoint = read_deepspeed(
        directory,
        module_only=options.module_only,
        submodule=options.submodule,
        weights_only=not options.unsafe,
        verify=verify,
        progress=lambda nbytes: read[-1](nbytes),
    )
    with progress_bar("importing", bytes_to_read(checkpoint, verify=verify), quiet=options.json) as progress:
        read.append(progress)
        report = write_imported(checkpoint, options.dir, weights_only=not options.unsafe, verify=verify)
    if options.json:
        print_json(
            {
                "source": str(directory),
                "checkpoint": str(report.path),
                "step": report.step,
                "stage": checkpoint.stage,
                "world_size": len(checkpoint.ranks),
                "bytes": report.bytes,
            }
        )
    else:
        print(f"{directory} → {report.path}, step {report.step}, {bytes_text(report.bytes)}")
    return 0
