"""Parameters on their way from the ranks that have stepped on them, and who waits for them.

[Note: the gather beside the next forward]
Without `watch`, a step ends when every parameter stands. With it, the gather goes on beside the next forward:

| who reads a parameter                                   | what waits for it                                      |
|---------------------------------------------------------|--------------------------------------------------------|
| its module's forward                                    | a hook before it, for the module's own parameters      |
| another module, past a forward that is never called (an | `before_forward`: for what has a parameter that no     |
| attention multiplies by `self.out_proj.weight`)         | forward was seen to wait for                           |
| anybody when the forward is over: backward, hooks       | `wait`, called then                                    |
| anybody between the step and the forward                | `wait`, called by whoever lets them in                 |
| somebody within the forward, before the module whose    | nothing: for that, nobody could know. So the overlap   |
| own forward is called later                             | is only there where it was asked for                   |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.nn import Module, Parameter
from torch.utils.hooks import RemovableHandle

from lightning_zero.engine.buckets import ParameterBucket
from lightning_zero.engine.transport import Pending


class _Hook:
    """What a module has in its hooks; a copy of the module, or one that was pickled, waits for nothing."""

    def __init__(self, arrivals: Arrivals | None = None) -> None:
        self._arrivals = arrivals

    def __call__(self, module: Module, _: object) -> None:
        if self._arrivals is not None:
            self._arrivals.before_forward_of(module)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class Arrivals:
    """What is being gathered; with nobody watching, it is waited for at once."""

    def __init__(self) -> None:
        self._pending: dict[ParameterBucket, Pending] = {}
        self._hooks: list[RemovableHandle] = []
        self._bucket_of: Callable[[Parameter], ParameterBucket | None] = lambda _: None
        self._called: set[Module] = set()
        self._in_forward = False

    def watch(self, module: Module, bucket_of: Callable[[Parameter], ParameterBucket | None]) -> None:
        """Have every module of a module wait for its own parameters before its forward.

        Args:
            module: all of it.
            bucket_of: where a parameter lies, if anywhere.
        """
        self._bucket_of = bucket_of
        for child in module.modules():
            if any(True for _ in child.parameters(recurse=False)) and not isinstance(child, torch.jit.ScriptModule):
                self._hooks.append(child.register_forward_pre_hook(_Hook(self)))

    @property
    def is_watching(self) -> bool:
        """Whether modules wait for their parameters."""
        return bool(self._hooks)

    def expect(self, gathering: Iterable[tuple[ParameterBucket, Pending]]) -> None:
        """A step is over, and its parameters are on their way."""
        self._pending.update(gathering)
        if not self._hooks:
            self.wait()

    def before_forward(self) -> None:
        """A forward of training begins: wait for what no module would wait for."""
        self._in_forward = True
        if self._pending:
            waited_for = {parameter for module in self._called for parameter in module.parameters(recurse=False)}
            self._wait_for(
                bucket
                for bucket in list(self._pending)
                if any(slot.parameter not in waited_for for slot in bucket.slots)
            )

    def before_forward_of(self, module: Module) -> None:
        """The forward of one of the modules begins."""
        if self._in_forward:
            self._called.add(module)
        if self._pending:
            buckets = map(self._bucket_of, module.parameters(recurse=False))
            self._wait_for(bucket for bucket in buckets if bucket is not None)

    def _wait_for(self, buckets: Iterable[ParameterBucket]) -> None:
        for bucket in buckets:
            pending = self._pending.pop(bucket, None)
            if pending is not None:
                pending.wait()

    def wait(self) -> None:
        """Return when every parameter stands: a forward is over, or somebody is going to look."""
        self._in_forward = False
        self._wait_for(list(self._pending))

    def detach(self) -> None:
        """Remove the hooks, and forget what is under way: after an exception it may never come."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._pending.clear()
        self._called.clear()
