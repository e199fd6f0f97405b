"""Trains the GPT of gpt.py with ZeRO, by Lightning's own command line.

    python examples/train_gpt.py fit --config configs/gpt_zero2.yaml

Stop it whenever you like: the same command goes on from the newest checkpoint. Every setting in the config can
be given on the command line too, for example `--trainer.devices=4` or `--model.layers=12`; `fit --help` lists
them.
"""

from gpt import GPT, StandardLibrary
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override


class GPTCLI(LightningCLI):
    """Lightning's command line, where the model's context length follows the data's."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.block_size", "model.block_size")


def main() -> None:
    """Runs the subcommand that the command line names."""
    # overwrite: a run that resumes writes the config it goes on with over the one it began with
    GPTCLI(GPT, StandardLibrary, seed_everything_default=0, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
