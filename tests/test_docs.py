"""Every code block and every command of the README and of docs/ is run, page by page, in its order.

A page's Python blocks share their names, as they would in a notebook; `model` and `MyModule` are given, and directories
of DeepSpeed's and of FSDP's. A `console` block runs what follows each `$`. What sets a machine up, or measures for
minutes, is looked at and not run.
"""

import io
import os
import re
import shlex
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import lightning.pytorch
import pytest

from tests.launch import run_ranks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*/README.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(page):
    return [(kind, text) for kind, text in BLOCK.findall(page.read_text()) if kind in ("python", "console", "bash")]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    # The pages' Trainers run where the tests run: one rank, a few steps, and nothing on the terminal
    run_ranks(run_page, 1, page, tmp_path, process_group=False, timeout_seconds=240)


def test_the_design_lists_every_module_and_no_other():
    rooms = (ROOT / "docs" / "design.md").read_text()
    listed = re.findall(r"^ +(\w+)\.py +\S", rooms, re.M)
    modules = [path for path in (ROOT / "lightning_zero").rglob("*.py") if not path.stem.startswith("__")]
    commands = [path for path in modules if path.parent.name == "cli" and "def add_to(" in path.read_text()]
    assert sorted(listed) == sorted(path.stem for path in modules if path not in commands)
    assert all(path.stem.split("_")[0] in rooms for path in commands)


class ShortTrainer(lightning.pytorch.Trainer):
    def __init__(self, **options):
        quiet = {"enable_progress_bar": False, "logger": False, "enable_model_summary": False, "accelerator": "cpu"}
        super().__init__(**{"max_steps": 6, **quiet, **options, "devices": 1})


def run_page(page, directory):
    from tests.checkpoint.deepspeed.training import trained
    from tests.checkpoint.fsdp.forger import forge, optimizer_state, training
    from tests.models import Data, Model

    class MyModule(Model):
        def train_dataloader(self):
            return Data.val_dataloader(None)

        def val_dataloader(self):
            return Data.val_dataloader(None)

    os.chdir(directory)
    lightning.pytorch.Trainer = ShortTrainer
    trained(stage=2).save(Path("deepspeed_run"))
    module, optimizer = training(step=2)
    state = {"model": module.state_dict(), "optimizer": optimizer_state(module, optimizer)}
    forge(Path("fsdp_run", "step-2"), state)
    names = {"MyModule": MyModule, "model": MyModule(dropout=0.0), "__name__": "a page"}
    for kind, text in blocks(page):
        if kind == "python":
            exec(compile(standing_alone(text), str(page), "exec"), names)
        elif kind == "console":
            if not Path("ckpts", "latest").exists():  # the page's run would have saved only after hundreds of steps
                names["trainer"].save_checkpoint("ckpts/step=6.ckpt")
                shutil.copytree("ckpts", "other_ckpts")
            for command in re.findall(r"^\$ (.*)$", text, re.M):
                run_command(command.split("#")[0])
        else:
            for command in text.splitlines():
                look_at(command.split("#")[0].strip())


def standing_alone(text):
    """A table of arguments, without the call around it, needs its import."""
    return "from lightning_zero import ZeroCheckpoint\n" + text


def run_command(command):
    from lightning_zero.cli import main

    program, *arguments = shlex.split(command)
    assert program == "lightning-zero", command
    output = io.StringIO()
    with redirect_stdout(output):
        assert main(arguments) == 0, f"{command}: {output.getvalue()}"


def look_at(command):
    """A command that isn't run here: what it names is there."""
    if command.startswith("make "):
        assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.M), command
    elif "-m benchmarks" in command:
        module = re.search(r"-m (benchmarks[.\w]*)", command)
        assert module, command
        place = ROOT / module[1].replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), command
    else:
        assert not command, f"nobody looks at {command!r}"
