"""`lightning-zero inspect`: what is inside a checkpoint, and who owns it, out of its manifest.

Whether the files are there is looked at too, as `ls` does it; a torn checkpoint is shown all the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.integrity import find_problems, read_manifest
from lightning_zero.checkpoint.manifest import Manifest
from lightning_zero.checkpoint.storage import Location
from lightning_zero.checkpoint.torch_file import require_dict
from lightning_zero.cli.arguments import WrongUseError, add_command, add_directory, add_tag, find_tag
from lightning_zero.cli.holdings import HOLDINGS, Holdings, ranges_text, states_by_optimizer
from lightning_zero.cli.output import bytes_text, plain, print_json, print_table

if TYPE_CHECKING:
    from lightning_zero.cli.arguments import Commands

_RANKS_SHOWN = 32
_PROBLEMS_SHOWN = 3
_PLOTS = (".svg", ".png")


def add_to(commands: Commands) -> None:
    """Add the command."""
    text = "Show what is inside: parameters, owners, optimizer states, bytes a rank."
    example = "  lightning-zero inspect ckpts --tag step=500.ckpt --plot owners.svg"
    command = add_command(commands, "inspect", _inspect, text, example)
    add_directory(command)
    add_tag(command)
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw who owns what, as .svg or .png")
    command.add_argument(
        "--hyper-parameters", action="store_true", help="show them too, and the optimizers' (this imports torch)"
    )


def _inspect(options: argparse.Namespace) -> int:
    if options.plot is not None and options.plot.suffix.lower() not in _PLOTS:
        raise WrongUseError(f"--plot FILE ends in .svg or .png, not {options.plot.name!r}")
    directory, problems = find_tag(options.dir, options.tag)
    for problem in problems:
        print(f"lightning-zero: {problem}", file=sys.stderr)
    commit.check_link(directory)
    manifest = read_manifest(directory)
    holdings = Holdings.of(manifest)
    report = _report(directory, manifest, holdings)
    report["problems"] = [plain(str(problem)) for problem in find_problems(directory, manifest, "sizes")]
    report["complete"] = not report["problems"]
    if options.hyper_parameters:
        report |= _hyper_parameters(directory, manifest)
    if options.plot is not None:
        from lightning_zero.cli.picture import draw, write

        write(draw(holdings, f"{directory.name}: step {manifest.step}, {bytes_text(manifest.nbytes)}"), options.plot)
        report["plot"] = str(options.plot)
    if options.json:
        print_json(report)
    else:
        _print(report, manifest)
    return 0


def _report(directory: Location, manifest: Manifest, holdings: Holdings) -> dict[str, Any]:
    def row(name: str) -> dict[str, Any]:
        held = holdings.by_name[name]
        states = sum(nbytes for (_, kind), nbytes in held.items() if kind == "states")
        return {"bytes": sum(held.values()) - states, "state_bytes": states, "ranks": holdings.owners(name)}

    return {
        "path": str(directory),
        "step": manifest.step,
        "epoch": manifest.epoch,
        "world_size": manifest.world_size,
        "stage": manifest.stage,
        "created": manifest.created,
        "versions": manifest.versions,
        "bytes": manifest.nbytes,
        "files": [
            {"name": file.name, "rank": file.rank, "frozen": file.frozen, "bytes": file.nbytes}
            for file in manifest.files
        ],
        "entries": [
            {
                "name": entry.name,
                "shape": entry.shape,
                "dtype": entry.dtype,
                "role": "frozen" if entry.name in manifest.frozen else entry.role,
                "elements": entry.numel,
                **row(entry.name),
            }
            for entry in manifest.entries
        ],
        "aliases": manifest.aliases,
        "optimizers": [
            {"class_name": optimizer.class_name, "groups": optimizer.parameters, "states": states}
            for optimizer, states in zip(manifest.optimizers, states_by_optimizer(manifest), strict=True)
        ],
        "ranks": [{"rank": rank, **held, "bytes": sum(held.values())} for rank, held in enumerate(holdings.by_rank())],
    }


def _hyper_parameters(directory: Location, manifest: Manifest) -> dict[str, Any]:
    """What `trainer.pt` says of the module's and the optimizers' settings.

    Raises:
        UntrustedContentError: it holds objects that only run code can make.
        CorruptCheckpointError: they are no settings.
    """
    from lightning_zero.checkpoint.load import Checkpoint

    settings, groups = Checkpoint(directory, "none", manifest).settings("hyper_parameters")
    own = require_dict(settings.get("hyper_parameters", {}), f"{directory}: the hyper-parameters")
    return {"hyper_parameters": own, "param_groups": {str(index): of for index, of in enumerate(groups)}}


def _print(report: dict[str, Any], manifest: Manifest) -> None:
    ranks = "1 rank" if manifest.world_size == 1 else f"{manifest.world_size} ranks"
    size = f"{bytes_text(manifest.nbytes)} in {len(manifest.files)} shards"
    print(report["path"])
    print(f"step {manifest.step}, epoch {manifest.epoch}, {ranks}, stage {manifest.stage}, {size}")
    for problem in report["problems"][:_PROBLEMS_SHOWN]:
        print(f"INCOMPLETE: {problem}")
    versions = ", ".join(f"{plain(name)} {plain(version)}" for name, version in manifest.versions.items())
    print(f"written {plain(manifest.created)} by {versions or 'nobody says what'}\n")
    _print_entries(report["entries"])
    for alias, name in manifest.aliases.items():
        print(f"tied: {plain(alias)} = {plain(name)}")
    print()
    _print_ranks(report["ranks"])
    for index, (optimizer, listed) in enumerate(zip(manifest.optimizers, report["optimizers"], strict=True)):
        groups = " + ".join(str(len(group)) for group in optimizer.parameters)
        states = ", ".join(
            plain(name) + (f" {bytes_text(nbytes)}" if nbytes else "") for name, nbytes in listed["states"].items()
        )
        print(f"\noptimizer {index}: {plain(optimizer.class_name) or 'of a class unknown,'} of {groups} parameters")
        print(f"  states: {states or 'none yet'}")
        for settings in report.get("param_groups", {}).get(str(index), []):
            print(f"  group: {_settings_text(settings)}")
    if "hyper_parameters" in report:
        print(f"\nhyper-parameters: {_settings_text(report['hyper_parameters'])}")
    if "plot" in report:
        print(f"\ndrawn: {report['plot']}")


def _settings_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{plain(str(name))}={plain(str(value))}" for name, value in settings.items()) or "none"


def _print_entries(entries: list[dict[str, Any]]) -> None:
    header = ["name", "shape", "dtype", "role", "bytes", "states", "ranks"]
    rows = [
        [
            plain(entry["name"]),
            "x".join(map(str, entry["shape"])) or "scalar",
            entry["dtype"],
            entry["role"],
            bytes_text(entry["bytes"]),
            bytes_text(entry["state_bytes"]) if entry["state_bytes"] else "-",
            ranges_text(entry["ranks"]) or "-",
        ]
        for entry in entries
    ]
    elements = sum(entry["elements"] for entry in entries if entry["role"] == "parameter")
    frozen = sum(entry["elements"] for entry in entries if entry["role"] == "frozen")
    print_table([header, *rows], "<<<<>><")
    print(f"{elements:,} elements trained, {frozen:,} frozen")


def _print_ranks(ranks: list[dict[str, Any]]) -> None:
    columns = [kind for kind in HOLDINGS if any(held[kind] for held in ranks)]
    names = {"own": "rank's own"}
    lines = [(str(held["rank"]), held) for held in ranks]
    if len(ranks) > _RANKS_SHOWN:
        least, most = (find(ranks, key=lambda held: held["bytes"]) for find in (min, max))
        lines = [(f"{least['rank']}, the least", least), (f"{most['rank']}, the most", most)]
    total = {key: sum(held[key] for held in ranks) for key in (*HOLDINGS, "bytes")}
    rows = [
        [name, *(bytes_text(held[key]) if held[key] else "-" for key in (*columns, "bytes"))]
        for name, held in [*lines, ("all", total)]
    ]
    print_table(
        [["rank", *(names.get(key, key) for key in columns), "together"], *rows], "<" + ">" * (len(columns) + 1)
    )
