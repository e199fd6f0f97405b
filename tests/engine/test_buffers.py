"""Memory that is used again, and what must not be."""

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lightning_zero.engine.buffers import VacatedMemory, is_unshared
from lightning_zero.engine.collectives import collectives_for
from lightning_zero.engine.partition import Partition
from tests.launch import distributed

CPU = torch.device("cpu")


def test_what_a_parameter_has_left_is_used_for_what_fits():
    vacated, left = VacatedMemory(4096), torch.ones(256)
    begins = left.data_ptr()
    vacated.keep(left)
    del left
    first, second = (vacated.empty((8, 12), torch.float32, CPU) for _ in range(2))
    assert first.data_ptr() == begins
    assert second.data_ptr() == begins + 8 * 12 * 4
    assert vacated.empty((512,), torch.float32, CPU).data_ptr() != begins + 2 * 8 * 12 * 4  # too large for the rest


def test_memory_that_somebody_else_can_see_is_left_to_them():
    array = np.ones(256, np.float32)
    seen, alias = torch.ones(256), []
    alias.append(seen.view(16, 16))
    for left in (torch.from_numpy(array), seen, torch.ones(256).share_memory_()):
        vacated, begins = VacatedMemory(4096), left.data_ptr()
        vacated.keep(left)
        assert vacated.empty((256,), torch.float32, CPU).data_ptr() != begins


def test_memory_with_one_view_is_shared_whatever_torch_counts():
    memory = torch.ones(256)
    assert is_unshared(memory)
    view = memory.view(-1)
    assert not is_unshared(memory)
    del view
    assert is_unshared(memory)


def test_no_more_is_kept_than_will_be_needed():
    vacated = VacatedMemory(1024)
    for _ in range(2):
        vacated.keep(torch.ones(256))
    assert len(vacated._blocks) == 1
    vacated.release()
    vacated.keep(torch.ones(1))
    assert not vacated._blocks


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
    def trained(state_bytes):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
        memory = {p.data_ptr() for p in net.parameters()}
        optimizer = torch.optim.AdamW(net.parameters())
        partition = Partition(
            net,
            [optimizer],
            collectives_for(dist.group.WORLD),
            stage=2,
            bucket_bytes=10**6,
            state_bytes_to_load=state_bytes,
        )
        return net, optimizer, partition, memory

    net, optimizer, partition, _ = trained(0)
    net(torch.ones(4, 40)).pow(2).mean().backward()
    partition.flush()
    optimizer.step()
    whole = partition.whole_state_dict(optimizer)
    _, optimizer, partition, memory = trained(2 * 4 * 40 * 41)
    partition.load_state(optimizer, whole)
    partition.release_vacated()
    states = [segment.state["exp_avg"] for segment in partition.segments(optimizer)]
    assert any(state.untyped_storage().data_ptr() in memory for state in states)
    again = {**whole, "state": {k: {**s, "exp_avg": s["exp_avg"] + 1} for k, s in whole["state"].items()}}
    partition.load_state(optimizer, _in_a_file(again))
    for before, segment in zip(states, partition.segments(optimizer), strict=True):
        assert segment.state["exp_avg"].data_ptr() == before.data_ptr()
        index = [name for name, _ in net.named_parameters()].index(segment.name)
        expected = again["state"][index]["exp_avg"].view(-1)[segment.start : segment.stop]
        assert torch.equal(segment.state["exp_avg"].view(-1), expected)
