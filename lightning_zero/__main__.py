"""`python -m lightning_zero`, where the command isn't on the path."""

import sys

from lightning_zero.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
