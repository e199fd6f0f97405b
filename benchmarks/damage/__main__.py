"""Damage a checkpoint in every way that disks and people know, thousands of times, and look whether anybody notices.

    python -m benchmarks.damage [--damages 8000] [--seed 0] [--json FILE]

Two ranks train a small GPT, some of it frozen, and save; another training saves as many bytes of its own. Then one file
is damaged, at random, and the checkpoint is looked at from outside; it is mended, and damaged again. Exits with 1 if
`lightning-zero verify` or a load with `verify="full"` took a damaged checkpoint for a sound one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.ranks import run_ranks
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.cli import main as command
from lightning_zero.errors import ZeroError

TAG = "tag"
_PAGE_BYTES = 4096

Change = Callable[[bytes, Sequence[bytes], random.Random], bytes | None]
"""A file's content, the contents of others like it, and chance: what is there instead; None: no file."""


def _flip(content: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    position = chance.randrange(len(content))
    flipped = content[position] ^ 1 << chance.randrange(8)
    return content[:position] + bytes([flipped]) + content[position + 1 :]


def _zero_page(content: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    begin = chance.randrange(len(content)) // _PAGE_BYTES * _PAGE_BYTES
    page = content[begin : begin + _PAGE_BYTES]
    return content[:begin] + bytes(len(page)) + content[begin + _PAGE_BYTES :]


DAMAGES: dict[str, Change] = {
    "a bit flipped": _flip,
    "a page of zeros": _zero_page,
    "cut short": lambda content, others, chance: content[: chance.randrange(len(content))],
    "grown": lambda content, others, chance: content + chance.randbytes(chance.randint(1, _PAGE_BYTES)),
    "lost": lambda content, others, chance: None,
    "another save's, or rank's": lambda content, others, chance: chance.choice(others),
}
LEFT_TO_FULL = ("a bit flipped", "a page of zeros")
"""What a load with `verify="sizes"` need not find: the files keep their sizes and their headers."""


def train(directory: Path) -> None:
    """One rank of two: two trainings, each with a checkpoint of its own."""
    import torch
    from lightning.pytorch import Callback

    from benchmarks.gpt import GPT, SIZES
    from benchmarks.training import loader, quiet_trainer, silence, token_batches
    from lightning_zero import ZeroStrategy

    silence()
    for seed, name in enumerate(("damaged", "other")):
        torch.manual_seed(seed)
        module = GPT(SIZES["tiny"])
        next(module.parameters()).requires_grad_(False)
        trainer = quiet_trainer(ZeroStrategy(stage=2), Callback(), max_steps=2)
        trainer.fit(module, loader(token_batches(2, 1, 8, SIZES["tiny"].vocabulary)))
        trainer.save_checkpoint(directory / name / TAG)


def look(tag: Path) -> dict[str, bool]:
    """Who refuses a tag: the command, a load that reads every byte, and one that looks at sizes and headers."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = command(["verify", str(tag)])
    return {
        "verify": status == 1,
        "full": _refused(lambda: Checkpoint(tag, verify="full")),
        "sizes": _refused(lambda: _load(tag)),
    }


def _load(tag: Path) -> None:
    checkpoint = Checkpoint(tag, verify="sizes")
    checkpoint.lightning_checkpoint()
    for rank in range(checkpoint.manifest.world_size):
        checkpoint.rank_state(rank)


def _refused(load: Callable[[], object]) -> bool:
    try:
        load()
    except ZeroError:
        return True
    return False


def damage(directory: Path, count: int, seed: int) -> tuple[list[str], Counter[tuple[str, str]]]:
    """Damage, look and mend, `count` times.

    Returns:
        What nobody noticed, and how many damages there were of each kind, and how many each way of looking found.
    """
    tag, chance = directory / "damaged" / TAG, random.Random(seed)
    contents = {path.name: path.read_bytes() for path in tag.iterdir()}
    missed, counts = list[str](), Counter[tuple[str, str]]()
    assert not any(look(tag).values()), "the sound one is refused"
    while sum(counts[how, "all"] for how in DAMAGES) < count:
        how, name = chance.choice(list(DAMAGES)), chance.choice(sorted(contents))
        others = [content for other, content in contents.items() if other[:5] == name[:5] and other != name]
        others.append((directory / "other" / TAG / name).read_bytes())
        damaged = DAMAGES[how](contents[name], others, chance)
        if damaged == contents[name]:  # there were zeros already
            continue
        (tag / name).unlink()
        if damaged is not None:
            (tag / name).write_bytes(damaged)
        counts[how, "all"] += 1
        for who, refused in look(tag).items():
            counts[how, who] += refused
            if not refused and (who != "sizes" or how not in LEFT_TO_FULL):
                missed.append(f"{name}: {how}, which {who} didn't find")
        (tag / name).write_bytes(contents[name])
    assert not any(look(tag).values()), "the mended one is refused"
    return missed, counts


def table(counts: Counter[tuple[str, str]]) -> str:
    """Of each kind of damage: how many there were, and how many were found by whom."""
    columns = ("all", "verify", "full", "sizes")
    lines = [
        '| a file was | times | found by `verify` | by a load, `"full"` | by a load, `"sizes"` |',
        "|---|---|---|---|---|",
    ]
    lines += [f"| {how} | {' | '.join(str(counts[how, column]) for column in columns)} |" for how in DAMAGES]
    sums = [sum(counts[how, column] for how in DAMAGES) for column in columns]
    return "\n".join([*lines, f"| all | {' | '.join(map(str, sums))} |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        train(arguments.rank)
        print("{}")
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lightning_zero-damage-") as directory:
        run_ranks("benchmarks.damage", "--rank", directory)
        missed, counts = damage(Path(directory), arguments.damages, arguments.seed)
    print(table(counts))
    print("\n".join(missed) or "None was missed by whoever reads every byte, and by the sizes only what keeps them.")
    if arguments.json:
        figures = {
            "damages": arguments.damages,
            "missed": missed,
            "seconds": round(time.monotonic() - began, 1),
            "seed": arguments.seed,
            "table": table(counts).splitlines(),
        }
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
