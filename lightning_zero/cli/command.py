"""From the arguments to the exit status.

| what happens | exit status | on stderr |
|---|---|---|
| nothing to complain of | 0 | |
| `verify` finds damage, `diff` a difference | 1 | |
| a `ZeroError`, or the system or a store refuses | 1 | one line, no traceback |
| a wrong use | 2 | one line, which says where the help is |
| Ctrl+C | 130 | nothing |
| nobody reads what is printed any more (`| head`) | 141 | nothing |
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence

from lightning_zero import __version__
from lightning_zero.checkpoint.commit import InvalidTagError
from lightning_zero.cli import diff, export, import_deepspeed, import_fsdp, inspect, ls, plan, prune, verify
from lightning_zero.cli.arguments import Parser, WrongUseError
from lightning_zero.errors import ZeroError

_INTERRUPTED = 130
_UNREAD = 141
"""What a shell makes of SIGINT and SIGPIPE."""

_STORES = ("adlfs", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "huggingface_hub", "requests")
"""The packages whose own exceptions say that a store refuses: no credentials, a time that ran out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and give back its exit status."""
    warnings.showwarning = _show_warning
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does it: names may be in any script
    try:
        try:
            options = _parser().parse_args(arguments)
            status: int = options.run(options)
        finally:
            if sys.stdout is not None:  # as it is where the shell has closed it
                sys.stdout.flush()
    except (WrongUseError, InvalidTagError) as error:
        options.parser.error(str(error))
    except BrokenPipeError:
        # What is still buffered has nowhere to go, and Python would complain of it at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _UNREAD
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        if not isinstance(error, (ZeroError, OSError)) and type(error).__module__.split(".")[0] not in _STORES:
            raise
        _say(error)
        return 1
    return status


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say(message)


def _say(message: Exception | str) -> None:
    print(f"lightning-zero: {' '.join(str(message).split())}", file=sys.stderr)


def _parser() -> Parser:
    parser = Parser(
        "lightning-zero",
        description="Looks after the checkpoints of lightning_zero, and plans what a training will need.",
        epilog="lightning-zero COMMAND --help shows an example of each.",
    )
    parser.add_argument("--version", action="version", version=f"lightning_zero {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (ls, inspect, verify, diff, export, prune, plan, import_deepspeed, import_fsdp):
        module.add_to(commands)
    return parser
