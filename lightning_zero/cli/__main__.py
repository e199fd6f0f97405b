"""`python -m lightning_zero.cli`."""

import sys

from lightning_zero.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
