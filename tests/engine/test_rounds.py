"""Buckets that share a round, as models of many buckets on many ranks have them: see [Note: rounds]."""

import pytest
import torch
import torch.distributed as dist

from lightning_zero.engine.collectives import ExchangeCollectives, HostCollectives, NativeCollectives, collectives_for
from lightning_zero.segments import Shards
from tests.engine.long_rounds import cut_in_long_rounds
from tests.engine.test_against_ddp import OPTIMIZERS, Net, assert_same, groups, loss_of, train_side_by_side
from tests.launch import distributed, run_ranks


def owners_of(partition):
    return [[owner for owner, *_ in bucket.plan.shards] for bucket in partition.buckets]


@distributed(world_size=2)
def test_long_rounds_equal_ddp_bit_for_bit():
    for most_cuts in (2, 4, 6):
        cut_in_long_rounds(most_cuts)
        for name in ("adamw", "nesterov"):
            for stage in (1, 2):
                for collectives in (collectives_for, HostCollectives, NativeCollectives):
                    ours, theirs, partition, _ = train_side_by_side(
                        OPTIMIZERS[name], stage=stage, steps=5, collectives=collectives
                    )
                    assert_same(ours, theirs)
                    assert min(map(len, owners_of(partition))) < 2, "every bucket has a part on each rank"


@distributed(world_size=3)
def test_three_ranks_of_which_some_own_nothing_of_a_bucket_equal_ddp():
    cut_in_long_rounds(3)
    ours, theirs, partition, optimizer = train_side_by_side(OPTIMIZERS["nesterov"], stage=2, clip=0.1)
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)
    held = torch.tensor(sum(segment.master.numel() for segment in partition.segments(optimizer)))
    dist.all_reduce(held)
    assert held == sum(parameter.numel() for parameter in ours.parameters())


@distributed(world_size=2)
def test_clipping_in_long_rounds_equals_torchs():
    cut_in_long_rounds(2)
    ours, theirs, *_ = train_side_by_side(OPTIMIZERS["nesterov"], stage=2, clip=0.1)
    assert_same(ours, theirs, rtol=1e-6, atol=1e-7)


def train(most_cuts, dtype, stage, accumulate):
    """Every parameter after some steps, and every whole state."""
    from lightning_zero.engine.partition import Partition

    cut_in_long_rounds(most_cuts)
    net = Net().to(dtype)
    optimizer = OPTIMIZERS["adamw"](groups(net))
    partition = Partition(net, [optimizer], collectives_for(dist.group.WORLD), stage=stage, bucket_bytes=300)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(accumulate):
            net(torch.randn(4, 3, 6, 6, generator=generator).to(dtype)).pow(2).mean().backward()
            partition.flush()
        optimizer.step()
    assert sum(gradient.numel() for gradient in partition.gradients()) > 0
    return [partition.full_state(parameter) for parameter in net.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [1, 2])
def test_rounds_change_nothing_of_what_is_computed(dtype, stage):
    short, long = (run_ranks(train, 3, most_cuts, dtype, stage, 2) for most_cuts in (10**6, 3))
    for ours, theirs in zip(short, long, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


@distributed(world_size=3)
def test_every_way_of_sending_brings_each_owner_its_shard():
    rank = dist.get_rank()
    cuts = [
        Shards(range(3), (0, 4, 8, 12)),
        Shards(range(3), (0, 5, 8, 12)),
        Shards(range(3), (0, 0, 12, 12)),
        Shards(range(1, 3), (0, 7, 12)),
        Shards((0, 2), (0, 7, 12)),
        Shards((1,), (0, 12)),
        Shards((), (0,)),
    ]
    for make in (ExchangeCollectives, HostCollectives, NativeCollectives):
        collectives = make(dist.group.WORLD)
        for shards in cuts:
            start, stop = shards.of(rank)
            for accumulate in (False, True):
                for dtype in (torch.float32, torch.float64):
                    flat = torch.arange(float(shards.numel)) + 100 * rank
                    out = torch.ones(stop - start, dtype=dtype)
                    collectives.reduce_scatter(flat, shards, out, accumulate=accumulate).wait()
                    summed = 3 * torch.arange(float(shards.numel), dtype=dtype) + 300
                    assert torch.equal(out, summed[start:stop] + accumulate), (make, shards)
            flat = torch.full((shards.numel,), -1.0)
            flat[start:stop] = torch.arange(float(shards.numel))[start:stop]
            collectives.all_gather(flat, shards).wait()
            assert torch.equal(flat, torch.arange(float(shards.numel))), (make, shards)


@distributed(world_size=2)
def test_a_full_gradient_does_not_outlive_its_bucket_on_a_rank_that_owns_none_of_it():
    from lightning_zero.engine.partition import Partition

    cut_in_long_rounds(2)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    partition = Partition(net, [optimizer], collectives_for(dist.group.WORLD), stage=2, bucket_bytes=300)
    loss_of(net, None).backward()
    partition.flush()
    partition.reducer.finish()
    assert not any(type(parameter.grad) is torch.Tensor for parameter in net.parameters())
    held = sum(bucket.gradient_bytes for bucket in partition.buckets)
    assert held <= 4 * sum(bucket.plan.numel for bucket in partition.buckets) / 2 + 64
