"""What the commands' arguments have in common, and which checkpoint is meant by them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from typing_extensions import override

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.origins import advice, require_ours
from lightning_zero.checkpoint.resolution import existing, is_tag, resolve
from lightning_zero.checkpoint.shards import Problem
from lightning_zero.checkpoint.storage import Location, is_remote, locate
from lightning_zero.errors import CheckpointNotFoundError, ZeroError

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction["Parser"]


class WrongUseError(Exception):
    """An argument that can't be, as is only known after all are parsed."""


class Parser(argparse.ArgumentParser):
    """One that tells a wrong use in one line: its usage is as long as a screen."""

    @override
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
) -> Parser:
    """A command with `--json`, its help and an example in it."""
    command = commands.add_parser(
        name,
        help=re.split(r"\.\s", text)[0].rstrip(".") + ".",
        description=text,
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run, parser=command)
    command.add_argument("--json", action="store_true", help="print JSON")
    return command


def add_directory(command: argparse.ArgumentParser) -> None:
    """The argument DIR."""
    command.add_argument("dir", type=location, metavar="DIR", help="a save directory or one tag's, a path or a URL")


def add_tag(command: argparse.ArgumentParser) -> None:
    """The option --tag."""
    command.add_argument("--tag", metavar="T", help="which checkpoint; the one that `latest` names if not given")


def location(text: str) -> Location:
    """An argument that is a path or a URL."""
    try:
        where = locate(text)
        if is_remote(where):
            where.fs  # noqa: B018  # made here, which needs the package that knows such URLs
    except (ImportError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return where


def positive(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    with suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")


def directory_of(path: Location) -> Location:
    """The directory that is meant: a file of a checkpoint's stands for it, and `latest` for the save directory."""
    if not path.is_file():
        return path
    return path.parent if path.name == commit.LATEST else resolve(path)


def find_tag(path: Location, tag: str | None) -> tuple[Location, list[Problem]]:
    """The directory that is meant, sound or not; what is wrong with `latest` is a finding, not a reason to give up."""
    path = directory_of(path)
    if tag is None and is_tag(path):
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
                raise CheckpointNotFoundError(f"there is no checkpoint in {path}{advice(path)}")
            text = "it is missing" if tag is None and not (path / commit.LATEST).exists() else missing
            problems.append(Problem(commit.LATEST, None, 0, 0, f"{text}; the newest, {tags[0].name}, is taken instead"))
            tag = tags[0].name
    directory = existing(path, tag)
    require_ours(directory)
    return directory, problems
