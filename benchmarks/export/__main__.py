"""Time and peak memory of an export: beside a plain loop over the same bytes, and beside the peers' conversions.

    python -m benchmarks.export [--gigabytes 1 4] [--params 124e6] [--rounds 3] [--json FILE] [--quick]

Every figure is a fresh process's. `plain.py` says how our exports are measured at several sizes, and `conversions.py`
how they are beside DeepSpeed's and DCP's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.export import conversions, plain
from benchmarks.machine import limits_text, machine_limits
from benchmarks.ranks import WORLD_SIZE


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, nargs="*", default=[1, 4], help="sizes beside the plain loop")
    parser.add_argument("--params", default="124e6", help="of the peers' model; 124e6: GPT-2; small: 24 million; tiny")
    parser.add_argument(
        "--only", nargs="*", choices=conversions.CONVERSIONS, default=list(conversions.CONVERSIONS), metavar="NAME"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of small models, for a look")
    parser.add_argument("--directory", type=Path, default=None, help="on the disk that is to be measured")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.gigabytes, arguments.params, arguments.rounds = [0.25], "small", 1
    limits = [machine_limits(arguments.directory)]
    with tempfile.TemporaryDirectory(prefix="export-benchmark-", dir=arguments.directory) as folder:
        names = conversions.wanted(arguments.only)
        rounds = conversions.measure(names, Path(folder), arguments.params, arguments.rounds) if names else []
    beside_plain = {}
    for gigabytes in arguments.gigabytes:
        with tempfile.TemporaryDirectory(prefix="export-benchmark-", dir=arguments.directory) as folder:
            beside_plain[f"{gigabytes:g}"] = plain.measure(gigabytes, arguments.rounds, Path(folder) / "sizes")
    limits.append(machine_limits(arguments.directory))
    figures = conversions.figures_of(rounds) if rounds else {}
    print(f"\n{WORLD_SIZE} ranks' checkpoints, {platform.machine()}, {os.cpu_count()} cores")
    for text in (conversions.table(figures) if figures else "", plain.table(beside_plain) if beside_plain else ""):
        if text:
            print(f"\n{text}")
    print(f"\n{limits_text(limits)}")
    if arguments.json:
        content = {"params": arguments.params, "limits": limits, "conversions": figures, "sizes": beside_plain}
        arguments.json.write_text(json.dumps({**content, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
