"""Flat groups: in what of its flat tensors a rank holds which elements of which parameter.

See [Note: DeepSpeed's layout].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

from lightning_zero.checkpoint.deepspeed.module import Shapes
from lightning_zero.checkpoint.descriptions import integers, item, number_of_steps, require
from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.foreign import Piece
from lightning_zero.checkpoint.manifest import PLAIN, Plain
from lightning_zero.checkpoint.torch_file import is_tensor, part_of, unread_tensor
from lightning_zero.errors import CorruptCheckpointError, UnsupportedModelError
from lightning_zero.segments import Segment, SegmentIndex


@dataclass(frozen=True, slots=True)
class FlatGroups:
    """What one rank's optimizer file says.

    Attributes:
        where: its path.
        masters: a flat tensor for each flat group.
        states: the optimizer's, by the number of the flat group.
        groups: the param groups; `params` has the numbers of the flat groups.
        step: of all, where the states have none.
        padded: how many elements at the end of each master are none of a parameter's.
        paddings: how many there are behind each parameter, for each flat group; none if it is empty.
    """

    where: str
    masters: list[Elements]
    states: Mapping[Any, Any]
    groups: list[dict[Any, Any]]
    step: object
    padded: tuple[int, ...] = ()
    paddings: tuple[tuple[int, ...], ...] = ()

    def state(self, flat: int, steps: int) -> dict[Any, Any]:
        """One flat group's state, with the step that it has come to as a number; `steps`, if nothing says it."""
        state = require(self.states.get(flat, {}), dict, f"{self.where}: the state of flat group {flat}")
        if not state:
            return {}
        group = next((group for group in self.groups if flat in group["params"]), {})
        step = state.get("step", group.get("step", steps if self.step is None else self.step))
        if "step" not in state and "exp_avg" not in state:
            return state
        where = f"{self.where}: the step of flat group {flat}"
        return {**state, "step": number_of_steps(unread_tensor(step, where) if is_tensor(step) else step, where)}


def read_flat_groups(content: Mapping[Any, Any], where: str) -> FlatGroups:
    """What a rank's optimizer file says, at stages 1 to 3.

    Raises:
        CorruptCheckpointError: it isn't what DeepSpeed writes.
        UnsupportedModelError: it holds the states of experts.
    """
    saved = item(content, "optimizer_state_dict", dict, where)
    at_stage_3 = "fp32_flat_groups" in saved
    masters = item(saved, "fp32_flat_groups" if at_stage_3 else "single_partition_of_fp32_groups", list, where)
    base = saved.get("optimizer_state_dict" if at_stage_3 else "base_optimizer_state")
    if isinstance(base, list):  # an elastic checkpoint has states, and no param groups
        base = {
            "state": dict(enumerate(base)),
            "param_groups": [{"params": [flat]} for flat in range(len(base))],
        }
    base = require(base, dict, f"{where}: the optimizer's state")
    stripped = at_stage_3 or "zero_stage" in saved
    return FlatGroups(
        where,
        [unread_tensor(flat, f"{where}: the masters of flat group {number}") for number, flat in enumerate(masters)],
        item(base, "state", dict, where),
        read_groups(base, where),
        saved.get("base_optimizer_state_step"),
        () if stripped else integers(saved.get("group_paddings", ()), f"{where}: 'group_paddings'"),
        tuple(
            integers(paddings, f"{where}: 'param_alignment_paddings'")
            for paddings in require(saved.get("param_alignment_paddings", []), list, f"{where}: the paddings")
        ),
    )


def read_groups(base: Mapping[Any, Any], where: str) -> list[dict[Any, Any]]:
    """The param groups in an optimizer's state dict."""
    groups = item(base, "param_groups", list, where)
    for group in groups:
        integers(require(group, dict, f"{where}: a param group").get("params"), f"{where}: 'params' of a group")
        if group.get("moe"):
            raise UnsupportedModelError(f"{where} holds the states of experts, which can't be imported")
    return groups


# ---------------------------------------------------------------------------------------------------- where it lies


def _joined(shapes: Shapes, paddings: Iterable[int], begin: int, end: int) -> Iterator[tuple[Segment, int]]:
    """Stages 1 and 2: what lies between two places of a flat group, and where in there."""
    position = 0
    for (name, shape), padding in zip(shapes.items(), chain(paddings, repeat(0)), strict=False):
        start, stop = max(begin - position, 0), min(end - position, math.prod(shape))
        if start < stop:
            yield Segment(name, start, stop), position + start - begin
        position += math.prod(shape) + padding


def _divided(shapes: Shapes, rank: int, count: int) -> Iterator[tuple[Segment, int]]:
    """Stage 3: a rank's part of each parameter, and where in its flat tensor."""
    position = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        each = -(-numel // count)
        start, stop = min(rank * each, numel), min((rank + 1) * each, numel)
        if start < stop:
            yield Segment(name, start, stop), position
        position += each


def _require_lengths(shapes: list[Shapes], optimizers: list[FlatGroups], stage: int) -> None:
    """Whether the flat tensors are as long as the parameters in them make them."""
    for flat, of in enumerate(shapes):
        numels = [math.prod(shape) for shape in of.values()]
        if stage == 3:
            expected = len(optimizers) * sum(-(-numel // len(optimizers)) for numel in numels)
        else:
            paddings = optimizers[0].paddings[flat] if flat < len(optimizers[0].paddings) else ()
            expected = sum(numels) + sum(paddings)
        found = 0
        for optimizer in optimizers:
            if len(optimizer.masters) != len(shapes):
                raise CorruptCheckpointError(
                    f"{optimizer.where} holds {len(optimizer.masters)} flat groups, "
                    f"and the model's file lists {len(shapes)}: they are of different runs"
                )
            found += optimizer.masters[flat].numel
            found -= optimizer.padded[flat] if flat < len(optimizer.padded) else 0
        if found != expected:
            raise CorruptCheckpointError(
                f"{optimizers[0].where} and the other ranks' hold {found} elements in flat group {flat}, and its "
                f"parameters have {expected}: the files are of different runs, or one is damaged"
            )


def trained_pieces(
    shapes: list[Shapes], optimizers: list[FlatGroups], stage: int, steps: int | None
) -> list[list[Piece]]:
    """What each rank holds of the trained parameters: all ranks together each element once.

    Args:
        shapes: of the parameters in each flat group, in their order.
        optimizers: what each rank's file says.
        stage: of ZeRO.
        steps: how many steps were made, for an optimizer that doesn't count them; None: the masters alone.

    Raises:
        IncompleteCheckpointError: a part of a parameter is missing.
        CorruptCheckpointError: the files don't fit together.
    """
    _require_lengths(shapes, optimizers, stage)
    ranks: list[list[Piece]] = [[] for _ in optimizers]
    for flat, of in enumerate(shapes):
        come_to: dict[object, str] = {}
        for number, (optimizer, rank) in enumerate(zip(optimizers, ranks, strict=True)):
            master = optimizer.masters[flat]
            if stage == 3:
                places = list(_divided(of, number, len(optimizers)))
            else:
                # Rank 0's is shorter than the others' only where theirs are empty
                begin = number * optimizers[0].masters[flat].numel
                paddings = optimizer.paddings[flat] if flat < len(optimizer.paddings) else ()
                places = list(_joined(of, paddings, begin, begin + master.numel))
            state = {} if steps is None else optimizer.state(flat, steps)
            if places and state:
                come_to[state.get("step")] = optimizer.where
            if len(come_to) > 1:
                (step, where), (other, elsewhere) = come_to.items()
                raise CorruptCheckpointError(
                    f"{where} is of step {step}, and {elsewhere} of step {other}: they are of different saves"
                )
            held = dict(_state_tensors(state, master, f"{optimizer.where}: flat group {flat}"))
            for segment, begin in places:
                end = begin + segment.numel
                rank.append(Piece(segment, part_of(master, begin, end)))
                for name, value in held.items():
                    if isinstance(value, Elements) and value.shape:
                        value = part_of(value, begin, end)
                    rank.append(Piece(segment, value, name))
    _require_cover(shapes, ranks)
    return ranks


def _state_tensors(state: Mapping[Any, Any], master: Elements, where: str) -> Iterator[tuple[str, Elements | Plain]]:
    for name, value in state.items():
        if type(name) is not str or "/" in name:
            raise CorruptCheckpointError(f"{where}: {name!r:.80} is no name of an optimizer's state")
        if isinstance(value, PLAIN):
            yield name, value
            continue
        tensor = unread_tensor(value, f"{where}: {name!r}")
        if tensor.shape and tensor.numel < master.numel:
            raise CorruptCheckpointError(
                f"{where}: {name!r} has {tensor.numel} elements, and the masters have {master.numel}: it is damaged, "
                "or not kept element by element; the weights alone can be imported (module_only=True, --module-only)"
            )
        yield name, tensor


def _require_cover(shapes: list[Shapes], ranks: list[list[Piece]]) -> None:
    masters = (piece.segment for rank in ranks for piece in rank if piece.state is None)
    index = SegmentIndex((segment, None) for segment in masters)
    for of in shapes:
        for name, shape in of.items():
            index.check_cover(name, math.prod(shape))


def frozen_pieces(shapes: Shapes, fragments: Mapping[Any, Any], rank: int, count: int, where: str) -> Iterator[Piece]:
    """Stage 3: a rank's part of each frozen parameter."""
    for name, shape in shapes.items():
        tensor = unread_tensor(fragments.get(name), f"{where}: the fragment of {name!r}")
        if tensor.numel != -(-math.prod(shape) // count):
            raise CorruptCheckpointError(
                f"{where}: the fragment of {name!r} has {tensor.numel} elements of {math.prod(shape)}, cut over {count}"
            )
        for segment, _ in _divided({name: shape}, rank, count):
            yield Piece(segment, part_of(tensor, 0, segment.numel))
