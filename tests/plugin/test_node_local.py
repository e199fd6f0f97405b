"""Two nodes with a disk each: what is on neither's is still found, or named.

Both ranks give the same path, as on two machines; it leads through the working directory, which is each rank's own.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

from lightning_zero import ZeroCheckpoint, ZeroCheckpointIO, ZeroStrategy
from lightning_zero.checkpoint import nodes
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.errors import CheckpointNotFoundError, CheckpointWriteError, IncompleteCheckpointError
from tests.launch import run_ranks
from tests.models import fit
from tests.plugin.test_checkpoints import Snapshot, assert_same

SAVE_DIR = "/proc/self/cwd/ckpts"
RANKS_OF_A_NODE = 2


def on_its_node(root, body, *args, **kwargs):
    rank = int(os.environ["RANK"])
    node = rank // RANKS_OF_A_NODE
    os.environ |= {"NODE_RANK": str(node), "GROUP_RANK": str(node), "LOCAL_RANK": str(rank % RANKS_OF_A_NODE)}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}  # as torchrun starts them
    (root / f"node{node}").mkdir(exist_ok=True)
    os.chdir(root / f"node{node}")
    return body(*args, **kwargs)


def run_nodes(root, body, *args, **kwargs):
    return run_ranks(on_its_node, 4, root, body, *args, process_group=False, **kwargs)


def train(max_steps, *, resume=None, node_local=True, load=None, **options):
    strategy = ZeroStrategy(checkpoint_io=ZeroCheckpointIO(node_local=node_local, **options))
    snapshot = Snapshot()
    model, trainer = fit(
        strategy=strategy,
        world_size=2,
        num_nodes=2,
        max_steps=max_steps,
        ckpt_path=resume,
        callbacks=[snapshot],
    )
    return model, trainer, snapshot


def save(step, **options):
    _, trainer, snapshot = train(step, **options)
    trainer.strategy.save_zero_checkpoint(SAVE_DIR)
    return snapshot.at_end


def resumed(step, **options):
    return train(step, resume=SAVE_DIR, **options)[2].at_start


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    states = [run_nodes(root, save, step)[0] for step in (2, 3)]
    return root, states


@pytest.fixture
def root(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "root")
    return tmp_path / "root"


def test_every_node_has_the_whole_checkpoint_and_any_number_of_nodes_resumes(saved, root):
    for node in ("node0", "node1"):
        assert sorted(os.listdir(root / node / "ckpts")) == ["global_step2", "global_step3", "latest"]
        for step in (2, 3):
            checkpoint = Checkpoint(root / node / "ckpts" / f"global_step{step}", verify="full")
            assert checkpoint.manifest.world_size == 4
    for state in run_nodes(root, resumed, 4):
        assert_same(state, saved[1][1])
    shutil.rmtree(root / "node0")
    assert torch.equal(
        Checkpoint(root / "node1" / "ckpts" / "global_step3").state_dict()["into.weight"],
        saved[1][1]["into.weight"]["param"],
    )


def test_a_node_without_the_newest_checkpoint_has_all_take_an_older_one(saved, root):
    (root / "node1" / "ckpts" / "global_step3" / "rank-00000-of-00004.safetensors").unlink()
    for state in run_nodes(root, resumed, 4):
        assert_same(state, saved[1][0])


def missing(tag):
    with pytest.raises(
        IncompleteCheckpointError, match=r"rank [23] on .*needs the directory whole.*rank-00001-of-00004"
    ):
        train(4, resume=f"{SAVE_DIR}/{tag}")


def nowhere():
    with pytest.raises(CheckpointNotFoundError, match=r"rank [23] on .*needs the directory whole"):
        train(4, resume=SAVE_DIR)


def test_what_a_node_cannot_reach_is_named_with_the_node(root):
    for step in (2, 3):
        (root / "node1" / "ckpts" / f"global_step{step}" / "rank-00001-of-00004.safetensors").unlink()
    run_nodes(root, missing, "global_step3")
    run_nodes(root, nowhere)


def go_on_from_last():
    strategy = ZeroStrategy(checkpoint_io=ZeroCheckpointIO(node_local=True))
    callback = ZeroCheckpoint(SAVE_DIR)
    fit(strategy=strategy, world_size=2, num_nodes=2, max_steps=4, callbacks=[callback], ckpt_path="last")


def lost():
    with pytest.raises(CheckpointNotFoundError, match=r"nothing for rank 2 on .*, rank 3 on "):
        go_on_from_last()


def test_a_node_that_has_lost_its_disk_is_named_where_the_others_go_on_from_the_last_checkpoint(root):
    shutil.rmtree(root / "node1")
    run_nodes(root, lost)


def closed():
    with pytest.raises(CheckpointWriteError, match="rank 2: nothing can be written to"):
        go_on_from_last()


def test_a_node_that_nothing_can_be_written_on_ends_a_fit_when_it_begins(tmp_path):
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "ckpts").write_text("no directory")
    run_nodes(tmp_path, closed)


def fail_on_the_second_node():
    receive = nodes._receive

    def full(path, transfer, *args, **kwargs):
        if transfer.name.startswith("rank-00001"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(nodes, "create_file", no_room)
                receive(path, transfer, *args, **kwargs)
        else:
            receive(path, transfer, *args, **kwargs)

    def no_room(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes, "_receive", full)
        with pytest.raises(CheckpointWriteError, match=r"rank 2 .*No space left"):
            save(4)


def test_a_full_disk_on_one_node_fails_all_and_changes_nothing(root):
    run_nodes(root, fail_on_the_second_node)
    for node in ("node0", "node1"):
        assert sorted(os.listdir(root / node / "ckpts")) == ["global_step2", "global_step3", "latest"]
        assert (root / node / "ckpts" / "latest").read_text() == "global_step3"


def not_shared():
    with pytest.raises(CheckpointWriteError, match=r"node_local=True|not visible"):
        save(2, node_local=False)


def test_disks_that_are_not_shared_are_an_error_without_the_option(tmp_path):
    run_nodes(tmp_path, not_shared)
    assert not [path for path in Path(tmp_path).rglob("*") if path.is_file()]
