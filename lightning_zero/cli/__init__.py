"""`lightning-zero`, the command: one module a command, and what they share.

What only looks (`ls`, `inspect`, `verify`), `prune`, and `plan --params` import neither torch nor Lightning, and so
answer at once; `diff` imports torch where there are elements to compare. With `--json`, what goes to stdout is one JSON
document.
"""

from lightning_zero.cli.command import main

__all__ = ["main"]
