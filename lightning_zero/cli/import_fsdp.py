"""`lightning-zero import-fsdp`: what FSDP has saved in shards, as a checkpoint of ours."""

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
        "Write a sharded checkpoint of FSDP's (a directory of torch.distributed.checkpoint: by dcp.save, or by\n"
        "Lightning's FSDPStrategy or ModelParallelStrategy) as one of ours, which resumes on any number of ranks.\n"
        "Nothing pickled is executed."
    )
    examples = (
        "  lightning-zero import-fsdp logs/epoch=3-step=500.ckpt ckpts\n"
        "  lightning-zero import-fsdp fsdp_run/step-500 ckpts --model-key app.model --submodule model"
    )
    command = add_command(commands, "import-fsdp", _import, text, examples)
    imports.add_options(command, "the directory with the .metadata")
    command.add_argument("--tag", metavar="T", help="the tag that it becomes; SRC's own name if not given")
    command.add_argument(
        "--model-key", metavar="KEY", help="where the module's state dict stands, such as app.model; '' for the top"
    )
    command.add_argument("--optimizer-key", metavar="KEY", help="where the optimizer's does")


def _import(options: argparse.Namespace) -> int:
    from lightning_zero.checkpoint.fsdp.directory import find_distributed, read_distributed

    directory = find_distributed(options.source)
    return imports.run(
        options,
        lambda progress: read_distributed(
            directory,
            options.tag,
            model_key=options.model_key,
            optimizer_key=options.optimizer_key,
            module_only=options.module_only,
            submodule=options.submodule,
            verify=not options.no_verify,
            progress=progress,
        ),
    )
