"""The order in which a data loader gives its data, drawn again: a resumed run goes on with the batch that comes next.

torch's own `DataLoader` has no state. Lightning begins it anew in the middle of an epoch: what was trained on comes a
second time, and the rest of the epoch never, under stock DDP too. Here each rank saves what an epoch's order was drawn
from; resumed, the same order is drawn, and as much of it passed over as was trained on, without loading it.

| a training loader | resumed in the middle of an epoch |
|---|---|
| a `DataLoader` whose dataset has indices | here: whatever gives it the indices, which may be anybody's |
| the same, whose sampler goes on by itself | so: its first indices aren't what the epoch's were |
| one with a state, as torchdata's `StatefulDataLoader` | by itself: see `loader_state` |
| of an iterable dataset without a state | from its beginning: Lightning warns of it |

What the workers of a loader draw themselves is not drawn again. Where a checkpoint is another number of ranks', the
order is a new one; of that, too, as many batches are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import xxhash
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import DataLoader, IterableDataset, Sampler

from lightning_zero.plugin.random_state import get_random_state, set_random_state

_WHERE = ("batch_sampler", "sampler")
"""Where a loader has what gives it its indices: the first of both that it uses."""


class RedrawnOrder:
    """Stands in a loader for what gives it its indices, and notes what their order is drawn from.

    Whoever looks at its class or its attributes, or sets one (another `batch_size` for the next epoch), means what it
    stands for. So Lightning finds a distributed sampler in it, and puts no other around it.

    Args:
        loader: whose it is, until `put_back`.
        is_training: whether an iterator that is asked for is one to train with: the loader may have other uses too.
    """

    __slots__ = ("_drawn_from", "_first", "_given", "_is_training", "_loader", "_resumed", "_source", "_where")

    def __init__(self, loader: DataLoader[Any], is_training: Callable[[], bool]) -> None:
        self._loader = loader
        self._is_training = is_training
        self._source: Any = loader._index_sampler
        self._where = next(name for name in _WHERE if getattr(loader, name, None) is self._source)
        object.__setattr__(loader, self._where, self)  # a loader of torch's doesn't let it be set
        self._drawn_from: dict[str, Any] | None = None
        self._given = 0
        self._first = ""
        self._resumed: tuple[dict[str, Any], int] | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        return type(self._source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in RedrawnOrder.__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(self._source, name, value)

    def __len__(self) -> int:
        return len(self._source)

    def __reduce__(self) -> Any:
        return _itself, (self._source,)  # a copied or pickled loader is the user's own

    def put_back(self) -> None:
        """Give the loader back what it had."""
        if getattr(self._loader, self._where) is self:
            object.__setattr__(self._loader, self._where, self._source)

    def state(self, batches: int, *, begins_again: bool) -> dict[str, Any]:
        """What the order was drawn from, how much of it was given and trained on; and its own generators' states.

        Args:
            batches: how many of the epoch have been trained on.
            begins_again: the loader does, beside a longer one, when it has come to its end.
        """
        return {
            "drawn_from": self._drawn_from,
            "given": self._given,
            "first": self._first,
            "trained_on": self._trained_on(batches, begins_again),
            "generators": generator_states(self._loader),
        }

    def _trained_on(self, batches: int, begins_again: bool) -> int:
        length = sized_len(self)
        if not batches or not length:
            return batches
        return (batches - 1) % length + 1 if begins_again else min(batches, length)

    def resume(self, state: dict[str, Any] | None, batches: int) -> None:
        """Have the next iterator begin where another one was.

        Args:
            state: that one's; None: nothing is known of its order.
            batches: how many of the epoch have been trained on.
        """
        unknown: dict[str, Any] = {"drawn_from": None, "given": 0, "first": "", "generators": []}
        passed_over = self._trained_on(batches, True) if state is None else state["trained_on"]
        self._resumed = state or unknown, passed_over

    def __iter__(self) -> Iterator[Any]:
        if not self._is_training():
            return iter(self._source)
        self._drawn_from, self._given, self._first = {"made": _drawn_from(self._source)}, 0, ""
        return self._give(iter(self._source))  # some draw their order here

    def _give(self, order: Iterator[Any]) -> Iterator[Any]:
        # Only now: a loader with workers makes two iterators, and uses the second
        resumed, self._resumed = self._resumed, None
        yield from self._rest(order) if resumed is None else self._go_on(*resumed)

    def _go_on(self, state: dict[str, Any], passed_over: int) -> Iterator[Any]:
        """The rest of an order, which is drawn once more from what it was drawn from."""
        drawn_from, given = state["drawn_from"] or {}, max(state["given"], passed_over)
        outside = _drawn_from(self._source)
        if drawn_from:
            _draw_from(self._source, drawn_from["made"])
        order = iter(self._source)
        if drawn_from and given:
            _draw_from(self._source, drawn_from["begun"])
        given_again = islice(order, given)
        first = list(islice(given_again, 1))
        self._drawn_from, self._given, self._first = drawn_from, given, _digest(*first) if first else ""
        if state["first"] not in ("", self._first):
            passed_over = 0  # it goes on by itself
        # Only what was given and not trained on is kept: an epoch may have millions
        ahead = [*first[passed_over:], *islice(given_again, max(passed_over - 1, 0), None)]
        if drawn_from:
            _draw_from(self._source, outside)
            set_generator_states(self._loader, state["generators"])
        yield from ahead
        yield from self._rest(order)

    def _rest(self, order: Iterator[Any]) -> Iterator[Any]:
        if self._drawn_from and not self._given:
            self._drawn_from["begun"] = _drawn_from(self._source)  # others draw it with the first item
        for item in order:
            self._first = self._first or _digest(item)
            self._given += 1
            yield item


def _itself(source: Any) -> Any:
    return source


def _digest(item: object) -> str:
    return xxhash.xxh3_64_hexdigest(repr(item).encode())


def note_order(loader: object, is_training: Callable[[], bool]) -> None:
    """Have the order of a loader's data noted, if nothing else knows how to go on with it."""
    if (order := order_of(loader)) is not None:  # an earlier fit's, which came to no end
        order.put_back()
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or has_state(loader):
        return
    source: object = loader._index_sampler
    at_home = any(getattr(loader, name, None) is source for name in _WHERE)
    if at_home and not any(map(has_state, (source, getattr(source, "sampler", None), loader.dataset))):
        RedrawnOrder(loader, is_training)


def order_of(loader: object) -> RedrawnOrder | None:
    """What notes a loader's order, if anything does."""
    found = loader._index_sampler if isinstance(loader, DataLoader) else None
    return found if isinstance(found, RedrawnOrder) else None


def goes_on(loader: object) -> bool:
    """Whether it can be resumed in the middle of an epoch."""
    return has_state(loader) or order_of(loader) is not None


def has_state(part: object) -> bool:
    """Whether something can be asked where it is, and told to go on from there."""
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


def generator_states(loader: object) -> list[torch.Tensor]:
    """The states of a loader's own generators, and of those of its samplers."""
    return [generator.get_state() for generator in _generators(_parts(loader))]


def set_generator_states(loader: object, states: Sequence[torch.Tensor]) -> None:
    """Let them go on from there."""
    for generator, state in zip(_generators(_parts(loader)), states, strict=False):
        generator.set_state(state)


def _drawn_from(source: object) -> dict[str, Any]:
    """All that an order may be drawn from at this moment."""
    epochs = [epoch if type(epoch := getattr(each, "epoch", None)) is int else None for each in _by_epoch(source)]
    return {"random": get_random_state(), "generators": generator_states(source), "epochs": epochs}


def _draw_from(source: object, state: dict[str, Any]) -> None:
    set_random_state(state["random"])
    set_generator_states(source, state["generators"])
    for sampler, epoch in zip(_by_epoch(source), state["epochs"], strict=False):
        if epoch is not None:
            sampler.set_epoch(epoch)


def _by_epoch(source: object) -> list[Any]:
    return [each for each in _parts(source) if hasattr(each, "set_epoch")]


def _parts(part: object) -> list[Any]:
    """A loader or a sampler, and the samplers in it, each once."""
    parts: list[Any] = [part]
    for each in parts:
        inner = [getattr(each, name, None) for name in _WHERE] if isinstance(each, DataLoader | Sampler) else []
        if isinstance(each, RedrawnOrder):
            inner = [each._source]
        if isinstance(each, DistributedSamplerWrapper):
            inner.append(getattr(each.dataset, "_sampler", None))
        parts += [one for one in inner if one is not None and all(one is not other for other in parts)]
    return parts


def _generators(samplers: Iterable[object]) -> list[torch.Generator]:
    found = (getattr(each, "generator", None) for each in samplers if isinstance(each, DataLoader | Sampler))
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())
