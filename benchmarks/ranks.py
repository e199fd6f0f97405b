"""One contestant: a module that is run by fresh processes, one for each rank, and prints its figures as JSON.

What runs them imports no torch, and the figures come from the last line that each has printed. So nothing that one
contestant has allocated, cached or compiled is there for the next.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.launch import free_port, rank_environment

WORLD_SIZE = 2
TIMEOUT_SECONDS = 600

Figures = dict[str, Any]


def run_ranks(module: str, *arguments: object, world_size: int = WORLD_SIZE) -> list[Figures]:
    """Run `python -m module arguments` as all ranks; what each has printed, in the order of the ranks.

    Raises:
        SystemExit: a rank failed; the message has what all of them wrote.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    port, ranks = free_port(), list[subprocess.Popen[str]]()
    for number in range(world_size):
        # A core a rank, as on a node that has one process for each; and no accelerator for DeepSpeed to look for.
        alone = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        env = os.environ | rank_environment(number, world_size, port) | alone
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{' '.join(command[2:])} failed:\n" + "\n".join(error for _, error in outputs))
    return [json.loads(output.strip().splitlines()[-1]) for output, _ in outputs]


def installed(package: str | None, *, beside: Sequence[object] = ()) -> bool:
    """Whether a contestant's package is there; if not, a line says that it is left out."""
    if package is None or importlib.util.find_spec(package) is not None:
        return True
    print(f"{package} is not installed: {', '.join(map(str, beside)) or 'it'} left out", file=sys.stderr)
    return False
