"""What a training is going to need, before anything is rented: memory a rank, disk a checkpoint, traffic a step.

Pure arithmetic over what `segments.plan_buckets` says, which is what the engine partitions by: no torch, no process
group. With `T` trained elements of `e` bytes, masters of `m = max(4, e)`, `s` optimizer states an element, `N` ranks:

| bytes a rank | stage 0: DDP | stage 1, 2 | stage 1, 2 on one rank |
|---|---|---|---|
| weights | e T | e T, and the buckets' padding | e T |
| gradients | e T | m T / N; before, stage 1 accumulates e T | e T; m T more in a step if m > e |
| masters | | m T / N if m > e: a wider parameter is its own master | m T if m > e |
| states | s e T | s m T / N | s m T |
| buckets | e T: DDP's own copy of the gradients | what is under way at a time: `_most_in_flight` | |

With `offload_optimizer`, masters and states are host memory, beside a copy of the gradients, m T / N, and of the
weights, e T / N, of a rank's own; wider parameters have masters then too.

Frozen parameters and the module's buffers are whole on every rank, among the weights. Nothing is said of activations,
of what kernels need for a moment, and of what the process group and the memory's allocator keep for themselves.

A step's traffic is what a rank sends, and receives, of gradients and parameters: DDP's ring all-reduce takes
2 (N - 1) / N of the gradients, a reduce-scatter and an all-gather (N - 1) / N each; stage 2 reduces after each
backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_zero.segments import Bucket, ParameterSpec, Policy, plan_buckets

PRECISIONS: Mapping[str, int | None] = {
    "32-true": None,
    "bf16-mixed": None,
    "16-mixed": None,
    "bf16-true": 2,
    "16-true": 2,
}
"""Lightning's precisions, and to how many bytes an element they convert the module; None: they leave it as it is."""

_MASTER_BYTES = 4
_IN_FLIGHT = 2
_PIECES = 8
"""Of how many parameters a bucket is made up where only their number of elements is known."""


@dataclass(frozen=True, slots=True)
class OptimizerKind:
    """What planning has to know of an optimizer: its state's elements for each of a parameter's, and how it is cut."""

    states: int
    policy: Policy


OPTIMIZERS: Mapping[str, OptimizerKind] = {
    "adadelta": OptimizerKind(2, "element"),
    "adagrad": OptimizerKind(1, "element"),
    "adam": OptimizerKind(2, "element"),
    "adamax": OptimizerKind(2, "element"),
    "adamw": OptimizerKind(2, "element"),
    "adamw-amsgrad": OptimizerKind(3, "element"),
    "asgd": OptimizerKind(1, "element"),
    "lamb": OptimizerKind(2, "parameter"),
    "lion": OptimizerKind(1, "parameter"),
    "muon": OptimizerKind(1, "parameter"),
    "nadam": OptimizerKind(2, "element"),
    "radam": OptimizerKind(2, "element"),
    "rmsprop": OptimizerKind(1, "element"),
    "rprop": OptimizerKind(2, "element"),
    "sgd": OptimizerKind(0, "element"),
    "sgd-momentum": OptimizerKind(1, "element"),
}
"""By the name that `plan --optimizer` takes. Those of no element's own (AdamW's `step`) aren't counted."""


@dataclass(frozen=True, slots=True)
class Model:
    """The tensors of a module, in the dtypes that it is trained in.

    Attributes:
        trained: the number of trained elements.
        element_bytes: of one of them, where there are no `parameters` that say so.
        parameters: the trained ones, in the module's order; empty where only their number is known.
        frozen_bytes: of the parameters that aren't trained.
        buffer_bytes: of the buffers.
        saved_buffer_bytes: of those that are in the state dict.
    """

    trained: int
    element_bytes: int = 4
    parameters: tuple[ParameterSpec, ...] = ()
    frozen_bytes: int = 0
    buffer_bytes: int = 0
    saved_buffer_bytes: int = 0

    @property
    def trained_bytes(self) -> int:
        """The bytes of the trained parameters."""
        if self.parameters:
            return sum(parameter.numel * parameter.element_bytes for parameter in self.parameters)
        return self.trained * self.element_bytes


@dataclass(frozen=True, slots=True)
class Setup:
    """How it is to be trained.

    Attributes:
        world_size: the number of ranks.
        optimizer: what it keeps.
        policy: how its parameters are cut.
        bucket_bytes: as `ZeroStrategy(bucket_size_mb=...)` says.
        accumulate: backwards a step.
        reduce_bytes: of an element on its way, if it isn't the parameter's own number.
        equal_shards: as on NCCL. Without it, what a rank receives needs memory of its own, as over gloo's sockets.
        offload: masters and states are in host memory: `ZeroStrategy(offload_optimizer=True)`.
    """

    world_size: int
    optimizer: OptimizerKind
    policy: Policy
    bucket_bytes: int = 25 * 2**20
    accumulate: int = 1
    reduce_bytes: int | None = None
    equal_shards: bool = True
    offload: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What it needs at one stage, all in bytes.

    Attributes:
        stage: 0 is DDP.
        weights: memory of the parameters and buffers, on the rank that needs most, like all that follow.
        gradients: of gradients that stay until the step.
        masters: of fp32 masters.
        states: of the optimizer's states.
        buckets: of gradients on their way.
        offloaded: host memory of an optimizer that is offloaded; then `masters` and `states` are 0.
        snapshot: host memory of a save behind training.
        checkpoint: disk of one checkpoint.
        checkpoint_frozen: how much of that is written once and linked into every later checkpoint.
        traffic: what a rank sends in a step; it receives as much.
    """

    stage: int
    weights: int
    gradients: int
    masters: int
    states: int
    buckets: int
    offloaded: int
    snapshot: int
    checkpoint: int
    checkpoint_frozen: int
    traffic: int

    @property
    def memory(self) -> int:
        """All of a rank's memory that is counted here, at its peak."""
        return self.weights + self.gradients + self.masters + self.states + self.buckets


def plan(model: Model, setup: Setup, stage: int) -> Plan:
    """What training a model takes at a stage: see the table above."""
    if stage == 0:
        return _plan_ddp(model, setup)
    world_size, optimizer = setup.world_size, setup.optimizer
    runs = _runs(model, setup)
    share_bytes = [0] * world_size
    for run in runs:
        for owner, start, stop in run.bucket.shards:
            share_bytes[owner] += run.times * (stop - start) * _master_bytes(run.element_bytes)
    rank = share_bytes.index(max(share_bytes))
    owned_bytes = sum(
        run.times * _master_bytes(run.element_bytes) * sum(segment.numel for segment, _ in run.bucket.owned(rank))
        for run in runs
    )
    masters = sum(run.times * run.shard(rank) * _MASTER_BYTES for run in runs if run.element_bytes < _MASTER_BYTES)
    states = optimizer.states * owned_bytes
    offloaded = 0
    if setup.offload:
        own_weights = sum(run.times * run.shard(rank) * run.element_bytes for run in runs)
        offloaded = 2 * share_bytes[rank] + own_weights + states
        masters = states = 0
    whole = model.trained_bytes
    padded = sum(run.times * run.bucket.numel * run.element_bytes for run in runs)
    if world_size == 1:
        gradients, buckets, traffic = whole + masters, 0, 0
    else:
        accumulates_whole = stage == 1 and setup.accumulate > 1
        gradients = max(share_bytes[rank], whole if accumulates_whole else 0)
        buckets = _most_in_flight(runs, setup, rank, lends_buffers=accumulates_whole)
        reductions = setup.accumulate if stage == 2 else 1
        traffic = sum(
            run.times
            * (
                reductions * (run.bucket.numel - run.shard(rank)) * (setup.reduce_bytes or run.element_bytes)
                + (world_size - 1) * run.shard(rank) * run.element_bytes
            )
            for run in runs
        )
    trained_on_disk = sum(
        run.times * _master_bytes(run.element_bytes) * sum(parameter.numel for parameter in run.bucket.parameters)
        for run in runs
    )
    return Plan(
        stage=stage,
        weights=(whole if world_size == 1 else padded) + model.frozen_bytes + model.buffer_bytes,
        gradients=gradients,
        masters=masters,
        states=states,
        buckets=buckets,
        offloaded=offloaded,
        snapshot=(1 + optimizer.states) * owned_bytes,
        checkpoint=(1 + optimizer.states) * trained_on_disk + model.frozen_bytes + model.saved_buffer_bytes,
        checkpoint_frozen=model.frozen_bytes,
        traffic=traffic,
    )


def _plan_ddp(model: Model, setup: Setup) -> Plan:
    """What Lightning's `DDPStrategy` takes, with its defaults, and the one file that it saves."""
    whole, states = model.trained_bytes, setup.optimizer.states * model.trained_bytes
    others = setup.world_size - 1
    return Plan(
        stage=0,
        weights=whole + model.frozen_bytes + model.buffer_bytes,
        gradients=whole,
        masters=0,
        states=states,
        buckets=whole if others else 0,
        offloaded=0,
        snapshot=0,
        checkpoint=whole + states + model.frozen_bytes + model.saved_buffer_bytes,
        checkpoint_frozen=0,
        traffic=2 * others * whole // setup.world_size,
    )


def _master_bytes(element_bytes: int) -> int:
    return max(element_bytes, _MASTER_BYTES)


@dataclass(frozen=True, slots=True)
class _Run:
    """A bucket, and how many there are of just this kind."""

    bucket: Bucket
    times: int = 1

    @property
    def element_bytes(self) -> int:
        return self.bucket.parameters[0].element_bytes

    def shard(self, rank: int) -> int:
        start, stop = self.bucket.shards.of(rank)
        return stop - start


def _runs(model: Model, setup: Setup) -> list[_Run]:
    """The buckets in the order in which backward fills them: as `engine.partition.Partition` makes them."""

    def buckets(parameters: Sequence[ParameterSpec]) -> list[Bucket]:
        bucket_bytes = setup.bucket_bytes if setup.world_size > 1 else 1
        policy = setup.policy if model.parameters else "element"  # of parameters that aren't known, each has its share
        return plan_buckets(parameters, setup.world_size, policy, bucket_bytes, equal_shards=setup.equal_shards)

    if model.parameters:
        alike: dict[int, list[ParameterSpec]] = {}
        for parameter in reversed(model.parameters):
            alike.setdefault(parameter.element_bytes, []).append(parameter)
        return [_Run(bucket) for parameters in alike.values() for bucket in buckets(parameters)]

    # As if each bucket were a round: then what gloo receives in longer ones isn't counted. See [Note: rounds]
    def made_up(numel: int) -> list[ParameterSpec]:
        piece, rest = divmod(numel, _PIECES)
        pieces = [piece] * (_PIECES - 1) + [piece + rest]
        return [ParameterSpec(str(index), (size,), model.element_bytes) for index, size in enumerate(pieces) if size]

    numel = max(1, setup.bucket_bytes // model.element_bytes)
    full, rest = divmod(model.trained, numel)
    runs = [_Run(bucket, full) for bucket in buckets(made_up(numel)) if full]
    return runs + [_Run(bucket) for bucket in buckets(made_up(rest))]


@dataclass
class _Pool:
    """The sizes that `engine.buffers.BufferPool` would hold."""

    free: list[int] = field(default_factory=list)
    lent: int = 0

    @property
    def nbytes(self) -> int:
        return sum(self.free) + self.lent

    def take(self, nbytes: int) -> int:
        fitting = [size for size in self.free if size >= nbytes]
        if fitting:
            size = min(fitting)
            self.free.remove(size)
        else:
            size, self.free = nbytes, []
        self.lent += size
        return size

    def give_back(self, size: int) -> None:
        self.lent -= size
        self.free += [size] if size else []


def _most_in_flight(runs: Sequence[_Run], setup: Setup, rank: int, *, lends_buffers: bool) -> int:
    """The most memory that gradients take on their way to the segments, at any moment of a backward.

    A bucket is filled while at most one other is being reduced. A parameter that fills its bucket alone lends the
    memory of its gradient; any other gradient is there beside the bucket until it has been copied into it. See
    [Note: the way of a gradient]. Between two reductions the buffers stay, if they aren't lent to whole gradients.
    """
    pool, received = _Pool(), _Pool()
    in_flight: list[tuple[int, int, int]] = []  # of the pool, the gradient's own, of what is received
    most = 0

    def look(here: int = 0) -> None:
        nonlocal most
        most = max(most, pool.nbytes + received.nbytes + sum(own for _, own, _ in in_flight) + here)

    def wait(keep: int) -> None:
        while len(in_flight) > keep:
            pooled, _, got = in_flight.pop(0)
            pool.give_back(pooled)
            received.give_back(got)

    for _ in range(2):  # in the first backward the pools grow
        pool = _Pool() if lends_buffers else pool
        for run in (each for each in runs for _ in range(min(each.times, _IN_FLIGHT + 1))):
            bucket, reduce_bytes = run.bucket, setup.reduce_bytes or run.element_bytes
            nbytes = bucket.numel * reduce_bytes
            alone = bucket.parameters[0].numel == bucket.numel and reduce_bytes == run.element_bytes
            pooled = 0
            if not alone:
                wait(_IN_FLIGHT - 1)
                pooled = pool.take(nbytes)
            for parameter in bucket.parameters:
                look(parameter.numel * run.element_bytes)
            wait(_IN_FLIGHT - 1)
            got = 0 if setup.equal_shards else received.take(run.shard(rank) * (setup.world_size - 1) * reduce_bytes)
            in_flight.append((pooled, nbytes if alone else 0, got))
            look()
        wait(0)
    return most
