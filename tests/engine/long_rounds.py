"""Long rounds for a small model, which would never have them."""

from functools import partial

from lightning_zero.engine import partition
from lightning_zero.segments import plan_buckets


def cut_in_long_rounds(most_cuts: int) -> None:
    """From here on this process's partitions are cut in so few places: see [Note: rounds]."""
    partition.plan_buckets = partial(plan_buckets, most_cuts=most_cuts)


def cut_in_long_rounds_of_small_buckets(most_cuts: int) -> None:
    """The same, with a bucket for each layer of a small model, whatever the strategy says."""

    def plan(parameters, world_size, policy, bucket_bytes, **options):
        return plan_buckets(parameters, world_size, policy, 300, most_cuts=most_cuts, **options)

    partition.plan_buckets = plan
