"""The user's own optimizer, stepping on this rank's segments.

The optimizer object stays the user's: schedulers hold it, callbacks look at its `param_groups`, `toggle_optimizer`
flips the parameters in there. So the groups hold the user's parameters at all times but inside `step`; for the
length of a step their `"params"` are this rank's masters (see [Note: masters] in `buckets`), and everything else in
them stays where it is. Optimizer state is keyed by the masters, and so exists for this rank's segments only: that is
the memory ZeRO saves (Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020,
section 5.1).
"""

from __future__ import annotations

import copy
import functools
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_zero.engine.arrivals import Arrivals
from lightning_zero.engine.buckets import ParameterBucket, Piece
from lightning_zero.engine.buffers import StateMemory
from lightning_zero.engine.cuts import ELEMENT_WISE, WHOLE_PARAMETERS, way_out
from lightning_zero.engine.gradients import GradientReducer
from lightning_zero.engine.states import copy_range, part_of, require_cuttable, room_for, taken_over, tensors_in
from lightning_zero.engine.transport import Pending
from lightning_zero.errors import CheckpointMismatchError, UnsupportedModelError

_COMPARED_STEPS = (1, 2, 4, 8, 16)
"""The steps after which what an optimizer keeps in its param groups is compared: see `_require_same_groups`."""

_SCHEDULED = ("lr", "momentum")
"""What schedulers write into param groups: it may differ between the ranks, as the metrics that it follows do."""

MASTER = "lightning_zero_master"
"""The name under which a master stands among an optimizer's states, where a checkpoint's module doesn't hold it."""

_TURNS = 4
"""In how many turns an element-wise optimizer steps: while it steps on one's parameters, the last one's are gathered.

Each turn costs a GPU some kernel launches, so they are few."""

_TORCHS_ENTRIES = frozenset(("state", "param_groups"))
"""What torch has in an optimizer's state dict; whatever else there is, is the optimizer's own."""

_RANGES = "lightning_zero_ranges"
"""Where `optimizer.state_dict()` lists the segments that its state is of: only the same ones can take it back."""

_Hook = Callable[..., Any]

_BETWEEN_STEPS = ("train", "eval")
"""Methods by which schedule-free optimizers move parameters between steps."""


@dataclass(frozen=True, eq=False)
class OwnedSegment:
    """A segment that this rank owns of an optimizer's parameters.

    Attributes:
        name: the parameter's name in the module.
        start: the first of its flattened elements.
        stop: one past the last.
        master: the tensor that the optimizer steps on: fp32, or fp64 for an fp64 parameter.
        optimizer: the optimizer that steps on it.
    """

    name: str
    start: int
    stop: int
    master: Tensor = field(repr=False)  # a list of segments is looked at in notebooks
    optimizer: Optimizer = field(repr=False)

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of this segment, by name; empty before the first step."""
        state: dict[str, Any] = self.optimizer.state.get(self.master, {})
        return state


_OWNER = "lightning_zero_owner"
"""The attribute of a wrapped method that says who wrapped it."""


def _is_torchs_own(step: Callable[..., Any]) -> bool:
    """Whether nobody but torch has a part in a method, as its schedulers have, which wrap it."""
    function: Any = getattr(step, "__func__", step)
    while function is not None:
        if not getattr(function, "__globals__", {}).get("__name__", "").startswith("torch."):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


class SegmentedOptimizer:
    """Makes a user's optimizer step on this rank's segments, in place, until `detach()`.

    Args:
        optimizer: the user's; `add` gives it the buckets with its parameters.
        reducer: brings the gradients.
        take_in_new_parameters: partitions those parameters of the groups that aren't yet.
        before_change: called before masters or states change, after the closure.
        arrivals: is told of the parameters that are on their way when a step is over.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        reducer: GradientReducer,
        take_in_new_parameters: Callable[[], None],
        before_change: Callable[[], None],
        arrivals: Arrivals,
    ) -> None:
        self.optimizer = optimizer
        self._arrivals = arrivals
        self._before_change = before_change
        self._reducer = reducer
        self._take_in_new_parameters = take_in_new_parameters
        self.is_stepping = False
        """A step is under way, or was broken off: masters, states and parameters may not belong together."""
        self._pieces: dict[Parameter, tuple[ParameterBucket, Piece]] = {}
        self._turns: list[list[ParameterBucket]] = []  # the buckets of the step under way
        self._users_params: list[list[Parameter]] = []
        self._stand_ins: dict[int, Parameter] = {}  # by the group's place: see `_placeholders`
        self.buckets: dict[ParameterBucket, None] = {}  # in their order; asked for each parameter in each step
        # An optimizer that is used for a second fit goes on with the state that it has by the first one's masters.
        former = getattr(getattr(optimizer.state_dict, "__func__", None), _OWNER, None)
        self._former = {} if former is None else {parameter: piece for parameter, (_, piece) in former._pieces.items()}
        self._user_step = optimizer.step
        self._user_add_param_group = optimizer.add_param_group
        # A step that somebody has put in its place may count its calls, or ignore its closure.
        is_torchs_own = _is_torchs_own(self._user_step)
        self._takes_turns = reducer.is_distributed and is_torchs_own and type(optimizer) in ELEMENT_WISE
        self._steps = 0
        self._compares = reducer.is_distributed and not type(optimizer).__module__.startswith("torch.optim")
        self._asks = is_torchs_own and type(optimizer) in (*ELEMENT_WISE, *WHOLE_PARAMETERS)
        """Whether the optimizer is known to evaluate a closure that it is given: some never do."""

        @functools.wraps(self._user_step)
        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self.step(*args, **kwargs)

        @functools.wraps(self._user_add_param_group)
        def add_param_group(_: Optimizer, param_group: dict[str, Any]) -> None:
            self._user_add_param_group(param_group)
            take_in_new_parameters()

        @functools.wraps(type(optimizer).state_dict)
        def state_dict(_: Optimizer) -> dict[str, Any]:
            return self.state_dict() | self._ranges()

        @functools.wraps(type(optimizer).load_state_dict)
        def load_state_dict(_: Optimizer, state_dict: dict[str, Any]) -> None:
            self.load_state(state_dict, StateMemory())

        # Bound methods, since a learning-rate scheduler that is made later wraps `step.__func__`.
        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
        optimizer.add_param_group = types.MethodType(add_param_group, optimizer)  # type: ignore[method-assign]
        for name in _BETWEEN_STEPS:
            if callable(method := getattr(type(optimizer), name, None)):
                setattr(optimizer, name, types.MethodType(self._outside_step(method), optimizer))
        # These two stay after `detach`: so does the state, with the masters for its keys.
        setattr(state_dict, _OWNER, self)
        optimizer.state_dict = types.MethodType(state_dict, optimizer)  # type: ignore[method-assign]
        optimizer.load_state_dict = types.MethodType(load_state_dict, optimizer)  # type: ignore[method-assign]

    def add(self, buckets: Sequence[ParameterBucket]) -> None:
        """Take in buckets with this optimizer's parameters, and cut the state that it came with."""
        self.buckets |= dict.fromkeys(buckets)
        state = self.optimizer.state
        for bucket in buckets:
            for piece in bucket.pieces:
                self._pieces[piece.slot.parameter] = (bucket, piece)
                if bucket.is_own_master:
                    continue
                former = self._former.pop(piece.slot.parameter, None)
                if former is not None and former.master in state:
                    state[piece.master] = taken_over(state.pop(former.master), former, piece, self.optimizer)
                for key, value in state.get(piece.slot.parameter, {}).items():
                    require_cuttable(value, key, piece, self.optimizer)
                    state[piece.master][key] = part_of(value, key, piece, torch.empty_like)
            for slot in bucket.slots if not bucket.is_own_master else ():
                state.pop(slot.parameter, None)

    def detach(self) -> None:
        """Give the optimizer its own methods back."""
        self.optimizer.step = self._user_step  # type: ignore[method-assign]
        self.optimizer.add_param_group = self._user_add_param_group  # type: ignore[method-assign]
        for name in _BETWEEN_STEPS:
            vars(self.optimizer).pop(name, None)

    @property
    def segments(self) -> list[OwnedSegment]:
        """What this rank owns, in the order of the optimizer's param groups."""
        return [
            OwnedSegment(piece.segment.name, piece.segment.start, piece.segment.stop, piece.master, self.optimizer)
            for _, piece in self._in_group_order()
            if piece.segment.numel
        ]

    def _in_group_order(self) -> Iterator[tuple[ParameterBucket, Piece]]:
        for group in self.optimizer.param_groups:
            yield from (self._pieces[parameter] for parameter in group["params"] if parameter in self._pieces)

    @property
    def pieces(self) -> Iterator[Piece]:
        """What this rank owns, empty segments too, in the order in which the buckets were added."""
        for _, piece in self._pieces.values():
            yield piece

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the state, in torch's format: parameters are numbered, group by group.

        The state of a parameter that this rank owns whole has the parameter's shape; a part of one is flat.
        """
        for hook in self._hooks_of("state_dict_pre"):
            hook(self.optimizer)
        groups, count = [], 0
        # What an optimizer keeps under a key that is no parameter, it keeps for all of them.
        state: dict[Any, Any] = {k: v for k, v in self.optimizer.state.items() if not isinstance(k, Tensor)}
        own = self._own_state_dict() if self._overrides_state_dict else {}
        shown = own.pop("param_groups", self.optimizer.param_groups)
        for group, show in zip(self.optimizer.param_groups, shown, strict=True):
            indices = list(range(count, count + len(group["params"])))
            count += len(indices)
            groups.append({**{key: value for key, value in show.items() if key != "params"}, "params": indices})
            for index, parameter in zip(indices, group["params"], strict=True):
                for piece in self._owned([parameter]):
                    if piece.master not in self.optimizer.state:
                        continue
                    shape = parameter.shape if piece.segment.numel == parameter.numel() else piece.master.shape
                    state[index] = {
                        key: value.view(shape)
                        if isinstance(value, Tensor) and value.shape == piece.master.shape
                        else value
                        for key, value in self.optimizer.state[piece.master].items()
                    }
        result = {"state": state, "param_groups": groups, **own}
        for hook in self._hooks_of("state_dict_post"):
            result = hook(self.optimizer, result) or result
        return result

    def _hooks_of(self, event: str) -> Iterable[_Hook]:
        """The optimizer's own hooks; of one that has a `state_dict` of its own, that calls them."""
        hooks: dict[int, _Hook] = getattr(self.optimizer, f"_optimizer_{event}_hooks", {})
        return () if self._overrides_state_dict else list(hooks.values())

    def _ranges(self) -> dict[str, Any]:
        """Of which segments the state is, in the order of the param groups; nothing where all is on this rank."""
        owned = [(piece.segment.name, piece.segment.start, piece.segment.stop) for _, piece in self._in_group_order()]
        return {_RANGES: owned} if self._reducer.is_distributed else {}

    def _owned(self, parameters: Iterable[Parameter]) -> Iterator[Piece]:
        for parameter in parameters:
            if parameter in self._pieces:
                yield self._pieces[parameter][1]

    def gradients(self) -> dict[Piece, Tensor]:
        """The averaged gradients of this rank's segments. What is written into them is stepped on. A collective.

        With one rank they are the parameters' own, in whatever dtype.
        """
        self._reducer.finish()
        if not self._reducer.is_distributed:
            whole = {piece: piece.slot.parameter.grad for _, piece in self._in_group_order()}
            return {piece: gradient for piece, gradient in whole.items() if gradient is not None}
        self._give_gradients(offloaded=False)
        given = {piece: bucket.segment_gradient(piece) for bucket, piece in self._in_group_order()}
        return {piece: gradient for piece, gradient in given.items() if gradient is not None}

    def _give_gradients(self, *, offloaded: bool) -> None:
        """Give each master the gradient of its segment; an offloaded one gets a copy, which is what it steps on."""
        for bucket, piece in self._in_group_order():
            if not bucket.is_own_master and (offloaded or not bucket.is_offloaded):
                piece.master.grad = bucket.master_gradient(piece)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """What `optimizer.step` does instead: the closure, the gradients, the step on segments, the gather.

        The optimizer itself evaluates the closure, as ever: see `_evaluated`. Its hooks see the user's parameters,
        before everything and after it.
        """
        with self._without_hooks() as (before, after):
            if before or not self._takes_turns:  # a hook, or an optimizer before its closure, may change states
                self._before_change()
            for hook in before:
                args, kwargs = hook(self.optimizer, args, kwargs) or (args, kwargs)
            result = self._step(*args, **kwargs)
        if after:
            self._arrivals.wait()
        for hook in after:
            hook(self.optimizer, args, kwargs)
        return result

    @contextmanager
    def _without_hooks(self) -> Iterator[tuple[list[_Hook], list[_Hook]]]:
        """Take torch's step hooks, those of all optimizers too, out of the optimizer's own step."""
        own = self.optimizer
        hooks: list[dict[int, _Hook]] = [
            _global_optimizer_pre_hooks,
            getattr(own, "_optimizer_step_pre_hooks", {}),
            getattr(own, "_optimizer_step_post_hooks", {}),
            _global_optimizer_post_hooks,
        ]
        taken = [dict(some) for some in hooks]
        for some in hooks:
            some.clear()
        try:
            yield [*taken[0].values(), *taken[1].values()], [*taken[2].values(), *taken[3].values()]
        finally:
            for some, were in zip(hooks, taken, strict=True):
                added = dict(some)
                some.clear()
                some.update(were | added)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        closure = args[0] if args else kwargs.get("closure")
        asked = [False]
        if closure is None or not self._asks:
            self._begin()
        if closure is not None:
            evaluated = self._evaluated(closure, asked)
            args, kwargs = ((evaluated, *args[1:]), kwargs) if args else ((), {**kwargs, "closure": evaluated})
        with self._on_segments():
            result = self._user_step(*args, **kwargs)
            if closure is not None and self._asks and not asked[0]:
                raise UnsupportedModelError(
                    f"{type(self.optimizer).__name__} evaluated its closure in earlier steps, and not in this one, "
                    "which has thus seen no gradients; let it evaluate the closure in every step, or in none"
                )
            gathering = self._take_turns()
        self._end(gathering)
        self._steps += 1
        if self._compares and self._steps in _COMPARED_STEPS:
            self._require_same_groups()
        return result

    def _require_same_groups(self) -> None:
        """Refuse an optimizer that has computed of all parameters together what is now another number on each rank.

        It is one that nobody has told us of, and would go on with a step size, say, of this rank's own. Such a number
        usually stands in its param groups. Whole numbers may well differ, such as the steps of a group whose gradients
        were None on this rank. A collective.
        """
        mine = [
            {key: float(value) for key, value in group.items() if key not in _SCHEDULED and _is_real(value)}
            for group in self.optimizer.param_groups
        ]
        for rank, others in enumerate(self._reducer.everyones(mine)):
            for group, other in zip(mine, others, strict=True):
                for key in group.keys() & other.keys():
                    if repr(group[key]) != repr(other[key]):
                        raise UnsupportedModelError(
                            f"{type(self.optimizer).__name__} can't be partitioned: it has computed {key!r} of its "
                            f"parameters, as {group[key]} on this rank and as {other[key]} on rank {rank}, which have "
                            f"but a part of them each. Use DDPStrategy for it, or another optimizer"
                            f"{way_out(self.optimizer)}."
                        )

    def _take_turns(self) -> list[tuple[ParameterBucket, Pending]]:
        """The first turn has been stepped on: gather it, and let the optimizer step on the others."""
        first, *others = self._turns
        gathering = self._publish(first)
        for turn in others:
            self._let_groups_hold(turn)
            self._user_step()
            gathering += self._publish(turn)
        return gathering

    def _outside_step(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the optimizer's that works on parameters and their states, on segments. A collective."""

        @functools.wraps(method)
        def on_segments(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            self._begin()
            with self._on_segments():
                result = method(self.optimizer, *args, **kwargs)
            self._end(sent for turn in self._turns for sent in self._publish(turn))
            self._arrivals.wait()
            return result

        return on_segments

    def _begin(self) -> None:
        """Bring parameters and gradients to the segments: from here on, what the ranks hold changes."""
        self._before_change()
        self._take_in_new_parameters()
        self._arrivals.wait()
        self._reducer.finish()
        active = [bucket for bucket in self.buckets if not bucket.is_idle]
        self._turns = _cut_into_turns(active) if self._takes_turns else [active]
        self.take_over_outside_writes(active)
        self._give_gradients(offloaded=True)
        self._reducer.forget_norms()
        self.is_stepping = True

    def _end(self, gathering: Iterable[tuple[ParameterBucket, Pending]]) -> None:
        """The segments were stepped on, and are on their way to every rank."""
        self.drop_gradients()
        self._arrivals.expect(gathering)
        self._turns = []
        self.is_stepping = False

    def _publish(self, buckets: Iterable[ParameterBucket]) -> list[tuple[ParameterBucket, Pending]]:
        """Begin to gather these buckets' segments on every rank."""
        moved = [bucket for bucket in buckets if not bucket.is_own_master]
        for bucket in moved:
            bucket.put_masters_back()
        return [(bucket, bucket.publish()) for bucket in moved]

    def _evaluated(self, closure: Callable[[], Any], asked: list[bool]) -> Callable[[], Any]:
        """The closure as the optimizer gets it: it is evaluated with the user's parameters in the param groups.

        An optimizer that asks again, or that has moved the parameters before it asks, does so at another point. Where
        all parameters are on this rank, they are brought there; where they aren't, such an optimizer would compute with
        parts, and is refused.
        """
        masters = [piece.master for bucket, piece in self._pieces.values() if not bucket.is_own_master]
        versions = [(master._version, master.data_ptr()) for master in masters]

        def evaluate() -> Any:
            moved = versions != [(master._version, master.data_ptr()) for master in masters]
            if (asked[0] or moved) and self._reducer.is_distributed:
                does = "evaluates its closure more than once" if asked[0] else "moves parameters before its closure in"
                raise UnsupportedModelError(
                    f"{type(self.optimizer).__name__} {does} a step, which can't be done while its parameters are "
                    "partitioned; use DDPStrategy for it, or another optimizer"
                )
            self._to_parameters()
            if asked[0] or moved:
                for _, gathered in self._publish(self.buckets):
                    gathered.wait()
            asked[0] = self._asks = True
            self.is_stepping = False
            with torch.enable_grad():
                result = closure()
            self._begin()
            self._to_segments()
            return result

        return evaluate

    def take_over_outside_writes(self, buckets: Iterable[ParameterBucket] | None = None) -> None:
        """Bring what was written into parameters since the last step into the masters."""
        buckets = self.buckets if buckets is None else buckets
        buckets = [bucket for bucket in buckets if not bucket.is_own_master]
        storages = {bucket.storage for bucket in self.buckets if not bucket.is_own_master} - {0}
        for bucket in buckets:
            bucket.part_from_others(storages)
        for bucket in buckets:
            bucket.take_over_outside_writes()

    def drop_gradients(self) -> None:
        """Let go of the masters' gradients; they are taken from the parameters' again when they are asked for."""
        for bucket, piece in self._pieces.values():
            if not bucket.is_own_master:
                piece.master.grad = None

    @contextmanager
    def _on_segments(self) -> Iterator[None]:
        self._to_segments()
        try:
            yield
        finally:
            self._to_parameters()

    def _to_segments(self) -> None:
        """Let the param groups hold this rank's masters."""
        for _, piece in self._pieces.values():
            if piece.master is not piece.slot.parameter:
                piece.master.__dict__.update(piece.slot.parameter.__dict__)  # what a user has hung on the parameter
        self._users_params = [group["params"] for group in self.optimizer.param_groups]
        self._let_groups_hold(self._turns[0] if len(self._turns) > 1 else self.buckets)

    def _let_groups_hold(self, buckets: Iterable[ParameterBucket]) -> None:
        """Let the param groups hold the masters of some buckets, in the order of the user's parameters."""
        held = set(buckets)
        for index, (group, parameters) in enumerate(zip(self.optimizer.param_groups, self._users_params, strict=True)):
            owned = (self._pieces[parameter] for parameter in parameters if parameter in self._pieces)
            masters: list[Parameter] = [piece.master for bucket, piece in owned if bucket in held]
            group["params"] = masters or self._placeholders(index, parameters)

    def _placeholders(self, index: int, parameters: Sequence[Parameter]) -> list[Parameter]:
        """For a group of which this rank owns nothing: torch's optimizers take an empty one, others stumble over it.

        They divide by sizes, too, and keep a state of whatever they are given. So it is one element, always the same
        one, whose gradient is zero: what every optimizer has to cope with, and what adds nothing to any sum.
        """
        if not parameters or type(self.optimizer).__module__.startswith("torch.optim"):
            return []
        if index not in self._stand_ins:
            like = parameters[0]
            self._stand_ins[index] = Parameter(like.new_zeros((1,) * max(like.dim(), 1), dtype=torch.float32))
        placeholder = self._stand_ins[index]
        placeholder.grad = torch.zeros_like(placeholder)
        return [placeholder]

    def _to_parameters(self) -> None:
        """Let the param groups hold the user's parameters."""
        for group, parameters in zip(self.optimizer.param_groups, self._users_params, strict=False):
            group["params"] = parameters

    def load_state(self, state_dict: Mapping[str, Any], memory: StateMemory) -> None:
        """Take this rank's part of a whole state, replacing what is there.

        What is read from a checkpoint is read into the tensors that are there, if they fit.

        Args:
            state_dict: as `torch.optim.Optimizer.state_dict()` gives it for whole parameters, whoever saved it, or as
                this one's gave it on this rank. A tensor may be one that is still in a checkpoint: then only the owned
                range of it is read.
            memory: where to put new tensors, so far as there is room.

        Raises:
            CheckpointMismatchError: the groups don't match, or the state can't be cut as the partition asks.
        """
        self._take_in_new_parameters()
        for hook in self._hooks_of("load_state_dict_pre"):
            state_dict = dict(state_dict)
            state_dict = hook(self.optimizer, state_dict) or state_dict
        saved = self._saved_states(state_dict)
        # From here on, what is there is written over.
        self._before_change()
        groups = self.optimizer.param_groups
        state: defaultdict[Any, Any] = defaultdict(dict)
        state.update(
            {key: copy.deepcopy(value) for key, value in state_dict["state"].items() if not isinstance(key, int)}
        )
        for group, saved_group in zip(groups, state_dict["param_groups"], strict=True):
            group.update({key: copy.deepcopy(value) for key, value in saved_group.items() if key != "params"})
        # The largest first: those that come late have to fit into what the others leave
        for piece, values in sorted(saved, key=lambda one: one[0].segment.numel, reverse=True):
            held = self.optimizer.state.get(piece.master, {})
            for key, value in values.items():
                if key == MASTER:
                    copy_range(value, piece.segment.start, piece.segment.stop, piece.master.detach())
                else:
                    # What isn't read from a file may be what is held, or a part of what is still to be taken over
                    in_place = held.get(key) if hasattr(value, "read_range") else None
                    room = functools.partial(room_for, in_place, memory)
                    state[piece.master][key] = part_of(value, key, piece, room)
        self._place_steps(state)
        self.optimizer.__setstate__({"state": state, "param_groups": groups})
        if self.optimizer.state is not state:  # one that wraps another, and shows that one's
            self.optimizer.state.clear()
            self.optimizer.state.update(state)
        if self._overrides_state_dict:
            self._load_own_entries(state_dict, {"state": state, "param_groups": groups})
        for hook in self._hooks_of("load_state_dict_post"):
            hook(self.optimizer)

    def _saved_states(self, state_dict: Mapping[str, Any]) -> list[tuple[Piece, Mapping[str, Any]]]:
        """What a state dict holds of each parameter of which this rank owns a piece; or an error: see `load_state`."""
        if not state_dict.keys() >= _TORCHS_ENTRIES:
            raise CheckpointMismatchError(
                f"the checkpoint's state of {type(self.optimizer).__name__} is none in torch's format, but has "
                f"{', '.join(map(repr, state_dict))}; load its weights alone (load_module_only=True, or an export)"
            )
        saved_groups = state_dict["param_groups"]
        members: list[list[Any]] = [group["params"] for group in self.optimizer.param_groups]
        sizes = [len(group) for group in members]
        saved_sizes = [len(group["params"]) for group in saved_groups]
        if sizes != saved_sizes:  # whoever saved it may have left out what isn't trained, as DeepSpeed does
            members = [[parameter for parameter in group if parameter.requires_grad] for group in members]
        if [len(group) for group in members] != saved_sizes:
            raise CheckpointMismatchError(
                f"the checkpoint has param groups of {saved_sizes} parameters, this {type(self.optimizer).__name__} "
                f"of {sizes}; resume with the model and configure_optimizers that it was saved with"
            )
        saved = [
            (piece, state_dict["state"].get(index, {}))
            for group, saved_group in zip(members, saved_groups, strict=True)
            for parameter, index in zip(group, saved_group["params"], strict=True)
            for piece in self._owned([parameter])
        ]
        is_own = _RANGES in state_dict  # this rank's part, as `optimizer.state_dict()` gave it
        if is_own and state_dict[_RANGES] != self._ranges().get(_RANGES):
            raise CheckpointMismatchError(
                f"the state of {type(self.optimizer).__name__} is another rank's part, or was cut in another way; "
                "self.trainer.save_checkpoint(), called on every rank, saves all of it, and resumes anywhere"
            )
        for piece, values in saved if not is_own else ():
            for key, value in values.items():
                require_cuttable(value, key, piece, self.optimizer)
        return saved

    @property
    def _overrides_state_dict(self) -> bool:
        return type(self.optimizer).state_dict is not Optimizer.state_dict

    def _own_state_dict(self) -> dict[str, Any]:
        """What the optimizer's own `state_dict` says beside its states: its groups, a count of its calls, and the like.

        Raises:
            UnsupportedModelError: there are tensors in it, of this rank's segments: of an optimizer that it wraps, say.
        """
        with self._on_segments():
            entries = type(self.optimizer).state_dict(self.optimizer)
        entries.pop("state", None)
        for key, value in entries.items() if self._reducer.is_distributed else ():
            if key != "param_groups" and any(tensor.numel() > 1 for tensor in tensors_in(value)):
                raise UnsupportedModelError(
                    f"{type(self.optimizer).__name__} has states in its state_dict()[{key!r}], and not in its `state`: "
                    "it isn't known whose they are, and they can't be saved from several ranks. Save weights alone "
                    "(save_weights_only=True), or use DDPStrategy for it, or another optimizer"
                )
        return entries

    def _load_own_entries(self, state_dict: Mapping[str, Any], loaded: dict[str, Any]) -> None:
        """Load what `_own_state_dict` gave by the optimizer's own method; states and groups stay as loaded."""
        with self._on_segments():
            own = type(self.optimizer).state_dict(self.optimizer)
            entries = {key: state_dict[key] for key in own.keys() - _TORCHS_ENTRIES if key in state_dict}
            if entries:
                type(self.optimizer).load_state_dict(self.optimizer, {**own, **entries})
                self.optimizer.__setstate__(loaded)

    def _place_steps(self, state: Mapping[Parameter, dict[str, Any]]) -> None:
        """Fused and capturable optimizers count their steps on the device, the others on the host.

        Source: torch's [Note: special device hosting for step], in `torch.optim.Optimizer.load_state_dict`.
        """
        for group in self.optimizer.param_groups:
            if group.get("fused") or group.get("capturable"):
                for piece in self._owned(group["params"]):
                    held = state.get(piece.master, {})
                    if isinstance(step := held.get("step"), Tensor):
                        held["step"] = step.to(piece.master.device, torch.float32)


def _is_real(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point())


def _cut_into_turns(buckets: Sequence[ParameterBucket]) -> list[list[ParameterBucket]]:
    """Runs of about the same size; those first that the next forward needs first."""
    turns: list[list[ParameterBucket]] = [[]]
    whole, before = sum(bucket.plan.numel for bucket in buckets), 0
    for bucket in reversed(buckets):
        if before * _TURNS >= whole * len(turns):
            turns.append([])
        turns[-1].append(bucket)
        before += bucket.plan.numel
    return turns
