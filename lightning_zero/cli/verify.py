"""`lightning-zero verify`: every byte against its checksum."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.integrity import find_problems, read_manifest
from lightning_zero.checkpoint.manifest import MANIFEST_NAME, Manifest
from lightning_zero.checkpoint.shards import Problem
from lightning_zero.checkpoint.storage import Location
from lightning_zero.cli.arguments import WrongUseError, add_command, add_directory, add_tag, find_tag
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
    verify.add_argument("--all", action="store_true", help="every checkpoint in the save directory")


def _verify(options: argparse.Namespace) -> int:
    if options.all and options.tag is not None:
        raise WrongUseError("--all is every checkpoint, --tag is one of them")
    directory, of_latest = find_tag(options.dir, options.tag)
    directories = [tag.path for tag in commit.list_tags(directory.parent)] if options.all else [directory]
    say: Callable[[object], None] = (lambda text: None) if options.json else print
    for problem in of_latest:
        say(problem)
    found: dict[Location, list[Problem]] = {}
    for each in directories:
        manifest, problems = _look(each, quiet=options.json)
        if options.all and problems and not each.is_dir():
            continue  # whoever trains has removed it meanwhile
        found[each] = problems
        for problem in problems:
            say(f"{each.name}/{problem}" if options.all else problem)
        if manifest is not None and not problems and (options.all or not of_latest):
            say(f"{each}: sound, {bytes_text(manifest.nbytes)} in {len(manifest.files)} shards")
    if options.json and options.all:
        tags = [_as_json(each, problems) for each, problems in found.items()]
        print_json({**_as_json(directory.parent, [*of_latest, *chain(*found.values())]), "tags": tags})
    elif options.json:
        print_json(_as_json(directory, of_latest + found[directory]))
    return 1 if of_latest or any(found.values()) else 0


def _look(directory: Location, *, quiet: bool) -> tuple[Manifest | None, list[Problem]]:
    """Read all of a checkpoint: its manifest, if there is one, and what is wrong."""
    try:
        commit.check_link(directory)
        manifest = read_manifest(directory)
    except ZeroError as error:
        return None, [Problem(MANIFEST_NAME, None, 0, 0, str(error))]
    with progress_bar(f"verifying {directory.name}", manifest.nbytes, quiet=quiet) as progress:
        return manifest, list(find_problems(directory, manifest, "full", progress))


def _as_json(path: Location, problems: Sequence[Problem]) -> dict[str, Any]:
    found = [
        {"file": item.file, "tensor": item.tensor, "start": item.start, "stop": item.stop, "problem": item.text}
        for item in problems
    ]
    return {"path": str(path), "sound": not problems, "problems": found}
