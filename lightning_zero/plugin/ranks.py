"""The ranks of a fit: the process groups that are ours, and what all ranks do or decide together.

Lightning uses the default group whenever it likes, from signal handlers even; so everything here goes over groups of
our own. No rank is left waiting for one that has failed: what fails on one is raised on all, and after an exception
nobody enters a collective before everybody is known to be there.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from lightning_zero.checkpoint.messages import tell_all
from lightning_zero.engine.collectives import Collectives, collectives_for
from lightning_zero.errors import UnreachableRankError, UnsupportedModelError, ZeroError
from lightning_zero.threads import start_thread

_T = TypeVar("_T")

_ARRIVAL_SECONDS = 10
"""How long a rank waits after an exception for the others to come."""

_PATIENCE_SECONDS = 60
"""How long a rank waits, at most, for a word of one that has something to do."""

_LEFT = -(10**6)

_MESSAGE_BYTES = 16 << 20
"""Small tensors are sent together, up to so many bytes; a larger one goes as it is, and isn't copied."""


@dataclass
class _Groups:
    """Groups of our own, and the one that they were made in."""

    world: dist.ProcessGroup
    data: dist.ProcessGroup
    control: dist.ProcessGroup
    """On gloo, for what the ranks tell each other as Python objects, so that no device has to stop for it."""
    collectives: Collectives
    behind: dist.ProcessGroup | None = None

    def destroy(self) -> None:
        """Let go of them, which each rank does for itself."""
        self.collectives.release()
        for group in (self.data, self.control, self.behind):
            if group is not None and self.world is dist.group.WORLD:
                dist.destroy_process_group(group)


_with_groups: weakref.WeakSet[Ranks] = weakref.WeakSet()
_abandoned: list[_Groups] = []
"""Groups of strategies that nobody has any more: torch keeps one, with threads and connections, until it is destroyed.

That is done when the next are made, and not by the garbage collector, which comes by at any moment, in any thread.
"""
_MANY = 4


def _destroy_abandoned() -> None:
    if len(_with_groups) > _MANY:
        gc.collect()  # a Trainer and its module hold each other
    while _abandoned:
        _abandoned.pop().destroy()


class Ranks:
    """All ranks, as one of them sees them. The groups are made when they are first asked for, on every rank.

    Args:
        timeout: of the groups' collectives.
    """

    def __init__(self, timeout: timedelta | None) -> None:
        self._timeout = timeout
        self.device = torch.device("cpu")
        """Where this rank's parameters are."""
        self._groups: _Groups | None = None
        self._abandon: weakref.finalize[..., Ranks] | None = None
        self._all_arrived: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_groups": None, "_abandon": None}

    @property
    def count(self) -> int:
        """The world size: 1 where there is no process group."""
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """This rank's number."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def _own(self) -> _Groups:
        world = dist.group.WORLD
        if self._groups is None or self._groups.world is not world:
            assert world is not None
            join_without_the_lock(world)
            _destroy_abandoned()
            data = self._new_group()
            control = self._new_group("gloo")
            self._groups = _Groups(world, data, control, collectives_for(data, self.device, self._timeout))
            self._abandon = weakref.finalize(self, _abandoned.append, self._groups)
            self._abandon.atexit = False
            _with_groups.add(self)
            atexit.register(_leave, weakref.ref(self))
        return self._groups

    def meet(self) -> None:
        """Make the groups now, so that nobody finds this in what a resume takes. Called on every rank."""
        if self.count > 1:
            _ = self._own

    @property
    def collectives(self) -> Collectives:
        """For parameters and gradients."""
        return self._own.collectives

    @property
    def control(self) -> dist.ProcessGroup:
        """For words."""
        return self._own.control

    @property
    def behind(self) -> dist.ProcessGroup:
        """For what a thread says behind training. To be made, and let go, while no such thread runs."""
        own = self._own
        if own.behind is None:
            own.behind = self._new_group("gloo")
        return own.behind

    def _new_group(self, backend: str | None = None) -> dist.ProcessGroup:
        with self.reaching_all():
            group: dist.ProcessGroup = dist.new_group(timeout=self._timeout, backend=backend)
        join_without_the_lock(group)
        return group

    def renew(self) -> None:
        """Begin a fit with groups in which nothing is under way: the last one may have ended in an exception."""
        groups = self._let_go()
        if groups is not None:
            groups.destroy()
        self._all_arrived = None

    def release(self) -> None:
        """Let go of the groups."""
        groups = self._let_go()
        if groups is not None:
            groups.collectives.release()

    def _let_go(self) -> _Groups | None:
        groups, self._groups = self._groups, None
        _with_groups.discard(self)
        if self._abandon is not None:
            self._abandon.detach()
        return groups

    def decided_by_first(self, decide: Callable[[], _T]) -> _T:
        """What `decide` gives on rank 0, or the error that it raises there, on every rank."""
        error, value = self._told(_outcome(decide) if self.rank == 0 else (None, None))[0]
        if error is not None:
            raise error
        decided: _T = value
        return decided

    def done_by_first(self, do: Callable[[], object]) -> None:
        """Have rank 0 do something, which may take longer than the time-out; what it raises is raised on every rank."""
        if self.rank == 0:
            error: Exception | None = RuntimeError("rank 0 was interrupted")
            try:
                with self._saying_not_yet():
                    error, _ = _outcome(do)
            finally:
                with suppress(UnreachableRankError) if error is not None else nullcontext():
                    self._told((error, None))
        else:
            while (first := self._told(None)[0]) is None:
                pass
            error = first[0]
        if error is not None:
            raise error

    @contextmanager
    def _saying_not_yet(self) -> Iterator[None]:
        """The others ask again and again; a thread of the first rank's tells them to, while that one is at work."""
        over = threading.Event()
        seconds = min(_PATIENCE_SECONDS, self._timeout.total_seconds() / 3) if self._timeout else _PATIENCE_SECONDS

        def say() -> None:
            with suppress(UnreachableRankError):  # which the first rank finds, too, when it is done
                while not over.wait(seconds):
                    self._told(None)

        thread = start_thread(say, "lightning_zero-not-yet") if self.count > 1 else None
        try:
            yield
        finally:
            over.set()
            if thread is not None:
                thread.join()

    def all_or_none(self, function: Callable[[], _T]) -> _T:
        """Call a function on every rank. If it fails on one, it fails on all, with the first rank's error."""
        error, value = _outcome(function)
        _raise_first([error for error, _ in self._told((error, None))], error)
        return value  # type: ignore[return-value]

    def everyones(self, function: Callable[[], list[_T]]) -> list[_T]:
        """What a function gives on each rank, all put together, on every rank."""
        own = _outcome(function)
        outcomes = self._told(own)
        _raise_first([error for error, _ in outcomes], own[0])
        return [item for _, items in outcomes for item in items]

    def give(self, tensors: Sequence[Tensor], giver: int) -> None:
        """Give every rank one rank's tensors, of whatever dtypes, in place. Called on every rank.

        Args:
            tensors: on the CPU, or on this rank's device.
            giver: whose they are.
        """
        on_host = [tensor for tensor in tensors if tensor.is_cpu]
        on_device = [tensor for tensor in tensors if not tensor.is_cpu]
        for alike, group in ((on_host, self._own.control), (on_device, self._own.data)):
            if alike:
                with self.reaching_all():
                    dist._broadcast_coalesced(group, alike, _MESSAGE_BYTES, giver)  # type: ignore[attr-defined]

    def require_same(self, what: str, say: Callable[[], list[str]]) -> None:
        """Make sure that all ranks have the same of something that they are going to count on. Called on every rank.

        Args:
            what: it is called in the message.
            say: gives what this rank has, line by line.

        Raises:
            UnsupportedModelError: they haven't.
        """
        if self.count == 1:
            return
        said = say()
        digest = xxhash.xxh3_128_hexdigest("\n".join(said).encode())
        if len(set(self.everyones(lambda: [digest]))) == 1:
            return
        lines = self.everyones(lambda: [said])
        other = next(rank for rank, theirs in enumerate(lines) if theirs != lines[0])
        pairs = itertools.zip_longest(lines[0], lines[other], fillvalue="nothing more")
        ours, theirs = next((ours, theirs) for ours, theirs in pairs if ours != theirs)
        raise UnsupportedModelError(
            f"the ranks' {what} differ: rank 0 has {ours}, and rank {other} has {theirs}. All have to make the same"
        )

    def _told(self, outcome: Any) -> list[Any]:
        """What came of something on each rank, in the order of the ranks.

        What can't be pickled is told of as an error. A rank that is alone needs no group for it: there may be none.
        """
        if self.count == 1:
            return [outcome]
        try:
            content = pickle.dumps(outcome)
        except Exception as error:
            content = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), None))
        with self.reaching_all():
            contents = tell_all(self.control, content)()
        return [pickle.loads(content) for content in contents]

    @contextmanager
    def reaching_all(self) -> Iterator[None]:
        """Around what all ranks do together: an error that says so, where the others don't come.

        Raises:
            UnreachableRankError: they didn't, within the time-out.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what a group raises when a peer doesn't come, or has died
            raise UnreachableRankError(
                f"rank {self.rank} waited in vain for the other ranks. What all do together has to be called on every "
                f"rank (not under `if rank == 0`), at the same place; or one of them has died ({error})"
            ) from error

    def all_are_here(self, where: object, settle: Callable[[], object]) -> bool:
        """After an exception: whether it is every rank's, at one place, so that they can still do something together.

        Each tells the store that it is here, and looks for the others for a while. One that leaves makes the count
        negative, so that nobody who comes later takes it for waiting. Those who are complete begin anew, in groups in
        which nothing is under way. Every Trainer of the process has the same store, and groups of other names.

        Args:
            where: this rank is, in words that are the same on every rank at this place.
            settle: waits, in the old groups, for what every rank has begun that is there.
        """
        if self._all_arrived is None:
            groups = self._groups
            if groups is None or groups.world is not dist.group.WORLD:
                return False
            store = dist.distributed_c10d._get_default_store()
            key = f"lightning_zero/{groups.control.group_name}/{where}"
            deadline = time.monotonic() + _ARRIVAL_SECONDS
            arrived = 0
            with suppress(dist.DistError):  # the store ends with the process that has it, which may be the first rank's
                arrived = store.add(key, 1)
                while 0 < arrived < self.count and time.monotonic() < deadline:
                    time.sleep(0.05)
                    arrived = store.add(key, 0)
                if 0 < arrived < self.count:
                    arrived = store.add(key, _LEFT) - _LEFT
            all_arrived = arrived == self.count
            if all_arrived:
                settle()
                self.renew()
            self._all_arrived = all_arrived
        return self._all_arrived


def stay_at_exit() -> None:
    """Don't leave the groups in order when the process ends: a thread of one may wait for a peer for ever."""
    atexit.unregister(_leave)


def _leave(of: weakref.ref[Ranks]) -> None:
    """Join the groups' threads while Python still stands.

    One that lets go of a tensor after that wants the interpreter's lock, and takes the process down ("terminate called
    without an active exception"), as a loaded machine shows. A group joins its threads when the last reference to it
    goes, and not when it is destroyed.
    """
    ranks = of()
    if ranks is not None:
        ranks.release()
    if dist.is_initialized():
        dist.destroy_process_group()


def join_without_the_lock(group: dist.ProcessGroup) -> None:
    """Have a group's threads joined, when it goes, without the interpreter's lock.

    Up to torch 2.7 a group holds that lock as it joins them, and one that is just letting go of a tensor waits for it:
    for ever, as a loaded machine shows. A backend gives the lock up before, so it has to outlive its group: by no more
    than a moment, and it is its backend that a group's threads belong to.
    """
    kinds = {device.type for device in group._device_types}
    backends = [group._get_backend(torch.device(kind)) for kind in kinds]
    weakref.finalize(group, backends.clear).atexit = False


def _raise_first(errors: list[Exception | None], own: Exception | None) -> None:
    for rank, failure in enumerate(errors):
        if isinstance(failure, ZeroError):
            raise type(failure)(f"rank {rank}: {failure}") from own
        if failure is not None:
            raise failure


def _outcome(function: Callable[[], _T]) -> tuple[Exception | None, _T | None]:
    try:
        return None, function()
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return RuntimeError(f"{type(error).__name__}: {error}"), None
        return error, None
