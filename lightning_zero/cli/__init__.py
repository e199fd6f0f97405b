"""`lightning-zero`, the command: one module a command, and what they share.

What only looks (`ls`, `inspect`, `verify`), `prune`, `plan --params` and `export` import neither torch nor Lightning,
and so answer at once; `diff` imports torch where there are elements to compare, and `export` where there are some to
cast (see `checkpoint.export`). With `--json`, what goes to stdout is one JSON document.
"""

from lightning_zero.cli.command import main

__all__ = ["main"]
