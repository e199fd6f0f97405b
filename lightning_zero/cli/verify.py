"""`lightning-zero verify`: every byte against its checksum."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.integrity import find_problems, read_manifest
from lightning_zero.checkpoint.manifest import MANIFEST_NAME, Manifest
from lightning_zero.checkpoint.shards import Problem
from lightning_zero.cli.arguments import add_command, add_directory, add_tag, find_tag
from lightning_zero.cli.output import bytes_text, print_json
from lightning_zero.cli.progress import progress_bar
from lightning_zero.errors import ZeroError

if TYPE_CHECKING:
    from lightning_zero.cli.arguments import Commands


def add_to(commands: Commands) -> None:
    """Add the command."""
    text = "Read every byte against its checksum. Exits with 1 if something is wrong."
    verify = add_command(commands, "verify", _verify, text, "  lightning-zero verify ckpts --tag step=500.ckpt")
    add_directory(verify)
    add_tag(verify)


def _verify(options: argparse.Namespace) -> int:
    directory, problems = find_tag(options.dir, options.tag)
    manifest: Manifest | None = None
    try:
        commit.check_link(directory)
        manifest = read_manifest(directory)
    except ZeroError as error:
        problems.append(Problem(MANIFEST_NAME, None, 0, 0, str(error)))
    else:
        with progress_bar("verifying", manifest.nbytes, quiet=options.json) as progress:
            problems += find_problems(directory, manifest, "full", progress)
    if options.json:
        found = [
            {"file": item.file, "tensor": item.tensor, "start": item.start, "stop": item.stop, "problem": item.text}
            for item in problems
        ]
        print_json({"path": str(directory), "sound": not problems, "problems": found})
    else:
        for problem in problems:
            print(problem)
        if manifest is not None and not problems:
            print(f"{directory}: sound, {bytes_text(manifest.nbytes)} in {len(manifest.files)} shards")
    return 1 if problems else 0
