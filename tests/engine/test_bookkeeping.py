"""What happens to gradients, states and memory off the straight path: each once went wrong, or nearly."""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_zero.engine import gradients as gradients_room
from lightning_zero.engine.buffers import is_unshared
from lightning_zero.engine.collectives import collectives_for
from lightning_zero.engine.partition import Partition
from lightning_zero.engine.stand_in import PartitionedGradient
from lightning_zero.errors import CheckpointMismatchError, UnsupportedModelError
from tests.launch import distributed

SMALL, LARGE = 300, 10**6  # bytes: a bucket for each layer, or one for all


def layers(*names, width=8):
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(width, width) for name in names})


def partitioned(net, *, stage=2, bucket_bytes=SMALL, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.1)
    return optimizer, Partition(
        net, [optimizer], collectives_for(dist.group.WORLD), stage=stage, bucket_bytes=bucket_bytes
    )


def batch(seed, rank=None):
    generator = torch.Generator().manual_seed(100 * seed + (dist.get_rank() if rank is None else rank))
    return torch.randn(4, 8, generator=generator)


def averaged(net, loss, seed):
    """The averaged gradients of a loss, by hand, on a copy."""
    reference = copy.deepcopy(net)
    for rank in range(dist.get_world_size()):
        (loss(reference, batch(seed, rank).requires_grad_(), rank) / dist.get_world_size()).backward()
    return {name: p.grad for name, p in reference.named_parameters()}


def assert_gradients(partition, optimizer, expected):
    partition.gradients()
    for segment in partition.segments(optimizer):
        whole = expected[segment.name]
        if whole is None:
            assert segment.master.grad is None
        else:
            part = whole.reshape(-1)[segment.start : segment.stop]
            torch.testing.assert_close(segment.master.grad.view(-1), part, rtol=1e-5, atol=1e-6)


@distributed(world_size=2)
def test_a_parameter_that_one_rank_alone_uses_does_not_stop_the_others():
    net = layers("extra", "a", "b", "c", "d")
    optimizer, partition = partitioned(net)

    def loss(net, x, rank):
        y = net["d"](net["c"](net["b"](net["a"](x)))).pow(2).mean()
        return y + net["extra"](x).pow(2).mean() if rank == 0 else y

    for seed in range(3):
        optimizer.zero_grad()
        expected = averaged(net, loss, seed)
        loss(net, batch(seed), dist.get_rank()).backward()
        partition.flush()
        assert_gradients(partition, optimizer, expected)
        optimizer.step()


@distributed(world_size=2)
def test_several_backwards_without_a_flush_in_between_add_up():
    for bucket_bytes in (SMALL, LARGE):
        net = layers("a", "unused", "b")
        optimizer, partition = partitioned(net, bucket_bytes=bucket_bytes)

        def loss(net, x, rank):
            return net["b"](net["a"](x)).pow(2).mean()

        once = averaged(net, loss, 0)
        for _ in range(3):
            loss(net, batch(0), None).backward()
        tripled = {name: None if g is None else 3 * g for name, g in once.items()}
        assert_gradients(partition, optimizer, tripled)


@distributed(world_size=2)
def test_a_layer_that_runs_again_in_a_reentrant_checkpoint_gets_all_its_gradients():
    for reentrant in (True, False):
        net = layers("shared", "other")
        optimizer, partition = partitioned(net)

        def loss(net, x, rank, reentrant=reentrant):
            x = x.clone().requires_grad_()
            for _ in range(3):
                x = checkpoint(net["shared"], x, use_reentrant=reentrant)
            return net["other"](x).pow(2).mean()

        expected = averaged(net, loss, 0)
        loss(net, batch(0), None).backward()
        partition.flush()
        assert_gradients(partition, optimizer, expected)


@distributed(world_size=2)
def test_gradients_that_were_dropped_stay_dropped():
    for bucket_bytes in (SMALL, LARGE):
        net = layers("a", "unused", "b")
        optimizer, partition = partitioned(net, bucket_bytes=bucket_bytes)

        def loss(net, x, rank):
            return net["b"](net["a"](x)).pow(2).mean()

        for drop in (net.zero_grad, lambda net=net: net.zero_grad(set_to_none=False)):
            for flushed in (True, False):
                optimizer.zero_grad()
                loss(net, batch(1), None).backward()
                if flushed:
                    partition.flush()
                drop()
                expected = averaged(net, loss, 2)
                loss(net, batch(2), None).backward()
                partition.flush()
                assert_gradients(partition, optimizer, expected)
        before = copy.deepcopy(net)
        optimizer.zero_grad()
        loss(net, batch(1), None).backward()
        optimizer.zero_grad()
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))


@distributed(world_size=2)
def test_one_gradient_that_was_dropped_is_replaced_and_its_neighbours_are_added_to():
    net = layers("a", "b")
    optimizer, partition = partitioned(net, bucket_bytes=LARGE)

    def loss(net, x, rank):
        return net["b"](net["a"](x)).pow(2).mean()

    first, second = averaged(net, loss, 1), averaged(net, loss, 2)
    loss(net, batch(1), None).backward()
    partition.flush()
    net["b"].weight.grad = None
    loss(net, batch(2), None).backward()
    partition.flush()
    expected = {name: second[name] + (0 if name == "b.weight" else first[name]) for name in first}
    assert_gradients(partition, optimizer, expected)


@distributed(world_size=2)
def test_what_accumulated_onto_a_stand_in_is_dropped_with_it():
    net = layers("a")
    optimizer, partition = partitioned(net, stage=1)

    def loss(net, x, rank):
        return net["a"](x).pow(2).mean()

    loss(net, batch(0), None).backward()
    partition.flush()
    optimizer.zero_grad(set_to_none=False)
    with partition.no_sync():
        loss(net, batch(1), None).backward()
    net.zero_grad()
    loss(net, batch(2), None).backward()
    partition.flush()
    assert_gradients(partition, optimizer, averaged(net, loss, 2))


@distributed(world_size=2)
def test_a_term_added_to_a_partitioned_gradient_is_added():
    net = layers("a")
    optimizer, partition = partitioned(net)

    def loss(net, x, rank):
        return net["a"](x).pow(2).mean()

    loss(net, batch(0), None).backward()
    partition.flush()
    memory = torch.empty(64)  # is written into again
    for parameter in net.parameters():
        assert isinstance(parameter.grad, PartitionedGradient)
        parameter.grad.add_(torch.mul(parameter.data, 2, out=memory[: parameter.numel()].view_as(parameter)))
        memory.zero_()
        parameter.grad.add_(parameter.data, alpha=0.5)
        parameter.grad.add_(1.0)
    expected = averaged(net, loss, 0)
    parameters = dict(net.named_parameters())
    assert_gradients(partition, optimizer, {n: g + 2.5 * parameters[n].data + 1 for n, g in expected.items()})


@distributed(world_size=2)
def test_at_stage_one_gradients_of_early_micro_batches_alone_are_reduced_too():
    for stage in (1, 2):
        net = layers("early", "a")
        optimizer, partition = partitioned(net, stage=stage)

        def loss(net, x, rank):
            return net["a"](net["early"](x)).pow(2).mean()

        def short(net, x, rank):
            return net["a"](x).pow(2).mean()

        one, two = averaged(net, loss, 1), averaged(net, short, 2)
        with partition.no_sync():
            loss(net, batch(1), None).backward()
            partition.flush()
        short(net, batch(2), None).backward()
        partition.flush()
        assert_gradients(partition, optimizer, {n: g if two[n] is None else g + two[n] for n, g in one.items()})


@distributed(world_size=2)
def test_an_optimizer_that_is_given_parameters_which_another_holds_steps_on_them():
    net = layers("a", "b")
    reference = copy.deepcopy(net)
    one, two = (torch.optim.SGD(net[name].parameters(), lr=0.1) for name in "ab")
    partition = Partition(net, [one, two], collectives_for(dist.group.WORLD), stage=2, bucket_bytes=SMALL)
    two.add_param_group({"params": list(net["a"].parameters()), "lr": 0.5})

    def loss(net, x, rank):
        return net["b"](net["a"](x)).pow(2).mean()

    gradients = averaged(net, loss, 0)
    loss(net, batch(0), None).backward()
    partition.flush()
    one.step()
    two.step()
    for name, parameter in reference.named_parameters():
        rate = 0.6 if name.startswith("a") else 0.1
        torch.testing.assert_close(net.get_parameter(name).data, parameter.data - rate * gradients[name])


@distributed(world_size=2)
def test_an_optimizer_that_needs_whole_parameters_is_refused_parts():
    net = layers("a", "b")

    class Mine(torch.optim.SGD):
        pass

    one, two = torch.optim.SGD(net["a"].parameters(), lr=0.1), Mine(net["b"].parameters(), lr=0.1)
    Partition(net, [one, two], collectives_for(dist.group.WORLD), stage=2, bucket_bytes=SMALL)
    with pytest.raises(UnsupportedModelError, match="needs whole parameters"):
        two.add_param_group({"params": list(net["a"].parameters())})


@distributed(world_size=2)
def test_state_that_the_optimizer_came_with_is_cut_and_the_rest_let_go():
    for make in (lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.3), warm_adam):
        net = layers("a", "b")
        optimizer = make(net.parameters())
        before = {p: dict(optimizer.state[p]) for p in net.parameters()}
        optimizer, partition = partitioned(net, optimizer=optimizer)
        held = 0
        for segment in partition.segments(optimizer):
            whole = before[net.get_parameter(segment.name)]
            for key, value in segment.state.items():
                expected = value if value.dim() == 0 else whole[key].reshape(-1)[segment.start : segment.stop]
                assert torch.equal(value, expected)
                held = max(held, len([k for k in segment.state if k != "step"]))
        assert held > 0
        assert all(isinstance(key, nn.Parameter) and key not in before for key in optimizer.state)
        total = sum(p.numel() for p in net.parameters())
        mine = sum(v.numel() for state in optimizer.state.values() for k, v in state.items() if k != "step") / held
        assert abs(mine - total / 2) <= 16 * len(partition.buckets)


def warm_adam(parameters):
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


class Picky(torch.optim.Optimizer):
    """Asks for `requires_grad`, and for an attribute that the user hung on a parameter."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=parameter.scale)


@distributed(world_size=2)
def test_an_optimizer_finds_on_its_parameters_what_the_user_put_there():
    net = layers("a", "b")
    for parameter in net["b"].parameters():
        parameter.scale = 0.5
    for parameter in net["a"].parameters():
        parameter.scale = 0.25
    reference = copy.deepcopy(net)
    optimizer, partition = partitioned(net, optimizer=Picky(net.parameters()))

    def loss(net, x, rank):
        return net["b"](net["a"](x)).pow(2).mean()

    gradients = averaged(net, loss, 0)
    loss(net, batch(0), None).backward()
    partition.flush()
    optimizer.step()
    for name, parameter in reference.named_parameters():
        rate = 0.25 if name.startswith("a") else 0.5
        torch.testing.assert_close(net.get_parameter(name).data, parameter.data - rate * gradients[name])


@distributed(world_size=1)
def test_with_one_rank_the_optimizers_state_dict_is_torchs_own():
    net = layers("a", "b")
    reference = copy.deepcopy(net)
    plain = torch.optim.Adam(reference.parameters(), lr=0.1)
    optimizer, partition = partitioned(net, optimizer=torch.optim.Adam(net.parameters(), lr=0.1))
    for model, one in ((net, optimizer), (reference, plain)):
        model["b"](model["a"](batch(0))).pow(2).mean().backward()
        one.step()
    ours, theirs = optimizer.state_dict(), plain.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        assert ours["state"][index].keys() == state.keys()
        assert all(torch.equal(ours["state"][index][key], value) for key, value in state.items())
    optimizer.load_state_dict(theirs)
    partition.detach()
    assert optimizer.state_dict()["state"].keys() == theirs["state"].keys()


@distributed(world_size=2)
def test_gradients_leave_as_backward_goes_whatever_the_order_of_definition():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))
            self.unused = nn.Linear(3, 3)

        def forward(self, x):
            for layer in reversed(self.layers):
                x = layer(x)
            return x

    net = Reversed()
    optimizer, partition = partitioned(net)
    reducer, held = partition.reducer, []
    original = reducer._on_gradient

    def spy(index, slot):
        original(index, slot)
        held.append(len(reducer._buffers) + len(reducer._in_flight))

    reducer._on_gradient = spy
    for _ in range(2):
        held.clear()
        optimizer.zero_grad()
        net(batch(0)).pow(2).mean().backward()
        partition.flush()
    assert max(held) <= 4  # of 13 buckets


@distributed(world_size=2)
def test_memory_that_two_parameters_swapped_is_swapped():
    net = layers("a", "b")
    optimizer, partition = partitioned(net, optimizer=torch.optim.SGD(net.parameters(), lr=0.0))
    a, b = net["a"].weight.detach().clone(), net["b"].weight.detach().clone()
    net["a"].weight.data, net["b"].weight.data = net["b"].weight.data, net["a"].weight.data
    net["b"](net["a"](batch(0))).pow(2).mean().backward()
    partition.flush()
    optimizer.step()
    assert torch.equal(net["a"].weight, b)
    assert torch.equal(net["b"].weight, a)


@distributed(world_size=2)
def test_a_group_of_operations_left_under_way_does_not_reach_the_next_partition():
    for _ in range(2):
        net = layers("a", "b")
        group = dist.new_group()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        partition = Partition(net, [optimizer], collectives_for(group), stage=2, bucket_bytes=SMALL)
        net["b"](net["a"](batch(dist.get_rank()))).pow(2).mean().backward()
        partition.detach()  # as after an exception: nothing was waited for
        dist.destroy_process_group(group)
    dist.barrier()


@distributed(world_size=2)
def test_a_gradient_that_fills_its_bucket_is_sent_from_its_own_memory():
    net = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("a", "b")})
    alone = []
    net["a"].weight.register_post_accumulate_grad_hook(lambda weight: alone.append(is_unshared(weight.grad)))
    net["a"](batch(0)).sum().backward()
    if alone != [True]:  # torch 2.6 holds what it accumulates once more for so long
        return
    optimizer, partition = partitioned(net)
    taken = []
    pool = partition.reducer._pool
    take = pool.take
    pool.take = lambda *args: taken.append(args) or take(*args)
    for seed in range(2):
        optimizer.zero_grad()
        net["b"](net["a"](batch(seed))).pow(2).mean().backward()
        partition.flush()
        optimizer.step()
    assert not taken


@distributed(world_size=2)
def test_what_one_rank_accumulates_is_kept_until_the_ranks_agree_who_has_a_gradient():
    net = layers("a", "by_turns", "never")
    optimizer, partition = partitioned(net)
    micro_batches = 4

    def loss(module, x, uses):
        y = module["a"](x)
        return (module["by_turns"](y) if uses else y).pow(2).mean()

    for step in range(2):
        optimizer.zero_grad()
        reference = copy.deepcopy(net)
        for micro in range(micro_batches):
            for rank in range(2):
                uses = micro % 2 == rank if step == 0 else micro == 1 and rank == 0
                x = batch(10 * step + micro, rank)
                (loss(reference, x, uses) / 2).backward()
                if rank == dist.get_rank():
                    with nullcontext() if micro == micro_batches - 1 else partition.no_sync():
                        loss(net, x, uses).backward()
                        partition.flush()
        assert_gradients(partition, optimizer, {name: p.grad for name, p in reference.named_parameters()})
        assert net["never"].weight.grad is None
        assert net["by_turns"].weight.grad is not None
        optimizer.step()


@distributed(world_size=2)
def test_an_accumulation_that_ends_under_no_sync_is_agreed_on_when_it_is_asked_for():
    net = layers("a", "b", "never")
    optimizer, partition = partitioned(net)

    def loss(module, x, rank):
        y = module["a"](x)
        return (module["b"](y) if rank else y).pow(2).mean()

    with partition.no_sync():
        loss(net, batch(0), dist.get_rank()).backward()
        partition.flush()
    assert_gradients(partition, optimizer, averaged(net, loss, 0))
    assert net["never"].weight.grad is None


@distributed(world_size=2)
def test_a_step_that_somebody_has_put_in_place_of_torchs_is_called_once():
    for where in ("instance", "class"):
        net = layers("a", "b", "c")
        calls = []
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        place = optimizer if where == "instance" else torch.optim.SGD
        theirs = place.step

        @functools.wraps(theirs)
        def step(*args, theirs=theirs, calls=calls, **kwargs):
            calls.append(args)
            return theirs(*args, **kwargs)

        place.step = step
        _, partition = partitioned(net, optimizer=optimizer)
        for seed in range(3):
            optimizer.zero_grad()
            net["c"](net["b"](net["a"](batch(seed)))).pow(2).mean().backward()
            partition.flush()
            optimizer.step()
        assert len(calls) == 3
        if where == "class":
            torch.optim.SGD.step = theirs


@distributed(world_size=2)
def test_a_state_that_was_kept_is_not_written_over_by_loading_another():
    for by in ("parameter", "element"):
        net = layers("a", "b")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        partition = Partition(
            net, [optimizer], collectives_for(dist.group.WORLD), stage=2, partition=by, bucket_bytes=SMALL
        )
        net["b"](net["a"](batch(0))).pow(2).mean().backward()
        partition.flush()
        optimizer.step()
        kept = optimizer.state_dict()
        before = {index: state["momentum_buffer"].clone() for index, state in kept["state"].items()}
        optimizer.load_state_dict({**kept, "state": {i: {"momentum_buffer": b + 1} for i, b in before.items()}})
        optimizer.load_state_dict(kept)
        after = optimizer.state_dict()["state"]
        assert before
        for index, buffer in before.items():
            assert torch.equal(after[index]["momentum_buffer"], buffer)
        others = [None, None]
        dist.all_gather_object(others, kept)
        with pytest.raises(CheckpointMismatchError, match="another rank's part"):
            optimizer.load_state_dict(others[1 - dist.get_rank()])
        hooks_of_the_optimizer_are_called(optimizer)


def hooks_of_the_optimizer_are_called(optimizer):
    came = []
    optimizer.register_state_dict_pre_hook(lambda _: came.append("asked"))
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: came.append(state_dict.pop("note")))
    optimizer.register_load_state_dict_post_hook(lambda it: it.param_groups[0].update(lr=0.5))
    kept = optimizer.state_dict()
    optimizer.load_state_dict(kept)
    assert came == ["asked", kept["note"]]
    assert optimizer.param_groups[0]["lr"] == 0.5


@distributed(world_size=2)
def test_the_first_part_of_a_step_is_sent_before_the_last_is_stepped_on():
    net = layers("a", "b", "c", "d", "e")
    optimizer, partition = partitioned(net)
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps the step once more
    bucket, stepped = partition.buckets[-1], []  # the next forward needs it first
    publish = bucket.publish
    last = partition.buckets[0].pieces[0].master

    def spy():
        stepped.append(last._version)
        return publish()

    bucket.publish = spy
    net["e"](net["d"](net["c"](net["b"](net["a"](batch(0)))))).pow(2).mean().backward()
    partition.flush()
    before = last._version
    optimizer.step()
    assert stepped == [before]
    assert last._version > before


@distributed(world_size=2)
def test_at_stage_1_whole_gradients_have_the_buffers_memory_while_they_accumulate():
    net = layers("a", "b", "c")
    optimizer, partition = partitioned(net, stage=1)

    def loss(module, x):
        return module["c"](module["b"](module["a"](x))).pow(2).mean()

    for step in range(2):
        optimizer.zero_grad()
        expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        for micro in range(3):
            for name, gradient in averaged(net, lambda module, x, _: loss(module, x), 10 * step + micro).items():
                expected[name] += gradient
            with nullcontext() if micro == 2 else partition.no_sync():
                loss(net, batch(10 * step + micro)).backward()
                partition.flush()
            assert (partition.memory_bytes()["buckets"] > 0) == (micro == 2)
            assert all((bucket.gradient_bytes > 0) == (micro == 2) for bucket in partition.buckets)
        assert_gradients(partition, optimizer, expected)
        optimizer.step()


@distributed(world_size=2)
def test_a_loaded_count_of_steps_lies_where_torchs_own_loading_puts_it():
    counted = torch.tensor(3.0)
    for asked in ({}, {"fused": True}, {"capturable": True}):
        net = layers("a").to("meta")  # in place of a GPU: no step is made
        optimizer, partition = partitioned(net, optimizer=torch.optim.AdamW(net.parameters()))
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0].update(asked)
        for index, parameter in enumerate(net.parameters()):
            moments = {name: torch.zeros(parameter.shape) for name in ("exp_avg", "exp_avg_sq")}
            saved["state"][index] = {"step": counted, **moments}
        partition.load_state(optimizer, saved)
        owned = partition.segments(optimizer)
        assert owned
        for segment in owned:
            assert segment.state["exp_avg"].is_meta
            assert segment.state["step"].device.type == ("meta" if asked else "cpu")
            assert segment.state["step"] is not counted


@distributed(world_size=1)
def test_with_one_rank_a_step_asks_each_bucket_nothing_but_whether_it_is_known():
    net = layers(*"abcdefgh")
    optimizer, partition = partitioned(net)
    asked = []

    class Spied(type(partition.buckets[0])):
        def __eq__(self, other):
            asked.append("whether it is another")
            return self is other

        __hash__ = object.__hash__

        def publish(self):
            asked.append("publish")
            return super().publish()

    for bucket in partition.buckets:
        bucket.__class__ = Spied
    net["a"](batch(0)).pow(2).mean().backward()
    optimizer.step()
    assert not asked


def with_gradients(names):
    net = layers(*names)
    _, partition = partitioned(net)
    sum(net[name](batch(0)).pow(2).mean() for name in names).backward()
    partition.flush()
    return list(net.parameters()), partition


@distributed(world_size=2)
def test_what_is_done_to_many_gradients_at_once_is_agreed_on_once():
    asked = []
    for names in ("ab", "abcdefgh"):
        parameters, partition = with_gradients(names)
        expected = float(partition.grad_norm())
        original, agreements = partition.reducer.agreed, []
        partition.reducer.agreed = lambda *args, of=original, to=agreements: to.append(args) or of(*args)
        norm = nn.utils.clip_grad_norm_(parameters, 0.5, foreach=True)
        assert float(norm) == pytest.approx(expected, rel=1e-5)
        assert float(partition.grad_norm()) == pytest.approx(0.5, rel=1e-4)
        asked.append(len(agreements))
    assert asked[0] == asked[1]


@distributed(world_size=2)
def test_one_gradients_norm_does_not_look_for_those_of_others():
    parameters, _ = with_gradients("abcdefgh")
    looked, original = [], gradients_room._local_gradient
    gradients_room._local_gradient = lambda slot: looked.append(slot) or original(slot)
    nn.utils.clip_grad_norm_(parameters, 0.5)
    gradients_room._local_gradient = original
    assert len(looked) <= 2 * len(parameters)


@distributed(world_size=2)
def test_an_operation_that_would_write_into_a_partitioned_gradient_is_refused_by_its_name():
    parameters, _ = with_gradients("a")
    with pytest.raises(UnsupportedModelError, match=r"the gradient of 'a\.weight' is partitioned"):
        torch.mul(parameters[0].data, 2.0, out=parameters[0].grad)


@distributed(world_size=2)
def test_ranks_that_run_a_layer_a_different_number_of_times_learn_one_order():
    net = layers("a", "b", "c", "later")  # the last is expected first, and has no gradient at first
    optimizer, partition = partitioned(net)

    def loss(net, x, rank):
        for _ in range(3 if rank == 0 else 1):
            x = checkpoint(net["a"], x, use_reentrant=True)
        return x.pow(2).mean()

    for seed in range(2):
        optimizer.zero_grad()
        expected = averaged(net, loss, seed)
        loss(net, batch(seed).requires_grad_(), dist.get_rank()).backward()
        partition.flush()
        assert_gradients(partition, optimizer, expected)
    assert sorted(partition.reducer._order) == list(range(len(partition.buckets)))
