"""How an optimizer's parameters can be cut: by element, as whole parameters, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import optim
from torch.optim import Optimizer

from lightning_zero.errors import UnsupportedModelError
from lightning_zero.segments import Policy

ELEMENT_WISE: tuple[type[Optimizer], ...] = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.Adamax,
    optim.Adagrad,
    optim.Adadelta,
    optim.RMSprop,
    optim.Rprop,
    optim.ASGD,
)
"""Optimizers whose update of an element looks at that element alone: any slice of a parameter is as good as all."""


WHOLE_PARAMETERS: tuple[type[Optimizer], ...] = tuple(
    getattr(optim, name) for name in ("Adafactor", "Muon") if hasattr(optim, name)
)
"""Optimizers of torch's that look at a parameter as a whole, and at no other."""

_ALL_AT_ONCE = {
    "LBFGS": "each of its steps needs dot products over all parameters, and calls the closure several times",
    **dict.fromkeys(
        ("SAM", "ASAM", "GSAM", "WSAM", "BSAM", "LookSAM", "FriendlySAM"),
        "it evaluates the closure twice a step, and scales by the norm of all gradients together",
    ),
    **dict.fromkeys(
        ("Prodigy", "DAdaptAdam", "DAdaptSGD", "DAdaptAdaGrad", "DAdaptLion", "DAdaptAdan"),
        "its step size comes from sums over all parameters together",
    ),
    **dict.fromkeys(
        ("Adai", "AdamS", "AliG", "AvaGrad", "Ranger21", "TRAC"),
        "it scales its update by a sum over all parameters together",
    ),
    "LoRARite": "its update of one factor needs the other's gradient",
    **dict.fromkeys(
        ("DeMo", "DistributedMuon"),
        "it divides the work over the ranks by itself; give the one that is made for a single process",
    ),
    "ZeroRedundancyOptimizer": "it partitions by itself; give the optimizer that is in it",
}
"""Optimizers that must see every parameter at once, by the name of their class."""


_SUMS_OVER_RANKS = "fsdp_in_use"
"""The argument by which optimizers are told that each rank has a part of the parameters: they sum over the ranks."""


@dataclass(frozen=True)
class Cut:
    """How an optimizer's parameters are cut, and why so."""

    policy: Policy
    reason: str


def cut_for(optimizer: Optimizer, requested: Policy | Literal["auto"], *, alone: bool) -> Cut:
    """How an optimizer's parameters can be cut.

    Args:
        optimizer: the user's.
        requested: a policy; or `"auto"`: the one that the optimizer's class allows.
        alone: one rank has all parameters, and they are their own masters: then nothing is cut, and anything works.

    Raises:
        UnsupportedModelError: the optimizer can't work on a part of the parameters at all.
    """
    kind = type(optimizer)
    if not alone:
        if kind not in ELEMENT_WISE and optimizer.defaults.get("max_grad_norm"):
            raise UnsupportedModelError(
                f"{kind.__name__} clips by the norm of all gradients in its step, of which a rank has a part; make it "
                "with max_grad_norm=None, and let Trainer(gradient_clip_val=...) clip"
            )
        for ancestor in kind.__mro__:
            if ancestor.__name__ in _ALL_AT_ONCE and not optimizer.defaults.get(_SUMS_OVER_RANKS):
                raise UnsupportedModelError(
                    f"{kind.__name__} can't be partitioned: {_ALL_AT_ONCE[ancestor.__name__]}. "
                    f"Use DDPStrategy for it, or another optimizer{way_out(optimizer)}."
                )
        if isinstance(optimizer, optim.SparseAdam):
            raise UnsupportedModelError(
                "SparseAdam can't be partitioned: reduced gradients are dense. Use Adam, and embeddings with "
                "sparse=False; or DDPStrategy."
            )
    if requested != "auto":
        return Cut(requested, f'as partition="{requested}" says')
    # The exact type: a subclass may override `step` with something that looks at more than one element.
    if kind in ELEMENT_WISE:
        return Cut("element", "its update of an element looks at that element alone")
    if kind in WHOLE_PARAMETERS:
        return Cut("parameter", "its update looks at a parameter as a whole")
    known = next((ancestor.__name__ for ancestor in kind.__mro__ if ancestor in ELEMENT_WISE), None)
    return Cut(
        "parameter",
        (f"a subclass of {known} may look" if known else "an optimizer that isn't torch's own may look")
        + ' at more than one element; partition="element" balances better where it looks at none but its own',
    )


def way_out(optimizer: Optimizer) -> str:
    """What may help an optimizer that computes something of all parameters, to be added to the message."""
    told = optimizer.defaults.get(_SUMS_OVER_RANKS)
    return f"; or make it with {_SUMS_OVER_RANKS}=True, so that it sums over the ranks" if told is False else ""
