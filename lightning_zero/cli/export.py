"""`lightning-zero export`: the model alone, or what another strategy resumes from."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lightning_zero.cli.arguments import WrongUseError, add_command, add_directory, add_tag, location
from lightning_zero.cli.output import bytes_text, print_json
from lightning_zero.cli.progress import progress_bar

if TYPE_CHECKING:
    from lightning_zero.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    """Add the command."""
    text = "Write the model, as a Lightning checkpoint or .safetensors, in fp32 or narrower."
    examples = (
        "  lightning-zero export ckpts model.ckpt\n"
        "  lightning-zero export ckpts hf --max-shard-size 5GB --submodule model --dtype bf16\n"
        "  lightning-zero export ckpts s3://bucket/for_ddp.ckpt --with-optimizer"
    )
    export = add_command(commands, "export", _export, text, examples)
    add_directory(export)
    export.add_argument(
        "out",
        type=location,
        metavar="OUT",
        help="a .ckpt, .safetensors or .bin (weights alone), or a folder; a URL too",
    )
    export.add_argument("--max-shard-size", metavar="SIZE", help='write a folder of files of this size, such as "5GB"')
    export.add_argument("--exclude-frozen", action="store_true", help="leave out parameters that were not trained")
    export.add_argument("--dtype", metavar="D", help="of the parameters: bf16, fp16 or fp32 (of 16-bit buffers too)")
    export.add_argument("--submodule", metavar="NAME", default="", help="write this part of the module alone")
    export.add_argument(
        "--with-optimizer", action="store_true", help="write a .ckpt from which any other strategy resumes training"
    )
    export.add_argument(
        "--unsafe", action="store_true", help="keep hyper-parameters of any class, which run code when OUT is loaded"
    )
    add_tag(export)


def _export(options: argparse.Namespace) -> int:
    from lightning_zero.checkpoint import export
    from lightning_zero.checkpoint.reader import Reader
    from lightning_zero.checkpoint.resolution import resolve
    from lightning_zero.checkpoint.storage import require_writable

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
        raise WrongUseError(str(error)) from None
    require_writable(options.out.parent)
    checkpoint = Reader(resolve(options.dir, options.tag), check_reads=True)
    nbytes = export.exported_bytes(checkpoint, options.out, wanted, size)
    with progress_bar("exporting", nbytes, quiet=options.json) as progress:
        export.export(
            checkpoint, options.out, wanted, max_shard_bytes=size, progress=progress, weights_only=not options.unsafe
        )
    if options.json:
        print_json({"checkpoint": str(checkpoint.directory), "output": str(options.out), "bytes": nbytes})
    else:
        print(f"{checkpoint.directory} → {options.out}, {bytes_text(nbytes)}")
    return 0
