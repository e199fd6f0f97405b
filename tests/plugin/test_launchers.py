"""Whatever starts the processes, Lightning itself, torchrun or SLURM; and whatever stops them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_zero import get_fp32_state_dict_from_zero_checkpoint
from lightning_zero.checkpoint.integrity import find_problems, read_manifest
from tests.launch import free_port

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment(**more):
    clean = {key: value for key, value in os.environ.items() if key not in NAMES and not key.startswith("SLURM")}
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), **more}


def command(launcher, *arguments):
    script = [sys.executable, "-m", "tests.plugin.launched", *map(str, arguments)]
    if launcher == "torchrun":
        script[1:2] = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "-m"]
    return script


@pytest.mark.parametrize("launcher", ["lightning", "torchrun", "fork"])
def test_a_script_trains_saves_and_exports_under(launcher, tmp_path):
    strategy = "zero_stage_2_fork" if launcher == "fork" else "zero_stage_2"
    done = subprocess.run(
        command(launcher, tmp_path, strategy), env=environment(), text=True, capture_output=True, timeout=120
    )
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
        "    trainer = quiet_trainer('zero_stage_2_spawn', world_size=2, max_steps=2)\n"
        "    trainer.fit(model, datamodule=Data())\n"
        "    trainer.save_checkpoint(sys.argv[1] + '/weights')\n"
        "    assert not torch.equal(before, model.into.weight)\n"
        "    torch.save(model.state_dict(), sys.argv[1] + '/expected.pt')\n"
    )
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        env=environment(),
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    saved = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "weights")
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    assert not (tmp_path / "latest").exists()


def wait_for(what, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := what():
            return result
        time.sleep(0.05)
    raise AssertionError("it never came")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ranks_at(directory: Path, step: int):
    """The process number of each rank, once both are in that step."""
    told = [directory / f"rank{rank}" for rank in range(2)]
    fields = [path.read_text().split() for path in told if path.exists()]
    there = len(fields) == 2 and all(len(field) == 2 and int(field[1]) >= step for field in fields)
    return [int(field[0]) for field in fields] if there else None


def latest_step(save_dir: Path) -> int:
    tag = save_dir / (save_dir / "latest").read_text()
    manifest = read_manifest(tag)
    assert not list(find_problems(tag, manifest, "full"))
    return manifest.step


@pytest.mark.parametrize(("launcher", "rank"), [("lightning", 1), ("torchrun", 0)])
def test_sigterm_at_any_rank_ends_all_with_a_checkpoint_that_is_resumed_from(launcher, rank, tmp_path):
    run = subprocess.Popen(
        command(launcher, tmp_path, "zero_stage_2", 1000),
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        pids = wait_for(lambda: ranks_at(tmp_path, 5))
        os.kill(pids[rank], signal.SIGTERM)
        output, _ = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == 0, output
    wait_for(lambda: not any(is_running(pid) for pid in pids), seconds=20)
    stopped_at = latest_step(tmp_path / "ckpts")
    assert stopped_at >= 5
    more = command(launcher, tmp_path, "zero_stage_2", stopped_at + 2)
    done = subprocess.run(more, env=environment(), text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"ckpts/step={stopped_at}.ckpt" in done.stderr + done.stdout
    assert int((tmp_path / "rank0").read_text().split()[1]) == stopped_at + 2


def test_torchrun_restarts_what_was_killed_and_it_goes_on_from_the_last_checkpoint(tmp_path):
    script = command("torchrun", tmp_path, "zero_stage_2", 40, 5)
    script.insert(3, "--max_restarts=1")
    run = subprocess.Popen(script, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        os.kill(wait_for(lambda: ranks_at(tmp_path, 7))[1], signal.SIGKILL)
        output, _ = run.communicate(timeout=90)
    finally:
        run.kill()
    assert run.returncode == 0, output
    assert "ckpts/step=" in output
    assert latest_step(tmp_path / "ckpts") == 40


def test_one_interrupt_at_all_ranks_stops_them_together_with_a_checkpoint(tmp_path):
    run = subprocess.Popen(
        command("lightning", tmp_path, "zero_stage_2", 1000),
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
    )
    try:
        pids = wait_for(lambda: ranks_at(tmp_path, 5))
        os.killpg(run.pid, signal.SIGINT)  # as Ctrl+C does in a terminal
        output, _ = run.communicate(timeout=30)
    finally:
        run.kill()
    assert "training stops after this batch" in output
    assert latest_step(tmp_path / "ckpts") >= 5
    wait_for(lambda: not any(is_running(pid) for pid in pids), seconds=20)


def test_slurms_signal_at_one_rank_saves_and_requeues_and_the_next_job_goes_on(tmp_path):
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n')
    scontrol.chmod(0o755)

    def job(steps):
        port = str(free_port())
        return [
            subprocess.Popen(
                command("srun", tmp_path, "zero_stage_2", steps),
                env=environment(
                    PATH=f"{scontrol.parent}:{os.environ['PATH']}",
                    SLURM_JOB_NAME="train",
                    SLURM_JOB_ID="4711",
                    SLURM_NTASKS="2",
                    SLURM_NTASKS_PER_NODE="2",
                    SLURM_PROCID=str(rank),
                    SLURM_LOCALID=str(rank),
                    SLURM_NODEID="0",
                    MASTER_PORT=port,
                ),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank in range(2)
        ]

    tasks = job(1000)
    try:
        wait_for(lambda: ranks_at(tmp_path, 5))
        tasks[1].send_signal(signal.SIGUSR1)
        wait_for(lambda: (tmp_path / "scontrol.log").exists())
        assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n"
    finally:
        for task in tasks:
            task.kill()  # as SLURM does with a job that is requeued, in the end
            task.communicate()
    assert (tmp_path / "latest").read_text() == "hpc_ckpt_1.ckpt"
    saved_at = latest_step(tmp_path)
    assert saved_at >= 5

    tasks = job(saved_at + 3)
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "hpc_ckpt_1.ckpt" in outputs[0]
    assert int((tmp_path / "rank0").read_text().split()[1]) == saved_at + 3
