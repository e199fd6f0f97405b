"""All benchmarks that have contestants, one after the other; or one of them.

    python -m benchmarks all [--quick] [--only step checkpoint ...] [--directory DIR]
    python -m benchmarks step --rounds 3        # the same as: python -m benchmarks.step --rounds 3

`all` writes a JSON file and a picture for each: into the benchmarks' own folders, where their READMEs cite them, or
with `--directory` into another one. `--quick` is a look of a few minutes: small models, one round, and figures to
match; they go into a directory of their own, so that nobody takes them for the real ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ALL = ("step", "checkpoint", "export", "scale")
OTHERS = ("kills", "soak", "machine", "plot")
QUICK_DIRECTORY = Path("runs", "benchmarks-quick")


def run(name: str, *arguments: object) -> int:
    """One benchmark, in a process of its own."""
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)], check=False).returncode


def there(names: Sequence[str]) -> list[str]:
    """Those that this checkout has."""
    return [name for name in names if importlib.util.find_spec(f"benchmarks.{name}") is not None]


def run_all(names: Sequence[str], *, quick: bool, directory: Path | None) -> int:
    """Run them, draw what has a picture, and give back how many failed."""
    from benchmarks.plot import PICTURES

    if quick and directory is None:
        directory = QUICK_DIRECTORY
    failed = []
    for name in names:
        print(f"\n## {name}\n", flush=True)
        home = directory or Path(__file__).parent / name
        home.mkdir(parents=True, exist_ok=True)
        stem = "results" if directory is None else name
        results = home / f"{stem}.json"
        if run(name, *(["--quick"] if quick else []), "--json", results):
            failed.append(name)
        elif name in PICTURES:
            run("plot", name, results, home / f"{name}.svg")
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    alone = there((*ALL, *OTHERS))
    if arguments and arguments[0] in alone:
        return run(*arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("all", *alone))
    parser.add_argument("--quick", action="store_true", help="small, short, and not to be cited")
    parser.add_argument("--only", nargs="+", choices=there(ALL), default=there(ALL), metavar="NAME")
    parser.add_argument("--directory", type=Path, default=None, help="where to write figures and pictures")
    options = parser.parse_args(arguments)
    return run_all(options.only, quick=options.quick, directory=options.directory)


if __name__ == "__main__":
    sys.exit(main())
