"""`lightning-zero export`: the fp32 model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_zero.cli.arguments import WrongUseError, add_command, add_directory, add_tag
from lightning_zero.cli.output import bytes_text
from lightning_zero.cli.progress import progress_bar

if TYPE_CHECKING:
    from lightning_zero.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    """Add the command."""
    text = "Write the fp32 model, as a Lightning checkpoint or .safetensors."
    export = add_command(commands, "export", _export, text, "  lightning-zero export ckpts model.ckpt")
    add_directory(export)
    export.add_argument("out", type=Path, metavar="OUT", help="a .ckpt, a .safetensors, or a folder for several")
    export.add_argument("--max-shard-size", metavar="SIZE", help='write a folder of files of this size, such as "5GB"')
    export.add_argument("--exclude-frozen", action="store_true", help="leave out parameters that were not trained")
    export.add_argument(
        "--unsafe", action="store_true", help="load hyper-parameters of any class: runs what the checkpoint says"
    )
    add_tag(export)


def _export(options: argparse.Namespace) -> int:
    from lightning_zero.checkpoint import export
    from lightning_zero.checkpoint.load import Checkpoint, resolve

    size = None
    if options.max_shard_size is not None:
        try:
            size = export.parse_size(options.max_shard_size)
        except ValueError as error:
            raise WrongUseError(str(error)) from None
    directory = resolve(options.dir, options.tag)
    nbytes = export.exported_bytes(Checkpoint(directory), options.exclude_frozen)
    with progress_bar("exporting", nbytes, quiet=options.json) as progress:
        export.convert_zero_checkpoint_to_fp32_state_dict(
            directory,
            options.out,
            exclude_frozen_parameters=options.exclude_frozen,
            max_shard_size=size,
            progress=progress,
            weights_only=not options.unsafe,
        )
    if options.json:
        print(json.dumps({"checkpoint": str(directory), "output": str(options.out), "bytes": nbytes}))
    else:
        print(f"{directory} → {options.out}, {bytes_text(nbytes)}")
    return 0
