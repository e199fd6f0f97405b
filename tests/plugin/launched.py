"""A user's script: started by hand (Lightning then starts the second process), or by torchrun."""

import sys

from tests.models import Data, Model, quiet_trainer


def main(directory: str) -> None:
    from lightning_zero import Fp32Export, ZeroCheckpoint

    trainer = quiet_trainer(
        "zero_stage_2",
        world_size=2,
        max_steps=4,
        callbacks=[ZeroCheckpoint(f"{directory}/ckpts", every_n_train_steps=2), Fp32Export(f"{directory}/model.ckpt")],
    )
    trainer.fit(Model(), datamodule=Data(), ckpt_path="last")


if __name__ == "__main__":
    main(sys.argv[1])
