"""Whatever starts the processes: Lightning itself, or torchrun."""

import os
import subprocess
import sys

import pytest
import torch

from lightning_zero import get_fp32_state_dict_from_zero_checkpoint
from tests.launch import free_port


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_a_script_trains_saves_and_exports_under(launcher, tmp_path):
    command = [sys.executable, "-m", "tests.plugin.launched", str(tmp_path)]
    if launcher == "torchrun":
        command[1:2] = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "-m"]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in names} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ckpts" / "latest").read_text() == "step=4.ckpt"
    exported = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    saved = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "ckpts")
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)


def test_after_a_fit_in_spawned_processes_the_weights_can_be_saved(tmp_path):
    script = (
        "import sys, torch\n"
        "from tests.models import Data, Model, quiet_trainer\n"
        "from lightning_zero import ZeroStrategy\n"
        "if __name__ == '__main__':\n"
        "    model, before = Model(), Model().into.weight.detach().clone()\n"
        "    trainer = quiet_trainer(ZeroStrategy(start_method='spawn'), world_size=2, max_steps=2)\n"
        "    trainer.fit(model, datamodule=Data())\n"
        "    trainer.save_checkpoint(sys.argv[1] + '/weights')\n"
        "    assert not torch.equal(before, model.into.weight)\n"
        "    torch.save(model.state_dict(), sys.argv[1] + '/expected.pt')\n"
    )
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    saved = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "weights")
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    assert not (tmp_path / "latest").exists()
