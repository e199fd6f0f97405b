"""A user's script: started by hand (Lightning then starts the second process), by torchrun, or by SLURM.

`python -m tests.plugin.launched DIRECTORY [STRATEGY] [STEPS] [EVERY]`; where there are many, each takes a 20th of a
second, and none is saved unless it is said after how many.
"""

import os
import sys
import time
from pathlib import Path

from lightning.pytorch import Callback

from tests.models import Data, Model, quiet_trainer


class Told(Callback):
    """Leaves each rank's process number and how far it is, for whoever wants to send it a signal."""

    def __init__(self, directory: str, slow: bool) -> None:
        self.directory, self.slow = Path(directory), slow

    def on_train_batch_end(self, trainer, *_):
        (self.directory / f"rank{trainer.global_rank}").write_text(f"{os.getpid()} {trainer.global_step}\n")
        if self.slow:
            time.sleep(0.05)


def main(directory: str, strategy: str = "zero_stage_2", steps: str = "4", every: str = "") -> None:
    from lightning_zero import Fp32Export, ZeroCheckpoint

    trainer = quiet_trainer(
        strategy,
        world_size=2,
        max_steps=int(steps),
        limit_val_batches=0,
        default_root_dir=directory,
        callbacks=[
            ZeroCheckpoint(f"{directory}/ckpts", every_n_train_steps=int(every or ("2" if steps == "4" else 10**6))),
            Fp32Export(f"{directory}/model.ckpt"),
            Told(directory, slow=steps != "4"),
        ],
    )
    trainer.fit(Model(), datamodule=Data(), ckpt_path="last")


if __name__ == "__main__":
    main(*sys.argv[1:])
