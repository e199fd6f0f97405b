"""A store that is lent to one start after another."""

import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from lightning_zero.errors import UnreachableRankError
from lightning_zero.plugin.restarts import store_of_one_start
from tests.launch import free_port


@pytest.fixture
def lent():
    """Gives each process its own way to one store."""
    port = free_port()
    server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    yield lambda: TCPStore("127.0.0.1", port, is_master=False)
    del server


def start(lent, ranks, world_size, *, late=None, seconds=20):
    """What each of these ranks gets; one of them may come later."""
    found = {}

    def join(rank):
        time.sleep(0.3 if rank == late else 0)
        try:
            found[rank] = store_of_one_start(lent(), rank, world_size, timedelta(seconds=seconds))
        except UnreachableRankError as error:
            found[rank] = error

    threads = [threading.Thread(target=join, args=[rank]) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("late", [None, 0, 2])
def test_each_start_has_a_part_of_the_store_that_all_its_ranks_and_nobody_else_have(lent, late):
    for attempt, world_size in enumerate((3, 3, 4, 1)):
        stores = start(lent, range(world_size), world_size, late=late)
        assert not any(store.check(["address"]) for store in stores.values())
        stores[0].set("address", str(attempt))
        assert [store.get("address") for store in stores.values()] == [str(attempt).encode()] * world_size


def test_what_a_start_that_was_never_complete_has_left_misleads_nobody(lent):
    incomplete = start(lent, (0, 2), 3, seconds=0.5)
    assert all("waited in vain" in str(error) for error in incomplete.values())
    stores = start(lent, range(3), 3, late=1)
    stores[1].set("key", "value")
    assert all(store.get("key") == b"value" for store in stores.values())
