"""The time of a training step and the peak memory of a rank, beside DDP, on two processes of this machine.

    python -m benchmarks.step [--rounds 3] [--steps 12] [--width 512] [--json FILE]

Every contestant runs in fresh processes, one round after the other, and each round runs all of them: so that a busy
moment of the machine falls on all alike. Medians over all rounds; the ratio is taken round by round.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.launch import rank_environment

CONTESTANTS = {
    "DDP": "ddp",
    "DDP + ZeroRedundancyOptimizer": "zero_redundancy",
    "lightning_zero, stage 1": "zero_stage_1",
    "lightning_zero, stage 2": "zero_stage_2",
}
WORLD_SIZE = 2


def train(strategy: str, steps: int, width: int, layers: int) -> None:
    """One rank: train, and print what it took as JSON on the last line."""
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer

    import lightning_zero  # noqa: F401  (registers the strategies)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(8192, width)
            self.blocks = torch.nn.Sequential(*(Block() for _ in range(layers)))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            logits = self.blocks(self.embed(batch)) @ self.embed.weight.T
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            if strategy == "zero_redundancy":
                from torch.distributed.optim import ZeroRedundancyOptimizer

                return ZeroRedundancyOptimizer(self.parameters(), torch.optim.AdamW, lr=1e-4)
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    class Clock(Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_start(self, *args: object) -> None:
            self.last = time.perf_counter()

        def on_train_batch_end(self, *args: object) -> None:
            # From end to end: what the loop does between two batches counts too, such as waiting for the other rank.
            self.last, before = time.perf_counter(), self.last
            self.seconds.append(self.last - before)

    torch.manual_seed(0)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    clock, model = Clock(), Model()
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD_SIZE,
        strategy="ddp" if strategy == "zero_redundancy" else strategy,
        max_steps=steps,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [torch.randint(0, 8192, (2, 128)) for _ in range(steps)]
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in model.parameters()),
                "seconds": clock.seconds[2:],  # the first touch the memory
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "base_mib": base,
            }
        )
    )


def run(strategy: str, port: int, arguments: argparse.Namespace) -> dict:
    """All ranks of one contestant."""
    command = [sys.executable, "-m", "benchmarks.step", "--strategy", strategy]
    command += [f"--steps={arguments.steps}", f"--width={arguments.width}", f"--layers={arguments.layers}"]
    ranks = []
    for rank in range(WORLD_SIZE):
        env = os.environ | rank_environment(rank, WORLD_SIZE, port) | {"OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [rank.communicate() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{strategy} failed:\n" + "\n".join(error for _, error in outputs))
    results = [json.loads(output.strip().splitlines()[-1]) for output, _ in outputs]
    return {
        "seconds": statistics.median(s for result in results for s in result["seconds"]),
        "peak_mib": max(result["peak_mib"] for result in results),
        "base_mib": max(result["base_mib"] for result in results),
        "parameters": results[0]["parameters"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    parser.add_argument("--strategy", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.strategy:
        train(arguments.strategy, arguments.steps, arguments.width, arguments.layers)
        return
    rounds: list[dict[str, dict]] = []
    for number in range(arguments.rounds):
        rounds.append({})
        for index, (name, strategy) in enumerate(CONTESTANTS.items()):
            rounds[-1][name] = run(strategy, 29600 + number * 10 + index, arguments)
            print(f"round {number}: {name}: {rounds[-1][name]}", file=sys.stderr)
    base = rounds[0]["DDP"]["base_mib"]
    print(
        f"\n{rounds[0]['DDP']['parameters'] / 1e6:.1f} M parameters, fp32, {WORLD_SIZE} ranks, {platform.machine()}\n"
    )
    print("| | step, DDP = 1 | step, s | peak memory, MiB | above the imports, MiB |\n|---|---|---|---|---|")
    figures = {}
    for name in CONTESTANTS:
        ratio = statistics.median(r[name]["seconds"] / r["DDP"]["seconds"] for r in rounds)
        seconds = statistics.median(r[name]["seconds"] for r in rounds)
        peak = statistics.median(r[name]["peak_mib"] for r in rounds)
        figures[name] = {"ratio": ratio, "seconds": seconds, "peak_mib": peak, "above_imports_mib": peak - base}
        print(f"| {name} | {ratio:.2f} | {seconds:.3f} | {peak:.0f} | {peak - base:.0f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rounds": rounds, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
