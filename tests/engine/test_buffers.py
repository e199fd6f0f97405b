"""Memory that is used again, and what must not be."""

import copy
import io
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_zero.checkpoint.content import RankContent, TensorToSave
from lightning_zero.checkpoint.snapshot import Snapshot
from lightning_zero.engine.buffers import StateMemory, is_unshared
from lightning_zero.engine.collectives import collectives_for
from lightning_zero.engine.partition import Partition
from tests.launch import distributed

CPU = torch.device("cpu")


def expecting(nbytes):
    """Memory for a state of so many bytes, for which parameters are going to leave as much."""
    memory = StateMemory()
    memory.expect([(nbytes // 4, nbytes)], [nbytes])
    return memory


def test_what_a_parameter_has_left_is_used_for_what_fits():
    memory, left = expecting(1024), torch.ones(256)
    begins = left.data_ptr()
    memory.keep(left)
    del left
    first, second = (memory.empty((8, 12), torch.float32, CPU) for _ in range(2))
    assert first.data_ptr() == begins
    assert second.data_ptr() == begins + 8 * 12 * 4
    assert memory.empty((512,), torch.float32, CPU).data_ptr() != begins + 2 * 8 * 12 * 4  # too large for the rest


def test_memory_that_somebody_else_can_see_is_left_to_them():
    array = np.ones(256, np.float32)
    seen, alias = torch.ones(256), []
    alias.append(seen.view(16, 16))
    for left in (torch.from_numpy(array), seen, torch.ones(256).share_memory_()):
        memory, begins = expecting(1024), left.data_ptr()
        memory.keep(left)
        assert memory.empty((256,), torch.float32, CPU).data_ptr() != begins


def test_memory_with_one_view_is_shared_whatever_torch_counts():
    memory = torch.ones(256)
    assert is_unshared(memory)
    view = memory.view(-1)
    assert not is_unshared(memory)
    del view
    assert is_unshared(memory)


def test_no_more_is_kept_than_will_be_needed():
    memory = expecting(1024)
    for _ in range(2):
        memory.keep(torch.ones(256))
    assert len(memory._blocks) == 1
    memory.release()
    memory.keep(torch.ones(1))
    assert not memory._blocks


def test_all_states_find_room_in_what_parameters_leave_and_what_was_touched():
    memory = StateMemory()
    # AdamW's two states each. Two fit just, one into the third parameter's memory, two into what that one leaves of it
    memory.expect([(1000, 8004), (750, 6004), (100, 804)], [4000, 4000, 4000])
    for _ in range(4):
        memory.keep(torch.ones(1000))
    assert memory._sizes == [4000, 4000, 4000]
    for numel in (1000, 1000, 750, 750, 100, 100):
        tensor = memory.empty((numel,), torch.float32, CPU)
        assert tensor.untyped_storage().nbytes() == numel * 4
    assert sum(memory._sizes) < 500


def test_no_state_keeps_memory_that_is_much_larger():
    memory = StateMemory()
    memory.expect([(100, 804)], [4000])
    memory.keep(torch.ones(1000))
    assert not memory._blocks


def test_what_parameters_dont_leave_is_touched_ahead_of_time_in_one_block():
    memory = StateMemory()
    # Two states each: the first one's fit nowhere, four small ones need 1600
    memory.expect([(1000, 8000), (100, 800), (100, 800)], [400])
    left = torch.ones(100)
    left_at = left.data_ptr()
    memory.keep(left)
    del left
    made = [memory.empty((numel,), torch.float32, CPU) for numel in (1000, 1000, 100, 100, 100, 100)]
    begins = sorted(tensor.data_ptr() for tensor in made if tensor.data_ptr() != left_at)
    assert len(begins) == 5
    assert begins[-1] + 400 - begins[0] < 2 * 4000 + 3 * 400 + 1024
    assert not any(tensor.data_ptr() % 4 for tensor in made)
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    assert [float(tensor.sum()) / len(tensor) for tensor in made] == [0, 1, 2, 3, 4, 5]


def test_one_state_is_copied_or_saved_without_the_others():
    memory = StateMemory()
    memory.expect([(1000, 8000)], [])
    states = [memory.empty((10, 100), dtype, CPU).fill_(2) for dtype in (torch.float32, torch.bfloat16)]
    for state in states:
        assert copy.deepcopy(state).untyped_storage().nbytes() == state.nbytes
        file = io.BytesIO()
        torch.save(state, file)
        assert len(file.getvalue()) < state.nbytes + 2000
    memory.release()
    assert all(float(state.sum()) == 2000 for state in states)


def test_where_there_is_too_little_memory_whoever_needs_it_is_told():
    memory = StateMemory()
    memory.expect([(1 << 58, 1 << 60)], [])
    with pytest.raises(RuntimeError, match="memory"):
        memory.empty((1 << 58,), torch.float32, CPU)
    memory.expect([(1 << 58, 1 << 60)], [])
    memory.release()


def test_where_there_can_be_no_more_threads_memory_is_cold(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    memory, snapshot = StateMemory(), Snapshot()
    memory.expect([(1000, 8000)], [])
    assert memory.empty((1000,), torch.float32, CPU).fill_(1).sum() == 1000
    snapshot.reserve(1000, pinned=False)
    content = RankContent([TensorToSave("model", "weight", 0, 3, torch.arange(3.0))], [], b"", 1)
    assert snapshot.take(content).tensors[0].tensor.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("module", "touch"),
    [
        ("engine.buffers", "StateMemory().expect([(1 << 28, 1 << 30)], [])"),
        ("checkpoint.snapshot", "Snapshot().reserve(1 << 30, pinned=False)"),
    ],
)
def test_a_process_may_end_while_memory_is_touched(module, touch):
    lines = ("import sys", f"from lightning_zero.{module} import *", touch, "sys.exit(3)")
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert ended.returncode == 3, ended.stderr


class InAFile(torch.Tensor):
    """Stands for a tensor that is still in a checkpoint."""

    def read_range(self, start, stop, out):
        out.copy_(self.as_subclass(torch.Tensor).view(-1)[start:stop].view(out.shape))


def _in_a_file(whole):
    state = {
        index: {k: v.as_subclass(InAFile) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        for index, values in whole["state"].items()
    }
    return {**whole, "state": state}


@distributed(world_size=2)
def test_states_are_loaded_where_parameters_were_and_then_in_place():
    def partitioned(net, optimizer, state_bytes):
        return Partition(
            net,
            [optimizer],
            collectives_for(dist.group.WORLD),
            stage=2,
            bucket_bytes=10**6,
            state_bytes_to_load=state_bytes,
        )

    def trained(state_bytes):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
        memory = {p.data_ptr() for p in net.parameters()}
        optimizer = torch.optim.AdamW(net.parameters())
        return net, optimizer, partitioned(net, optimizer, state_bytes), memory

    net, optimizer, partition, _ = trained({})
    net(torch.ones(4, 40)).pow(2).mean().backward()
    partition.flush()
    optimizer.step()
    whole = partition.whole_state_dict(optimizer)
    sizes = {name: parameter.nbytes for name, parameter in net.named_parameters()}
    state_bytes = {name: 2 * nbytes for name, nbytes in sizes.items()}
    net, optimizer, partition, memory = trained(state_bytes)
    partition.load_state(optimizer, whole)
    partition.release_state_memory()
    states = [segment.state["exp_avg"] for segment in partition.segments(optimizer)]
    assert any(state.untyped_storage().data_ptr() in memory for state in states)
    again = {**whole, "state": {k: {**s, "exp_avg": s["exp_avg"] + 1} for k, s in whole["state"].items()}}
    partition.load_state(optimizer, _in_a_file(again))
    for before, segment in zip(states, partition.segments(optimizer), strict=True):
        assert segment.state["exp_avg"].data_ptr() == before.data_ptr()
        index = [name for name, _ in net.named_parameters()].index(segment.name)
        expected = again["state"][index]["exp_avg"].view(-1)[segment.start : segment.stop]
        assert torch.equal(segment.state["exp_avg"].view(-1), expected)
    partition.detach()
    memory = partitioned(net, optimizer, state_bytes)._state_memory
    assert (memory._wanted, memory._touching, memory._blocks) == (
        Counter(),
        [],
        [],
    )  # the optimizer has its states already
