"""Optimizers that look at more than one element, schedulers, and what can't be partitioned: beside stock DDP."""

import logging

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn, optim
from torch.optim import lr_scheduler

from lightning_zero import ZeroStrategy
from lightning_zero.engine.cuts import ELEMENT_WISE, cut_for
from lightning_zero.errors import UnsupportedModelError
from tests.launch import distributed, run_ranks
from tests.plugin.parity import ROUNDED, OneStep, Plain, assert_equals_ddp, assert_same_modules, fit


class Lamb(OneStep):
    """Layer-wise trust ratios over Adam (You et al., 2020): looks at each parameter as a whole."""

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["m"], state["v"] = 0, torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                state["m"].lerp_(p.grad, 1 - group["betas"][0])
                state["v"].lerp_(p.grad.square(), 1 - group["betas"][1])
                update = state["m"] / (state["v"].sqrt() + group["eps"]) + group["weight_decay"] * p
                ratio = p.norm() / update.norm().clamp_min(1e-12)
                p.sub_(update, alpha=group["lr"] * float(ratio.clamp(0, 10)))


class Matrices(Plain):
    """Matrices for Muon, and the rest for AdamW: two optimizers, as everyone uses it."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.dim() == 2]
        others = [p for p in self.parameters() if p.dim() != 2]
        return optim.Muon(matrices, lr=1e-3), optim.AdamW(others, lr=1e-2)


class Subclassed(optim.AdamW):
    """A user's own subclass."""


needs_muon = pytest.mark.skipif(not hasattr(optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


@needs_muon
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_muon_beside_adamw_equals_ddp(world_size):
    run_ranks(muon, world_size, process_group=False)


def muon():
    assert_equals_ddp(Matrices, tolerance=ROUNDED)


def whole_parameters(kind, options, clipped):
    more = {"gradient_clip_val": 0.1} if clipped else {}
    make = lambda: Plain(kind, **options)  # noqa: E731
    _, trainer = assert_equals_ddp(make, tolerance=ROUNDED, **more)
    for segment in trainer.strategy.segments(trainer.optimizers[0]):
        parameter = trainer.lightning_module.get_parameter(segment.name)
        assert (segment.start, segment.stop) == (0, parameter.numel())
        assert segment.master.shape == parameter.shape


@pytest.mark.parametrize(
    ("kind", "options"), [(optim.Adafactor, {}), (Lamb, {}), (Subclassed, {"weight_decay": 0.1})], ids=lambda v: str(v)
)
def test_an_optimizer_that_is_not_known_to_be_element_wise_gets_whole_parameters_and_equals_ddp(kind, options):
    run_ranks(whole_parameters, 2, kind, options, kind is Lamb, process_group=False)


def resumed(directory):
    for kind in (Lamb, optim.Adafactor):
        whole, _ = fit(lambda kind=kind: Plain(kind), ZeroStrategy(), max_epochs=2)
        half, _ = fit(lambda kind=kind: Plain(kind), ZeroStrategy(), max_epochs=2, ckpt_path=directory / kind.__name__)
        half.losses = whole.losses
        assert_same_modules(half, whole)


def saved(directory):
    for kind in (Lamb, optim.Adafactor):
        _, trainer = fit(lambda kind=kind: Plain(kind), ZeroStrategy(), max_epochs=1)
        trainer.save_checkpoint(directory / kind.__name__)


def test_states_of_whole_parameters_are_resumed(tmp_path):
    run_ranks(saved, 2, tmp_path, process_group=False)
    run_ranks(resumed, 2, tmp_path, process_group=False)


def test_the_choice_and_its_reason_are_in_the_log():
    lines = run_ranks(chosen, 2, process_group=False)[0]
    assert "AdamW is partitioned by element: its update of an element looks at that element alone" in lines
    for beginning in ("Lamb is partitioned by parameter: an optimizer that isn't", "Subclassed is partitioned by"):
        assert any(line.startswith(beginning) for line in lines)


def chosen():
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    for name in ("lightning", "lightning.pytorch", "lightning_utilities.core.rank_zero"):
        logging.getLogger(name).addHandler(handler)
    for kind in (optim.AdamW, Lamb, Subclassed):
        fit(lambda kind=kind: Plain(kind), ZeroStrategy(), max_steps=1)
    return lines


class AsksTwice(optim.SGD):
    """Evaluates its closure twice a step, as those that look ahead do."""

    def step(self, closure=None):
        closure()
        super().step()
        return closure()


def refused(make, message, **options):
    with pytest.raises(UnsupportedModelError, match=message):
        fit(make, ZeroStrategy(**options), max_steps=1)


class Embedded(Plain):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.net = nn.Sequential(nn.Embedding(20, 8, sparse=True))

    def loss(self, batch):
        return self.net((batch[:, 0] * 5).long().abs() % 20).pow(2).mean()


class SAM(optim.SGD):
    pass


class ByDistance(OneStep):
    """Takes its step size from all parameters together, and sums over the ranks if it is told to."""

    def __init__(self, params, lr=1e-2, fsdp_in_use=False):
        super().__init__(params, {"lr": lr, "fsdp_in_use": fsdp_in_use, "d": 1e-2})

    def update(self):
        for group in self.param_groups:
            total = torch.zeros(())
            for p in group["params"]:
                total += p.grad.square().sum()
            if group["fsdp_in_use"]:
                dist.all_reduce(total)
            group["d"] = max(group["d"], float(total))
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * group["d"])


class Prodigy(ByDistance):
    pass


class Lazy(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.LazyLinear(8)


class Complex(Plain):
    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))


class Aliased(Plain):
    """One memory under two parameters."""

    def __init__(self):
        super().__init__()
        self.alias = nn.Parameter(self.net[0].weight.detach())


class Viewed(Plain):
    """A parameter's memory as a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("view", self.net[0].weight.detach(), persistent=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plain(optim.LBFGS), "LBFGS can't be partitioned.*Use DDPStrategy"),
        (lambda: Embedded(optim.SparseAdam), "SparseAdam can't be partitioned.*sparse=False"),
        (lambda: Plain(SAM), "SAM can't be partitioned.*evaluates the closure twice"),
        (
            lambda: Plain(ByDistance),
            "ByDistance can't be partitioned: it has computed 'd'.*or make it with fsdp_in_use",
        ),
        (lambda: Plain(Prodigy), "Prodigy can't be partitioned: its step size.*or make it with fsdp_in_use=True"),
        (lambda: Plain(AsksTwice), "AsksTwice evaluates its closure more than once.*use DDPStrategy"),
        (Lazy, "'net.weight' has no shape yet; run a batch through"),
        (Complex, "'phase' is torch.complex64.*view_as_real"),
        (Aliased, "share memory but are two objects; tie them by assigning"),
        (Viewed, "the buffer 'view' is the memory of the parameter 'net.0.weight'.* give it a copy"),
    ],
    ids=[
        "LBFGS",
        "SparseAdam",
        "SAM",
        "a common step size",
        "a known one",
        "asks twice",
        "lazy",
        "complex",
        "aliased",
        "viewed",
    ],
)
def test_what_cannot_be_partitioned_is_refused_with_a_reason_and_a_way_out(make, message, request):
    if make is Complex and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6's gloo, which Lightning sends the module with, knows no complex numbers")
    run_ranks(refusals, 2, request.node.callspec.id, process_group=False)


def refusals(which):
    marks = test_what_cannot_be_partitioned_is_refused_with_a_reason_and_a_way_out.pytestmark
    parametrize = next(mark for mark in marks if mark.name == "parametrize")
    make, message = parametrize.args[1][parametrize.kwargs["ids"].index(which)]
    refused(make, message)


class OneGroupEach(Plain):
    """As the groups are, a rank owns nothing of some."""

    def configure_optimizers(self):
        return Prodigy([{"params": [p]} for p in self.parameters()], fsdp_in_use=True)


@distributed(world_size=2, process_group=False)
def test_an_optimizer_that_sums_over_the_ranks_if_it_is_told_to_equals_ddp():
    theirs, _ = fit(lambda: Plain(Prodigy), "ddp")
    ours, _ = fit(lambda: Plain(Prodigy, fsdp_in_use=True), ZeroStrategy())
    assert_same_modules(ours, theirs, ROUNDED)
    fit(OneGroupEach, ZeroStrategy(), max_steps=3)


@distributed(world_size=1, process_group=False)
def test_on_one_rank_everything_works_that_works_without():
    for make in (
        lambda: Plain(optim.LBFGS, lr=0.1, max_iter=3),
        lambda: Embedded(optim.SparseAdam),
        lambda: Plain(AsksTwice),
        lambda: Plain(SAM),
    ):
        assert_equals_ddp(make)
    refused(lambda: Plain(optim.LBFGS).bfloat16(), "LBFGS can't be partitioned")  # its masters aren't its parameters


@distributed(world_size=1, process_group=False)
def test_a_resumed_lbfgs_goes_on_bit_for_bit(tmp_path):
    make = lambda: Plain(optim.LBFGS, lr=0.1, max_iter=3)  # noqa: E731
    whole, _ = fit(make, ZeroStrategy(), max_epochs=2)
    _, trainer = fit(make, ZeroStrategy(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "tag")
    half, _ = fit(make, ZeroStrategy(), max_epochs=2, ckpt_path=tmp_path / "tag")
    half.losses = whole.losses
    assert_same_modules(half, whole)


class Scheduled(Plain):
    """A scheduler, stepped as Lightning does."""

    def __init__(self, make, interval):
        super().__init__(optim.SGD, momentum=0.9)
        self.make, self.interval = make, interval

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = self.make(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.interval, "monitor": "loss_epoch"},
        }


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    "SWALR": lambda o: optim.swa_utils.SWALR(o, swa_lr=1e-4, anneal_epochs=3),
}


@distributed(world_size=2, process_group=False)
def test_every_scheduler_of_torchs_equals_ddp():
    known = {name for name in vars(lr_scheduler) if isinstance(getattr(lr_scheduler, name), type)}
    schedulers = {name for name in known if issubclass(getattr(lr_scheduler, name), lr_scheduler.LRScheduler)}
    assert schedulers - {"LRScheduler", "_LRScheduler", "SWALR"} <= set(SCHEDULERS)
    for name, make in SCHEDULERS.items():
        interval = "epoch" if name == "ReduceLROnPlateau" else "step"
        _, ours = fit(lambda make=make, interval=interval: Scheduled(make, interval), ZeroStrategy())
        theirs, trainer = fit(lambda make=make, interval=interval: Scheduled(make, interval), "ddp")
        assert_same_modules(ours.lightning_module, theirs)
        for mine, its in zip(ours.optimizers[0].param_groups, trainer.optimizers[0].param_groups, strict=True):
            assert {k: v for k, v in mine.items() if k != "params"} == {k: v for k, v in its.items() if k != "params"}


@distributed(world_size=2, process_group=False)
def test_the_learning_rate_monitor_logs_what_it_logs_under_ddp(tmp_path):
    seen = []
    for strategy in ("ddp", ZeroStrategy()):
        logger = CSVLogger(tmp_path / f"{len(seen)}", flush_logs_every_n_steps=1)
        make = lambda: Scheduled(SCHEDULERS["OneCycleLR"], "step")  # noqa: E731
        monitor = LearningRateMonitor(log_momentum=True)
        fit(make, strategy, callbacks=[lambda monitor=monitor: monitor], logger=logger, log_every_n_steps=1)
        seen.append((monitor.lrs, monitor.last_momentum_values))
    assert seen[0] == seen[1]
    assert len(seen[0][0]["lr-SGD"]) == 16


def test_the_known_element_wise_optimizers_are_torchs():
    parameter = [nn.Parameter(torch.zeros(2, 2))]
    for kind in ELEMENT_WISE:
        assert cut_for(kind(parameter), "auto", alone=False).policy == "element"
