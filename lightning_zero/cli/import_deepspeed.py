"""`lightning-zero import-deepspeed`: what DeepSpeed has saved, as a checkpoint of ours."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lightning_zero.cli import imports
from lightning_zero.cli.arguments import add_command

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
    imports.add_options(command, "DeepSpeed's save directory, one tag's, or Lightning's NAME.ckpt")
    command.add_argument("--tag", metavar="T", help="which one of SRC; the one that its `latest` names if not given")


def _import(options: argparse.Namespace) -> int:
    from lightning_zero.checkpoint.deepspeed.directory import find_deepspeed_tag, read_deepspeed

    directory = find_deepspeed_tag(options.source, options.tag)
    return imports.run(
        options,
        lambda progress: read_deepspeed(
            directory,
            module_only=options.module_only,
            submodule=options.submodule,
            weights_only=not options.unsafe,
            verify=not options.no_verify,
            progress=progress,
        ),
    )
