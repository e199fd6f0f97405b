"""How ranks of one host exchange tensors: see [Note: an exchange by reading]."""

import gc
import os
import signal
import socket
import threading
import time
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from benchmarks.memory import peak_mib
from lightning_zero.engine import transport
from lightning_zero.engine.transport import MemoryReads, Sockets, add_in_order, transport_for
from tests.launch import distributed, run_ranks

PATIENCE = timedelta(seconds=20)


def of(rank, number, numel=1000):
    return torch.arange(numel) + 10_000 * rank + number


def begin(way, number, numel=1000):
    """Exchange one tensor with every other rank; the operation, and what should be received in the end."""
    rank = dist.get_rank()
    others = [other for other in range(dist.get_world_size()) if other != rank]
    received = {other: torch.zeros(numel, dtype=torch.int64) for other in others}
    pending = way.exchange(list(received.items()), [(other, of(rank, number, numel)) for other in others])
    return pending, received, {other: of(other, number, numel) for other in others}


def assert_arrived(pending, received, expected):
    pending.wait()
    assert all(torch.equal(received[other], expected[other]) for other in expected)


@distributed(world_size=3)
def test_ranks_of_one_host_read_each_others_memory():
    for way, kind in ((transport_for(dist.group.WORLD, PATIENCE), MemoryReads), (Sockets(dist.group.WORLD), Sockets)):
        assert type(way) is kind
        for number in range(5):
            assert_arrived(*begin(way, number))
        way.release()


def both_ways():
    yield transport_for(dist.group.WORLD, PATIENCE)
    yield Sockets(dist.group.WORLD)


@distributed(world_size=3)
def test_a_sum_is_the_same_whoever_owns_it_and_however_it_travels():
    rank, world_size, numel = dist.get_rank(), dist.get_world_size(), 2 * transport._BLOCK_BYTES // 4 + 5
    everyone = torch.randn(world_size, numel, generator=torch.Generator().manual_seed(1))
    for dtype, out_dtype in ((torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        before = torch.linspace(-1, 1, numel, dtype=out_dtype)
        for accumulate in (False, True):
            addends = everyone.to(dtype)
            expected = before.clone()
            add_in_order([[addend] for addend in addends.clone()], [expected], accumulate=accumulate)
            for way in both_ways():
                mine, out = addends[rank].clone(), before.clone()
                sent = [(other, mine.clone()) for other in range(world_size) if other != rank]
                way.sum(mine, out, sent, accumulate=accumulate).wait()
                assert torch.equal(out, expected)
                way.release()


@distributed(world_size=3)
def test_a_rank_may_have_nothing_to_sum():
    rank = dist.get_rank()
    for way in both_ways():
        own, out = torch.full((7 * (rank == 1),), 1.0), torch.zeros(7 * (rank == 1))
        way.sum(own, out, [(1, torch.full((7,), 2.0))] if rank != 1 else [], accumulate=False).wait()
        assert (out == 5).all()
        way.release()


@distributed(world_size=2)
def test_what_is_summed_may_have_a_graph():
    rank = dist.get_rank()
    for way in both_ways():
        own = torch.ones(4, requires_grad=True) * 2
        with torch.no_grad():
            out = torch.zeros(4)
            way.sum(own.view(-1), out, [(1 - rank, own.clone())], accumulate=False).wait()
        assert (out == 4).all()
        way.release()


@distributed(world_size=2)
def test_a_sum_of_what_is_read_holds_none_of_it_whole():
    way, rank = transport_for(dist.group.WORLD, PATIENCE), dist.get_rank()
    sums = [[torch.ones(numel) for _ in ("own", "out", "sent")] for numel in (10, 8 * 2**20)]
    for own, out, sent in sums:
        before = peak_mib()
        way.sum(own, out, [(1 - rank, sent)], accumulate=False).wait()
        needed = peak_mib() - before
        assert (out == 2).all()
    assert needed < own.nbytes / 2**20 / 4


@distributed(world_size=2)
def test_a_sum_goes_on_while_a_rank_computes_in_python():
    way, rank = transport_for(dist.group.WORLD, PATIENCE), dist.get_rank()
    numel = transport._BLOCK_BYTES  # of four blocks
    own, out, sent = torch.ones(numel), torch.zeros(numel), torch.ones(numel)
    way.sum(own, out, [(1 - rank, sent)], accumulate=False).wait()  # the pages are there
    own.fill_(1)
    dist.barrier()
    pending = way.sum(own, out, [(1 - rank, sent)], accumulate=False)
    busy_till = time.monotonic() + 5
    if rank == 0:
        while time.monotonic() < busy_till:
            pass
    else:
        pending.wait()
        assert time.monotonic() < busy_till - 2
    pending.wait()
    assert (out == 2).all()


@distributed(world_size=3)
def test_a_rank_that_cant_read_one_peer_tells_the_others_too():
    way, rank = transport_for(dist.group.WORLD, PATIENCE), dist.get_rank()
    read, reads = transport._read_memory, []

    def read_once(*args):
        reads.append(args)
        if len(reads) > 1:
            raise OSError(14, "Bad address")
        read(*args)

    if rank == 0:
        transport._read_memory = read_once
    sent = [(0, torch.ones(10))] if rank else []
    own = torch.ones(0 if rank else 10)
    began = time.monotonic()
    with pytest.raises(
        RuntimeError, match="can't be read any more" if rank == 0 else "rank 0 couldn't read what its peers"
    ):
        way.sum(own, torch.zeros_like(own), sent, accumulate=False).wait()
    assert time.monotonic() - began < PATIENCE.total_seconds() / 2
    dist.barrier()


@distributed(world_size=3)
def test_an_exchange_goes_on_whatever_a_rank_waits_for():
    way, rank = transport_for(dist.group.WORLD, PATIENCE), dist.get_rank()
    exchanges = [begin(way, number) for number in range(4)]
    if rank == 0:  # waits at once, and last of all
        assert_arrived(*exchanges[2])
        dist.barrier()
    else:
        dist.barrier()
        assert_arrived(*exchanges[3 - rank])
    for exchange in exchanges:
        assert_arrived(*exchange)


@distributed(world_size=2)
def test_a_rank_may_be_far_ahead_of_another():
    way = transport_for(dist.group.WORLD, PATIENCE)
    exchanges = []
    for number in range(1000):
        exchanges.append(begin(way, number, 10))
        if dist.get_rank() == 1 and number == 500:
            time.sleep(0.5)
    for exchange in reversed(exchanges):
        assert_arrived(*exchange)


@distributed(world_size=2)
def test_what_is_sent_may_be_changed_after_the_wait():
    way, rank = transport_for(dist.group.WORLD, PATIENCE), dist.get_rank()
    mine, theirs = torch.zeros(500_000), torch.zeros(500_000)
    for number in range(1, 50):
        mine.fill_(number + 1000 * rank)
        if rank == number % 2:
            time.sleep(0.002)
        way.exchange([(1 - rank, theirs)], [(1 - rank, mine)]).wait()
        mine.fill_(-1)
        assert (theirs == number + 1000 * (1 - rank)).all()


@distributed(world_size=2)
def test_one_direction_may_have_nothing_to_send():
    way, rank = transport_for(dist.group.WORLD, PATIENCE), dist.get_rank()
    for sender in (0, 1, 0):
        target = torch.zeros(10)
        message = (1 - rank, torch.full((10,), 7.0) if rank == sender else target)
        way.exchange([] if rank == sender else [message], [message] if rank == sender else []).wait()
        assert rank == sender or (target == 7).all()
    way.exchange([], []).wait()


@distributed(world_size=3)
def test_where_one_rank_is_forbidden_to_read_all_use_gloo():
    if dist.get_rank() == 1:

        def forbidden(*args):
            raise PermissionError(1, "Operation not permitted")

        transport._read_memory = forbidden
    before = len(os.listdir("/proc/self/fd"))
    way = transport_for(dist.group.WORLD, PATIENCE)
    assert type(way) is Sockets
    assert len(os.listdir("/proc/self/fd")) <= before, "a connection was left open"
    assert_arrived(*begin(way, 1))


@distributed(world_size=2)
def test_where_one_rank_has_no_such_sockets_all_use_gloo():
    if dist.get_rank() == 0:

        def unknown(*args):
            raise OSError(94, "Socket type not supported")

        transport.socket.socket = unknown
    assert type(transport_for(dist.group.WORLD, PATIENCE)) is Sockets


@distributed(world_size=2)
def test_strangers_who_call_are_sent_away():
    if dist.get_rank() == 0:
        gather, strangers = dist.all_gather_object, []

        def gather_among_strangers(everyone, about, group):
            for words in (b"", b"short", bytes(100)):
                strangers.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                strangers[-1].connect(about[-1])
                if words:
                    strangers[-1].send(words)
            gather(everyone, about, group=group)

        dist.all_gather_object = gather_among_strangers
    way = transport_for(dist.group.WORLD, PATIENCE)
    assert type(way) is MemoryReads
    assert_arrived(*begin(way, 1))


@distributed(world_size=2)
def test_another_process_of_the_same_id_is_not_taken_for_the_rank():
    if dist.get_rank() == 0:
        original = transport._read_memory

        def elsewhere(process, begin, into, nbytes):  # as on another host
            return original(os.getpid(), into, into, nbytes)

        transport._read_memory = elsewhere
    assert type(transport_for(dist.group.WORLD, PATIENCE)) is Sockets


@distributed(world_size=2)
def test_memory_that_cant_be_read_any_more_is_an_error_on_both_ranks():
    way, rank = transport_for(dist.group.WORLD, PATIENCE), dist.get_rank()
    if rank == 0:

        def gone(*args):
            raise OSError(14, "Bad address")

        transport._read_memory = gone
        received = [(1, torch.zeros(10))]
        with pytest.raises(RuntimeError, match="rank 1 can't be read any more: Bad address"):
            way.exchange(received, []).wait()
    else:
        with pytest.raises(RuntimeError, match="rank 0 couldn't read what its peers sent"):
            way.exchange([], [(0, torch.zeros(10))]).wait()
    dist.barrier()


@distributed(world_size=2)
def test_whatever_else_goes_wrong_while_it_reads_is_an_error_too():
    way, rank = transport_for(dist.group.WORLD, PATIENCE), dist.get_rank()
    if rank == 0:

        def gone(*args):
            raise MemoryError

        transport._read_memory = gone
        for _ in range(2):
            with pytest.raises((MemoryError, RuntimeError)):
                way.exchange([(1, torch.zeros(10))], []).wait()
    else:
        for _ in range(2):
            way.exchange([], [(0, torch.zeros(10))])
    dist.barrier()


@distributed(world_size=2)
def test_what_is_sent_stays_till_it_is_read_and_nothing_stays_longer():
    way, rank = transport_for(dist.group.WORLD, PATIENCE), dist.get_rank()
    if rank == 0:
        sent = torch.full((4,), 7.0)
        still_there = weakref.ref(sent)
        way.exchange([], [(1, sent)])  # and an exception comes
        del sent
        assert still_there() is not None
        dist.barrier()
    else:
        dist.barrier()
        received = torch.zeros(4)
        way.exchange([(0, received)], []).wait()
        assert (received == 7).all()
    pending, received, expected = begin(way, 1)
    assert_arrived(pending, received, expected)
    (received,) = (weakref.ref(tensor) for tensor in received.values())
    del pending
    deadline = time.monotonic() + 5
    while received() is not None and time.monotonic() < deadline:  # the thread lets go of it right after the wait
        time.sleep(0.01)
    assert received() is None


def wait_for_a_killed_peer():
    way = transport_for(dist.group.WORLD, PATIENCE)
    assert_arrived(*begin(way, 0))
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 is closed"):
        begin(way, 1)[0].wait()
    assert time.monotonic() - began < 5
    raise RuntimeError("rank 0 noticed")


def test_a_killed_peer_is_noticed_at_once():
    with pytest.raises(AssertionError, match="rank 0 noticed"):
        run_ranks(wait_for_a_killed_peer, 2)


@distributed(world_size=2)
def test_a_peer_that_never_comes_is_an_error_within_the_timeout():
    way = transport_for(dist.group.WORLD, timedelta(seconds=0.5))
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"rank 1 wasn't heard of for 0\.5 s"):
            begin(way, 1)[0].wait()
    dist.barrier()


@distributed(world_size=2)
def test_ranks_at_different_exchanges_are_an_error():
    way, rank = transport_for(dist.group.WORLD, PATIENCE), dist.get_rank()
    if rank == 0:
        way.exchange([], [])
    with pytest.raises(
        RuntimeError, match=f"rank {1 - rank} is at exchange {2 - (1 - rank)}, and this rank at {2 - rank}"
    ):
        begin(way, 1)[0].wait()
    dist.barrier()


@distributed(world_size=2)
def test_release_ends_the_thread_and_closes_the_connections():
    before = len(os.listdir("/proc/self/fd"))
    way = transport_for(dist.group.WORLD, PATIENCE)
    assert_arrived(*begin(way, 1))
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "lightning_zero-reads")
    pending = way.exchange([(1 - dist.get_rank(), torch.zeros(1))], [])  # of which nothing comes
    way.release()
    assert not thread.is_alive()
    assert len(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(RuntimeError, match=r"the connection to rank \d is closed"):
        pending.wait()
    with pytest.raises(AttributeError):
        way.exchange([(1 - dist.get_rank(), torch.zeros(1))], [])


@distributed(world_size=2)
def test_a_transport_that_nobody_holds_any_more_leaves_neither_thread_nor_connections():
    before = len(os.listdir("/proc/self/fd"))
    way = transport_for(dist.group.WORLD, PATIENCE)
    assert_arrived(*begin(way, 1))
    dist.barrier()
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "lightning_zero-reads")
    del way
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert len(os.listdir("/proc/self/fd")) <= before
