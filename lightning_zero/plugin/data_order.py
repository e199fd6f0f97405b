"""The order in which a data loader gives its data, drawn again: a resumed run goes on with the batch that comes next.

torch's own `DataLoader` has no state. Lightning begins it anew in the middle of an epoch: what was trained on comes a
second time, and the rest of the epoch never, under stock DDP too. Here each rank saves what an epoch's order was drawn
from; resumed, the same order is drawn, and as much of it passed over as was trained on, without loading it.

| a training loader | resumed in the middle of an epoch |
|---|---|
| a `DataLoader` whose dataset has indices | here: whatever its sampler, which may be anybody's |
| one with a state, as torchdata's `StatefulDataLoader` | by itself: see `loader_state` |
| of an iterable dataset without a state | from its beginning: Lightning warns of it |

What the workers of a loader draw themselves is not drawn again. Where a checkpoint is another number of ranks', the
order is a new one; of that, too, as many batches are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import DataLoader, IterableDataset, Sampler

from lightning_zero.plugin.random_state import get_random_state, set_random_state


class _Redrawn(Sampler[Any]):
    """A sampler whose order can be drawn again; mixed into the class of whichever gives a loader its indices."""

    _drawn_from: dict[str, Any] | None = None
    _redraw: tuple[dict[str, Any] | None, int] | None = None

    def __iter__(self) -> Iterator[Any]:
        (drawn_from, passed_over), self._redraw = self._redraw or (None, 0), None
        # Drawn when the first is asked for, as most samplers do
        with _random_state(drawn_from, self) as self._drawn_from:
            order = iter(super().__iter__())
            first = list(islice(order, passed_over + 1))[passed_over:]
        yield from first
        yield from order


@contextmanager
def _random_state(drawn_from: dict[str, Any] | None, sampler: object) -> Iterator[dict[str, Any]]:
    """Draw from what was drawn from before, and leave the process's own random numbers as they are; or from these."""
    if drawn_from is None:
        yield {"random": get_random_state(), **_own_state(sampler)}
        return
    outside, epochs = get_random_state(), _own_state(sampler)["epochs"]
    set_random_state(drawn_from["random"])
    _set_own_state(sampler, **{key: value for key, value in drawn_from.items() if key != "random"})
    try:
        yield drawn_from
    finally:
        set_random_state(outside)
        _set_own_state(sampler, epochs=epochs)


def make_redrawable(loader: object) -> None:
    """Have the sampler of a loader note what its order is drawn from, if nothing else knows how to go on with it."""
    sampler = _sampler_of(loader)
    if sampler is None:
        return
    if not isinstance(sampler, _Redrawn):
        kind = type(sampler)
        sampler.__class__ = type(kind.__name__, (_Redrawn, kind), {"__module__": kind.__module__})
    assert isinstance(sampler, _Redrawn)
    sampler._redraw = None  # of a fit that never came to its first batch


def pass_over(loader: object, state: dict[str, Any] | None, batches: int) -> None:
    """Have a loader's next iterator begin where another one was.

    Args:
        loader: made redrawable.
        state: that loader's, as `get_states` gave it; None: nothing is known of its order.
        batches: how many of the epoch have been trained on.
    """
    sampler, length = _sampler_of(loader), sized_len(loader)
    if isinstance(sampler, _Redrawn) and batches:
        # Beside a longer loader, a shorter one begins again and again
        sampler._redraw = (state or {}).get("drawn_from"), (batches - 1) % length + 1 if length else batches


def all_go_on(loaders: Sequence[object]) -> bool:
    """Whether each of them can be resumed in the middle of an epoch."""
    return all(_has_state(loader) or isinstance(_sampler_of(loader), _Redrawn) for loader in loaders)


def get_states(loaders: Sequence[object]) -> list[dict[str, Any]]:
    """What the order of each loader was drawn from, and the states of its own generators, which come after."""
    return [
        {
            "drawn_from": getattr(_sampler_of(loader), "_drawn_from", None),
            "generators": _own_state(loader)["generators"],
        }
        for loader in loaders
    ]


def set_generators(loaders: Sequence[object], states: Sequence[dict[str, Any]]) -> None:
    """Let the loaders' own generators go on from where they were, for what is drawn from them next."""
    for loader, state in zip(loaders, states, strict=False):
        _set_own_state(loader, generators=state["generators"])


def _sampler_of(loader: object) -> Sampler[Any] | None:
    """What gives a loader its indices, batch by batch, where a loader without a state has such a thing."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or _has_state(loader):
        return None
    sampler: object = loader._index_sampler
    parts = (sampler, getattr(sampler, "sampler", None), loader.dataset)
    return sampler if isinstance(sampler, Sampler) and not any(map(_has_state, parts)) else None


def _has_state(part: object) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


def _own_state(part: object) -> dict[str, list[Any]]:
    """What a loader or a sampler draws from beside the process's random numbers."""
    samplers = _parts(part)
    return {
        "generators": [generator.get_state() for generator in _generators(samplers)],
        "epochs": [getattr(each, "epoch", None) for each in samplers if hasattr(each, "set_epoch")],
    }


def _set_own_state(part: object, generators: Sequence[Any] = (), epochs: Sequence[Any] = ()) -> None:
    samplers = _parts(part)
    for generator, state in zip(_generators(samplers), generators, strict=False):
        generator.set_state(state)
    for sampler, epoch in zip((each for each in samplers if hasattr(each, "set_epoch")), epochs, strict=False):
        if epoch is not None:
            sampler.set_epoch(epoch)


def _parts(part: object) -> list[Any]:
    """A loader or a sampler, and the samplers in it, each once."""
    parts: list[Any] = [part]
    for each in parts:
        inner = [getattr(each, name, None) for name in ("batch_sampler", "sampler")]
        if isinstance(each, DistributedSamplerWrapper):
            inner.append(getattr(each.dataset, "_sampler", None))
        parts += [one for one in inner if one is not None and all(one is not other for other in parts)]
    return parts


def _generators(samplers: Iterable[object]) -> list[torch.Generator]:
    found = (getattr(sampler, "generator", None) for sampler in samplers)
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())
