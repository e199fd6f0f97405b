"""The maths of partitioning and of resuming, held by properties."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_zero.errors import CorruptCheckpointError, IncompleteCheckpointError
from lightning_zero.segments import ALIGNMENT_BYTES, MOST_CUTS, ParameterSpec, Segment, SegmentIndex, plan_buckets

shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=12)
world_sizes = st.integers(1, 7)
policies = st.sampled_from(["element", "parameter"])
bucket_sizes = st.sampled_from([1, 64, 700, 10**6])


def specs(shapes: list[tuple[int, ...]], element_bytes: int = 4) -> list[ParameterSpec]:
    return [ParameterSpec(f"p{i}", shape, element_bytes) for i, shape in enumerate(shapes)]


def owned(buckets, rank):
    return [segment for bucket in buckets for segment, _ in bucket.owned(rank)]


@given(shapes, world_sizes, policies, bucket_sizes, st.sampled_from([2, 4, 8]), st.booleans())
def test_every_element_is_owned_exactly_once(shapes, world_size, policy, bucket_bytes, element_bytes, equal):
    parameters = specs(shapes, element_bytes)
    buckets = plan_buckets(parameters, world_size, policy, bucket_bytes, equal_shards=equal)
    index = SegmentIndex((segment, None) for rank in range(world_size) for segment in owned(buckets, rank))
    for parameter in parameters:
        index.check_cover(parameter.name, parameter.numel)
    assert sorted(p.name for bucket in buckets for p in bucket.parameters) == sorted(p.name for p in parameters)


@given(shapes, world_sizes, bucket_sizes, st.sampled_from([2, 4, 8]))
def test_shards_of_a_bucket_differ_by_one_alignment_unit_at_most(shapes, world_size, bucket_bytes, element_bytes):
    unit = ALIGNMENT_BYTES // element_bytes
    for bucket in plan_buckets(specs(shapes, element_bytes), world_size, "element", bucket_bytes):
        lengths = [stop - start for start, stop in itertools.pairwise(bucket.shards.bounds)]
        assert max(lengths) - min(lengths) <= 2 * unit - 1
        assert all(bound % unit == 0 for bound in bucket.shards.bounds[:-1])
        assert all(offset % unit == 0 for offset in bucket.offsets)


@given(shapes, world_sizes, bucket_sizes)
def test_equal_shards_are_equal(shapes, world_size, bucket_bytes):
    for bucket in plan_buckets(specs(shapes), world_size, "element", bucket_bytes, equal_shards=True):
        assert len({stop - start for start, stop in itertools.pairwise(bucket.shards.bounds)}) == 1


many_shapes = st.lists(st.lists(st.integers(0, 60), max_size=2).map(tuple), min_size=1, max_size=40)


@given(many_shapes, st.integers(1, 50), bucket_sizes, st.integers(1, 200), st.booleans())
def test_rounds_bound_the_number_of_segments_and_own_every_element_once(
    shapes, world_size, bucket_bytes, most_cuts, equal
):
    parameters = specs(shapes)
    buckets = plan_buckets(parameters, world_size, "element", bucket_bytes, equal_shards=equal, most_cuts=most_cuts)
    segments = [segment for rank in range(world_size) for segment in owned(buckets, rank)]
    assert len(segments) <= len(parameters) + max(most_cuts, world_size)
    index = SegmentIndex((segment, None) for segment in segments)
    for parameter in parameters:
        index.check_cover(parameter.name, parameter.numel)


@given(many_shapes, st.integers(1, 50), bucket_sizes, st.integers(1, 200), st.sampled_from([2, 4, 8]))
def test_rounds_give_every_rank_its_share_in_whole_alignment_units(
    shapes, world_size, bucket_bytes, most_cuts, element_bytes
):
    unit, parameters = ALIGNMENT_BYTES // element_bytes, specs(shapes, element_bytes)
    buckets = plan_buckets(parameters, world_size, "element", bucket_bytes, most_cuts=most_cuts)
    rounds = min(len(buckets), max(1, most_cuts // world_size))
    units = [0] * world_size
    for bucket in buckets:
        assert bucket.shards.bounds[0] == 0
        assert all(bound % unit == 0 for bound in bucket.shards.bounds[:-1])
        assert all(offset % unit == 0 for offset in bucket.offsets)
        for owner, start, stop in bucket.shards:
            units[owner] += -(-(stop - start) // unit)
    assert max(units) - min(units) <= rounds


@given(many_shapes, st.integers(1, 50), bucket_sizes)
def test_buckets_are_cut_each_for_itself_while_they_are_few(shapes, world_size, bucket_bytes):
    unit, parameters = ALIGNMENT_BYTES // 4, specs(shapes)
    buckets = plan_buckets(parameters, world_size, "element", bucket_bytes, most_cuts=world_size * len(parameters))
    for bucket in buckets:
        units = sum(-(-parameter.numel // unit) for parameter in bucket.parameters)
        cuts = [min(rank * units // world_size * unit, bucket.numel) for rank in range(world_size)]
        assert bucket.shards.bounds == (*cuts, bucket.numel)
        assert list(bucket.shards.owners) == list(range(world_size))


@given(many_shapes, st.integers(1, 50), policies, bucket_sizes, st.integers(1, 200), st.booleans())
def test_shards_say_the_same_of_each_rank_as_of_all(shapes, world_size, policy, bucket_bytes, most_cuts, equal):
    for bucket in plan_buckets(
        specs(shapes), world_size, policy, bucket_bytes, equal_shards=equal, most_cuts=most_cuts
    ):
        listed, all_ranks = list(bucket.shards), [(rank, *bucket.shards.of(rank)) for rank in range(world_size)]
        assert listed == [(rank, start, stop) for rank, start, stop in all_ranks if start < stop]
        assert [start for _, start, _ in listed] == [0, *(stop for *_, stop in listed)][: len(listed)]
        assert bucket.numel == max((stop for *_, stop in listed), default=0)


def test_a_trillion_parameters_on_thousands_of_ranks_are_few_segments():
    layer = [(25600, 25600)] * 4 + [(25600, 68352)] * 3 + [(25600,)] * 2
    parameters = specs(layer * 128, 2)
    for world_size in (1024, 4096):
        buckets = plan_buckets(parameters, world_size, "element", 25 << 20, equal_shards=True)
        shards = [shard for bucket in buckets for shard in bucket.shards]
        assert len(shards) <= len(buckets) + MOST_CUTS
        shares = [0] * world_size
        for owner, start, stop in shards:
            shares[owner] += stop - start
        assert max(shares) < 1.001 * min(shares)


@given(shapes, world_sizes, bucket_sizes)
def test_by_parameter_nothing_is_cut_and_no_rank_has_more_than_its_share_and_one_parameter(
    shapes, world_size, bucket_bytes
):
    parameters = specs(shapes)
    buckets = plan_buckets(parameters, world_size, "parameter", bucket_bytes)
    sizes = {parameter.name: parameter.numel for parameter in parameters}
    loads = []
    for rank in range(world_size):
        segments = owned(buckets, rank)
        assert all((segment.start, segment.stop) == (0, sizes[segment.name]) for segment in segments)
        loads.append(sum(segment.numel for segment in segments))
    assert max(loads) <= sum(sizes.values()) / world_size + max(sizes.values())


@given(shapes, world_sizes, world_sizes, policies, policies, bucket_sizes, bucket_sizes)
def test_whatever_n_ranks_stored_any_m_ranks_find_exactly_what_they_own(
    shapes, stored_on, wanted_on, stored_by, wanted_by, stored_bucket, wanted_bucket
):
    parameters = specs(shapes)
    stored = plan_buckets(parameters, stored_on, stored_by, stored_bucket)
    # What is stored of an element is its own position, so that a wrong offset can't go unseen.
    index = SegmentIndex(
        (segment, range(segment.start, segment.stop)) for rank in range(stored_on) for segment in owned(stored, rank)
    )
    for rank in range(wanted_on):
        for segment in owned(plan_buckets(parameters, wanted_on, wanted_by, wanted_bucket), rank):
            found = [
                position
                for part, payload, offset in index.find(segment)
                for position in payload[offset : offset + part.numel]
            ]
            assert found == list(range(segment.start, segment.stop))


@pytest.mark.parametrize(
    ("stored", "error"),
    [
        ([(0, 4), (6, 10)], IncompleteCheckpointError),
        ([(0, 4)], IncompleteCheckpointError),
        ([], IncompleteCheckpointError),
        ([(0, 6), (4, 10)], CorruptCheckpointError),
        ([(0, 10), (0, 10)], CorruptCheckpointError),
        ([(0, 11)], CorruptCheckpointError),
        ([(-1, 10)], CorruptCheckpointError),
        ([(5, 5), (0, 10)], CorruptCheckpointError),
    ],
)
def test_a_cover_with_a_gap_or_an_overlap_is_refused(stored, error):
    with pytest.raises(error):
        SegmentIndex((Segment("w", *bounds), None) for bounds in stored).check_cover("w", 10)


def test_a_range_that_is_stored_in_part_is_refused_by_name():
    index = SegmentIndex([(Segment("w", 0, 4), None)])
    with pytest.raises(IncompleteCheckpointError, match="elements 4 to 6 of 'w'"):
        list(index.find(Segment("w", 2, 6)))


def test_more_ranks_than_elements_leaves_some_with_nothing():
    buckets = plan_buckets(specs([(3,), ()]), 8, "element", 100)
    assert sum(not owned(buckets, rank) for rank in range(8)) >= 6


@pytest.mark.parametrize("arguments", [(0, "element", 1), (2, "element", 0)])
def test_nonsense_is_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        plan_buckets(specs([(2,)]), *arguments)
