"""The engine alone, without Lightning, beside torch's own DistributedDataParallel in the same processes."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_zero.engine.collectives import HostCollectives, collectives_for
from lightning_zero.engine.partition import Partition
from tests.launch import distributed

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, lr_decay=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "asgd": lambda p: torch.optim.ASGD(p),
}


class Net(nn.Module):
    """Odd sizes, a 0-d and an empty parameter, one that is used twice, and a channels-last weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.shared = nn.Linear(5, 5)
        self.out = nn.Linear(5, 7)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0))
        self.norm = nn.LayerNorm(7)

    def forward(self, x):
        x = self.conv(x).mean(dim=(2, 3))
        x = self.shared(torch.tanh(self.shared(x)))
        return self.norm(self.out(x)) * self.scale + self.nothing.sum()


def loss_of(module, generator):
    return module(torch.randn(4, 3, 6, 6, generator=generator)).pow(2).mean()


def groups(module):
    parameters = list(module.parameters())
    return [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.01}]


def train_side_by_side(
    make_optimizer, *, stage, steps=20, clip=None, bucket_bytes=300, collectives=collectives_for, **options
):
    net = Net()
    reference = DistributedDataParallel(copy.deepcopy(net))
    optimizer, reference_optimizer = make_optimizer(groups(net)), make_optimizer(groups(reference))
    partition = Partition(
        net, [optimizer], collectives(dist.group.WORLD), stage=stage, bucket_bytes=bucket_bytes, **options
    )
    ours, theirs = (torch.Generator().manual_seed(dist.get_rank()) for _ in range(2))
    for _ in range(steps):
        optimizer.zero_grad()
        reference_optimizer.zero_grad()
        loss_of(net, ours).backward()
        partition.flush()
        loss_of(reference, theirs).backward()
        if clip is not None:
            norm = partition.clip_grad_norm_(clip)
            torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), clip), rtol=1e-6, atol=0)
        optimizer.step()
        reference_optimizer.step()
    return net, reference.module, partition, optimizer


def assert_same(ours, theirs, **tolerance):
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            a, b, **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, name=name: f"{name}: {m}"
        )


@distributed(world_size=2)
def test_every_element_wise_optimizer_equals_ddp_bit_for_bit_on_two_ranks():
    for name, make_optimizer in OPTIMIZERS.items():
        for stage in (1, 2):
            ours, theirs, *_ = train_side_by_side(make_optimizer, stage=stage)
            try:
                assert_same(ours, theirs)
            except AssertionError as error:
                raise AssertionError(f"{name}, stage {stage}") from error


@distributed(world_size=1)
def test_one_rank_equals_ddp_bit_for_bit():
    for make_optimizer in OPTIMIZERS.values():
        ours, theirs, *_ = train_side_by_side(make_optimizer, stage=2)
        assert_same(ours, theirs)


@distributed(world_size=2)
def test_the_way_by_the_host_gives_the_same():
    # as gloo needs it for tensors of a device; here the host is the device
    for name in ("adamw", "nesterov"):
        for stage in (1, 2):
            ours, theirs, *_ = train_side_by_side(OPTIMIZERS[name], stage=stage, collectives=HostCollectives)
            assert_same(ours, theirs)


@distributed(world_size=3)
def test_three_ranks_equal_ddp_up_to_the_order_of_summation():
    ours, theirs, *_ = train_side_by_side(OPTIMIZERS["nesterov"], stage=2)
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


@distributed(world_size=2)
def test_whole_parameters_equal_ddp_too():
    ours, theirs, partition, optimizer = train_side_by_side(OPTIMIZERS["adamw"], stage=2, partition="parameter")
    assert_same(ours, theirs)
    shapes = {name: parameter.shape for name, parameter in ours.named_parameters()}
    assert all(segment.master.shape in (shapes[segment.name], (1,)) for segment in partition.segments(optimizer))


@distributed(world_size=2)
def test_clipping_by_norm_equals_torchs():
    ours, theirs, *_ = train_side_by_side(OPTIMIZERS["nesterov"], stage=2, clip=0.1)
    assert_same(ours, theirs, rtol=1e-6, atol=1e-7)


@distributed(world_size=2)
def test_the_groups_hold_the_users_parameters_and_the_state_is_one_half():
    net, _, partition, optimizer = train_side_by_side(OPTIMIZERS["adamw"], stage=2, steps=2)
    mine = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(a is b for a, b in zip(mine, net.parameters(), strict=True))
    total = sum(parameter.numel() for parameter in net.parameters())
    held = sum(segment.state["exp_avg"].numel() for segment in partition.segments(optimizer))
    assert abs(held - total / 2) <= 16 * len(partition.buckets)


@distributed(world_size=2)
def test_a_full_gradient_does_not_outlive_its_bucket():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    partition = Partition(net, [optimizer], collectives_for(dist.group.WORLD), stage=2, bucket_bytes=300)
    alive = []
    original = partition.reducer._on_gradient

    def spy(index, slot):
        original(index, slot)
        alive.append(sum(type(p.grad) is torch.Tensor for p in net.parameters()))

    partition.reducer._on_gradient = spy
    loss_of(net, None).backward()
    partition.flush()
    assert len(alive) == len(list(net.parameters()))
    assert max(alive) == 0


@distributed(world_size=2)
def test_accumulated_gradients_are_those_of_the_whole_batch():
    for stage in (1, 2):
        net = Net()
        reference = copy.deepcopy(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        partition = Partition(net, [optimizer], collectives_for(dist.group.WORLD), stage=stage, bucket_bytes=300)
        generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
        for micro in range(3):
            if micro < 2:
                with partition.no_sync():
                    loss_of(net, generators[dist.get_rank()]).backward()
                    partition.flush()
            else:
                loss_of(net, generators[dist.get_rank()]).backward()
                partition.flush()
        for generator in [torch.Generator().manual_seed(rank) for rank in range(2)]:
            for _ in range(3):
                (loss_of(reference, generator) / 2).backward()
        partition.gradients()
        for segment in partition.segments(optimizer):
            expected = dict(reference.named_parameters())[segment.name].grad.reshape(-1)[segment.start : segment.stop]
            torch.testing.assert_close(segment.master.grad.view(-1), expected, rtol=1e-4, atol=1e-6)


@distributed(world_size=2)
def test_zero_grad_of_every_kind_clears_what_the_segments_hold():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    partition = Partition(net, [optimizer], collectives_for(dist.group.WORLD), stage=2, bucket_bytes=300)

    def backward():
        loss_of(net, torch.Generator().manual_seed(0)).backward()
        partition.flush()

    def norm_after(clear):
        backward()
        clear()
        backward()
        return partition.grad_norm()

    once = norm_after(optimizer.zero_grad)
    for clear in (
        lambda: optimizer.zero_grad(set_to_none=True),
        lambda: optimizer.zero_grad(set_to_none=False),
        lambda: net.zero_grad(set_to_none=False),
        net.zero_grad,
    ):
        optimizer.zero_grad()
        torch.testing.assert_close(norm_after(clear), once)
    torch.testing.assert_close(norm_after(lambda: None), 3 * once)


@distributed(world_size=2)
def test_whoever_is_copying_states_is_told_before_a_step_hook_may_change_them():
    net, told = Net(), []
    optimizer = torch.optim.AdamW(net.parameters())
    partition = Partition(
        net,
        [optimizer],
        collectives_for(dist.group.WORLD),
        stage=2,
        bucket_bytes=300,
        before_change=lambda: told.append("told"),
    )
    optimizer.register_step_pre_hook(lambda *_: told.append("hook"))
    loss_of(net, torch.Generator().manual_seed(0)).backward()
    partition.flush()
    optimizer.step()
    assert told == ["told", "hook", "told"]


@distributed(world_size=2)
def test_a_parameter_without_a_gradient_anywhere_is_not_stepped_and_one_with_a_gradient_somewhere_is():
    torch.manual_seed(0)
    net = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("both", "one", "none")})
    before = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    partition = Partition(net, [optimizer], collectives_for(dist.group.WORLD), stage=2, bucket_bytes=64)
    for _ in range(2):
        optimizer.zero_grad()
        loss = net["both"](torch.ones(1, 4)).sum()
        if dist.get_rank() == 1:
            loss = loss + net["one"](torch.ones(1, 4)).sum()
        loss.backward()
        partition.flush()
        optimizer.step()
    moved = {name: not torch.equal(net[name].weight, before[name].weight) for name in net}
    assert moved == {"both": True, "one": True, "none": False}
    peers = [torch.empty(4, 4) for _ in range(2)]
    dist.all_gather(peers, net["one"].weight.detach().clone())
    assert torch.equal(*peers)


@distributed(world_size=2)
def test_what_is_written_into_a_parameter_from_outside_is_not_undone_by_the_next_step():
    for dtype in (torch.float32, torch.bfloat16):
        net = nn.Sequential(nn.Linear(6, 40), nn.Linear(40, 3)).to(dtype)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        partition = Partition(net, [optimizer], collectives_for(dist.group.WORLD), stage=2, bucket_bytes=10**6)
        with torch.no_grad():
            net[0].weight.data.fill_(0.25)
            net[1].bias.clamp_(-0.01, 0.01)
        expected = copy.deepcopy(net)
        net(torch.ones(2, 6, dtype=dtype)).sum().backward()
        partition.flush()
        optimizer.step()
        assert_same(net, expected)


@distributed(world_size=2)
def test_masters_of_a_16_bit_model_accumulate_what_16_bits_lose():
    torch.manual_seed(0)
    net = nn.Linear(64, 64).bfloat16()
    start = net.weight.detach().float()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
    partition = Partition(net, [optimizer], collectives_for(dist.group.WORLD), stage=2, bucket_bytes=10**6)
    for _ in range(50):
        optimizer.zero_grad()
        net(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
        partition.flush()
        optimizer.step()
    whole = partition.full_state(net.weight)["param"]
    torch.testing.assert_close(whole, start - 50 * 1e-5, rtol=0, atol=1e-6)
    assert torch.equal(net.weight.detach(), whole.bfloat16())


@distributed(world_size=2)
def test_full_state_is_put_together_from_all_ranks():
    net, reference, partition, _optimizer = train_side_by_side(OPTIMIZERS["adamw"], stage=1)
    for parameter, other in zip(net.parameters(), reference.parameters(), strict=True):
        if parameter.numel():
            state = partition.full_state(parameter)
            assert torch.equal(state["param"], other.detach())
            assert state["exp_avg"].shape == parameter.shape
            assert state["step"] == 20


@distributed(world_size=2)
def test_a_group_that_is_added_later_is_partitioned_and_trained():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    reference = DistributedDataParallel(copy.deepcopy(net))
    optimizer = torch.optim.Adam(net[1].parameters(), lr=0.1)
    other = torch.optim.Adam(reference.module[1].parameters(), lr=0.1)
    partition = Partition(net, [optimizer], collectives_for(dist.group.WORLD), stage=2, bucket_bytes=10**6)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": list(net[0].parameters()), "lr": 0.01})
            other.add_param_group({"params": list(reference.module[0].parameters()), "lr": 0.01})
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        net.zero_grad()
        reference.zero_grad()
        net(x).sum().backward()
        partition.flush()
        reference(x).sum().backward()
        optimizer.step()
        other.step()
    assert_same(net, reference.module)
    a_parameter_takes_the_name_of_another()
    a_group_is_added_between_two_backwards()


def a_group_is_added_between_two_backwards():
    net, x = nn.Linear(8, 8, bias=False), torch.ones(1, 8)
    late = nn.Parameter(torch.ones(8))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    Partition(net, [optimizer], collectives_for(dist.group.WORLD), stage=2, bucket_bytes=10**6)
    net(x * late).sum().backward()
    optimizer.add_param_group({"params": [late]})
    net(x * late).sum().backward()
    expected = late.detach() - 2 * net.weight.detach().sum(0)
    optimizer.step()
    torch.testing.assert_close(late.detach(), expected)


def a_parameter_takes_the_name_of_another():
    net = nn.Linear(8, 8)
    optimizer = torch.optim.Adam([net.bias])
    partition = Partition(net, [optimizer], collectives_for(dist.group.WORLD), stage=2, bucket_bytes=10**6)
    net.bias = nn.Parameter(torch.ones(8))
    optimizer.param_groups[0]["params"] = list(net.parameters())
    partition.take_in_new_parameters()
    net(torch.ones(1, 8)).sum().backward()
    partition.flush()
    assert nn.utils.get_total_norm([net.bias.grad]) == torch.ones(8).norm()


@distributed(world_size=2)
def test_after_detach_the_module_and_the_optimizer_are_the_users_again():
    net, _, partition, optimizer = train_side_by_side(OPTIMIZERS["nesterov"], stage=2, steps=2)
    partition.detach()
    assert optimizer.step.__func__ is type(optimizer).step
    loss_of(net, None).backward()
    assert all(type(parameter.grad) is torch.Tensor for parameter in net.parameters())


@distributed(world_size=2)
def test_two_optimizers_with_backwards_in_between_equal_ddp():
    torch.manual_seed(0)
    net = nn.ModuleDict({"g": nn.Linear(3, 3), "d": nn.Linear(3, 3)})
    reference = copy.deepcopy(net)
    wrapped = {name: DistributedDataParallel(module) for name, module in reference.items()}
    ours = {name: torch.optim.Adam(net[name].parameters(), lr=0.1) for name in net}
    theirs = {name: torch.optim.Adam(reference[name].parameters(), lr=0.1) for name in net}
    partition = Partition(net, list(ours.values()), collectives_for(dist.group.WORLD), stage=2, bucket_bytes=10**6)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(5):
        for name in ("g", "d", "d"):
            x = torch.randn(2, 3, generator=generator)
            ours[name].zero_grad()
            theirs[name].zero_grad()
            net[name](x).pow(2).sum().backward()
            partition.flush()
            wrapped[name](x).pow(2).sum().backward()
            ours[name].step()
            theirs[name].step()
    assert_same(net, reference)
