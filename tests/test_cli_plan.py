"""`lightning-zero plan`: what it says before a run, and what the run then measures."""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_zero import ZeroStrategy, planning
from lightning_zero.cli import main
from lightning_zero.engine import transport
from lightning_zero.engine.buffers import is_unshared
from lightning_zero.engine.cuts import ELEMENT_WISE
from lightning_zero.engine.gradients import GradientReducer
from lightning_zero.engine.transport import Sockets
from lightning_zero.planning import OPTIMIZERS, Model, Setup, plan
from lightning_zero.segments import ParameterSpec, plan_buckets
from tests.engine.long_rounds import cut_in_long_rounds
from tests.launch import run_ranks
from tests.models import Data, quiet_trainer

WIDTH = 256
BUCKET_SIZE_MB = 0.8
STEPS = 3


class Net(LightningModule):
    """Layers of which several share a bucket, one that fills a bucket alone, one that is frozen."""

    def __init__(self, width: int = WIDTH, momentum: float | None = None) -> None:
        super().__init__()
        self.momentum = momentum
        self.into = nn.Linear(8, width)
        self.hidden = nn.Sequential(*(nn.Linear(width, width) for _ in range(5)))
        self.wide = nn.Linear(width, 6 * width, bias=False)
        self.frozen = nn.Linear(6 * width, width).requires_grad_(False)
        self.out = nn.Linear(width, 8)

    def training_step(self, batch: Tensor) -> Tensor:
        x = batch.to(self.into.weight.dtype)
        return (self.out(self.frozen(self.wide(self.hidden(self.into(x))))) - x).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.momentum is not None:
            return torch.optim.SGD(trained, lr=1e-3, momentum=self.momentum)
        return torch.optim.AdamW(trained)


def memory(*tensors: Tensor | None, but: Any = ()) -> int:
    """The bytes behind some tensors, each once, and without those behind others."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    for tensor in but:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


class Measured(Callback):
    """The live tensors by kind, at their most."""

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        self.sent: list[int] = []
        self.before_second_step = 0

    @property
    def traffic(self) -> int:
        """What was sent in a step: one after the first, in which the ranks learn in what order buckets are full."""
        return (sum(self.sent) - self.before_second_step) // (STEPS - 1)

    def see(self, **kinds: int) -> None:
        for kind, nbytes in kinds.items():
            self.most[kind] = max(self.most.get(kind, 0), nbytes)

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        partition = getattr(trainer.strategy, "_partition", None)
        whole = [p.grad for p in module.parameters() if type(p.grad) is Tensor]
        self.see(gradients=memory(*whole, *(bucket._gradient for bucket in partition.buckets) if partition else ()))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        partition = getattr(trainer.strategy, "_partition", None)
        weights = [*module.parameters(), *module.buffers()]
        masters = [piece.master for bucket in partition.buckets for piece in bucket.pieces] if partition else []
        states = [v for s in trainer.optimizers[0].state.values() for v in s.values() if isinstance(v, Tensor)]
        self.see(weights=memory(*weights), masters=memory(*masters, but=weights), states=memory(*states))
        if trainer.global_step == 1 and not self.before_second_step:
            self.before_second_step = sum(self.sent)

    def watch_buckets(self) -> None:
        """Look at what is under way whenever something is taken from a parameter, or sent."""
        deposit, send = GradientReducer._deposit, GradientReducer._send_next

        def look(reducer: GradientReducer, *also: Tensor | None) -> None:
            pools = [reducer._pool, reducer._collectives._transport._received]
            lent = [whole for pool in pools for _, whole in pool._lent.values()]
            free = [buffer for pool in pools for buffer in pool._free]
            own = [buffer for _, buffer, _ in reducer._in_flight] + list(reducer._buffers.values())
            self.see(buckets=memory(*lent, *free, *own, *also))

        def watched_deposit(reducer: GradientReducer, index: int, slot: Any, *, own_memory: bool) -> None:
            gradient = slot.parameter.grad
            if type(gradient) is not Tensor:
                return deposit(reducer, index, slot, own_memory=own_memory)
            fills = slot.parameter.numel() == reducer._buckets[index].plan.numel
            if not fills:
                reducer._buffer(index)
            look(reducer, gradient)
            del gradient  # nobody else may hold it, or its memory isn't taken over
            return deposit(reducer, index, slot, own_memory=own_memory)

        def watched_send(reducer: GradientReducer) -> None:
            send(reducer)
            look(reducer)

        GradientReducer._deposit, GradientReducer._send_next = watched_deposit, watched_send

    def watch_traffic(self) -> None:
        """Count the bytes of everything that is sent from here on."""
        reduce = dist.all_reduce

        def counted_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sent.append(tensor.nbytes)
            return reduce(tensor, *args, **kwargs)

        dist.all_reduce = counted_reduce
        exchange = Sockets.exchange

        def counted_exchange(sockets: Sockets, received: Any, sent: Any) -> Any:
            self.sent += [tensor.nbytes for _, tensor in sent]
            return exchange(sockets, received, sent)

        Sockets.exchange = counted_exchange


def measured(directory: Path, stage: int, precision: str, accumulate: int, momentum: float | None) -> dict[str, int]:
    """Run on every rank: a real fit, and what it takes."""
    transport._connect = lambda *_: None  # as between hosts, which is what is planned for
    watch = Measured()
    watch.watch_buckets()
    watch.watch_traffic()
    trainer = quiet_trainer(
        ZeroStrategy(stage, bucket_size_mb=BUCKET_SIZE_MB),
        world_size=2,
        precision=precision,
        accumulate_grad_batches=accumulate,
        max_steps=STEPS,
        callbacks=[watch],
    )
    trainer.fit(Net(momentum=momentum), datamodule=Data())
    traffic = watch.traffic
    trainer.save_checkpoint(directory / "tag")
    sizes = {path.name: path.stat().st_size for path in (directory / "tag").iterdir()}
    snapshot = max(size for name, size in sizes.items() if name.startswith("rank-"))
    return {**watch.most, "traffic": traffic, "checkpoint": sum(sizes.values()), "snapshot": snapshot}


class MeasuredDDP(Measured):
    """DDP's buckets, as a communication hook is shown them."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(None, self.see_bucket)

    def see_bucket(self, _: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.sent.append(bucket.buffer().nbytes)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done


def measured_ddp(directory: Path, precision: str) -> dict[str, int]:
    watch = MeasuredDDP()
    trainer = quiet_trainer(DDPStrategy(), world_size=2, precision=precision, max_steps=STEPS, callbacks=[watch])
    trainer.fit(Net(), datamodule=Data())
    trainer.save_checkpoint(directory / "model.ckpt")
    size = (directory / "model.ckpt").stat().st_size
    # A ring all-reduce over two ranks sends as many bytes as there are in the bucket
    return {**watch.most, "buckets": watch.traffic, "traffic": watch.traffic, "checkpoint": size}


NET = ("--model", "tests.test_cli_plan:Net", "--model-args", json.dumps({"width": WIDTH}), "--world-size", "2")


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@cache
def gradients_are_taken_over() -> bool:
    """Whether a bucket that one gradient fills has its memory. torch 2.6's autograd holds it too, so it is copied."""
    layer, unshared = nn.Linear(4, 4), []
    layer.weight.register_post_accumulate_grad_hook(lambda weight: unshared.append(is_unshared(weight.grad)))
    layer(torch.ones(2, 4)).sum().backward()
    return unshared == [True]


def compare(ranks: list[dict[str, int]], stage: dict[str, int]) -> None:
    """What was measured on the rank that needs most, with what was planned."""
    assert len(ranks) == 2
    for kind in ranks[0]:
        if kind == "buckets" and not gradients_are_taken_over():
            continue
        assert stage[kind] == pytest.approx(max(rank[kind] for rank in ranks), rel=0.03), kind


@pytest.mark.parametrize(
    ("stage", "precision", "accumulate", "momentum"),
    [
        (1, "32-true", 1, None),
        (2, "bf16-true", 2, None),
        (1, "bf16-true", 2, 0.9),
        (2, "bf16-mixed", 1, 0.0),
    ],
)
def test_a_run_measures_what_was_planned(
    stage: int,
    precision: str,
    accumulate: int,
    momentum: float | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    optimizer = {None: "adamw", 0.0: "sgd", 0.9: "sgd-momentum"}[momentum]
    found = planned(
        capsys,
        *(*NET, "--stage", str(stage), "--precision", precision, "--accumulate", str(accumulate)),
        *("--optimizer", optimizer, "--bucket-size-mb", str(BUCKET_SIZE_MB), "--backend", "gloo"),
    )
    ranks = run_ranks(measured, 2, tmp_path, stage, precision, accumulate, momentum, process_group=False)
    compare(ranks, found["stages"][0])


def measured_in_long_rounds(most_cuts: int, *arguments: Any) -> dict[str, int]:
    cut_in_long_rounds(most_cuts)
    return measured(*arguments)


@pytest.mark.parametrize("most_cuts", [2, 4])
def test_a_run_whose_buckets_share_rounds_measures_what_was_planned(
    most_cuts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "plan_buckets", partial(plan_buckets, most_cuts=most_cuts))
    arguments = ("--stage", "2", "--precision", "bf16-true", "--accumulate", "2")
    found = planned(capsys, *NET, *arguments, "--bucket-size-mb", str(BUCKET_SIZE_MB), "--backend", "gloo")
    ranks = run_ranks(measured_in_long_rounds, 2, most_cuts, tmp_path, 2, "bf16-true", 2, None, process_group=False)
    compare(ranks, found["stages"][0])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_ddp_measures_what_was_planned_for_stage_0(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = planned(capsys, *NET, "--stage", "0", "--precision", precision)
    compare(run_ranks(measured_ddp, 2, tmp_path, precision, process_group=False), found["stages"][0])


def test_one_rank_measures_what_was_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *NET[:-1], "1", "--stage", "2", "--precision", "bf16-true")
    (rank,) = run_ranks(measured_alone, 1, process_group=False)
    for kind, nbytes in rank.items():
        assert found["stages"][0][kind] == pytest.approx(nbytes, rel=0.03), kind


def measured_alone() -> dict[str, int]:
    watch = Measured()
    strategy = ZeroStrategy()
    trainer = quiet_trainer(strategy, world_size=1, precision="bf16-true", max_steps=1, callbacks=[watch])
    trainer.fit(Net(), datamodule=Data())
    del watch.most["gradients"]  # in a step there are the masters' as well
    return watch.most


def test_a_number_of_parameters_is_planned_as_a_module_of_as_many_is(capsys: pytest.CaptureFixture[str]) -> None:
    numel = sum(p.numel() for p in Net().parameters() if p.requires_grad)
    for world_size in ("1", "2", "7"):
        options = ("--world-size", world_size, "--precision", "bf16-true", "--accumulate", "2")
        options += ("--bucket-size-mb", str(BUCKET_SIZE_MB))
        of_module = planned(capsys, *NET[:4], *options)["stages"]
        of_number = planned(capsys, "--params", str(numel), *options)["stages"]
        frozen = Net().frozen.weight.numel() + Net().frozen.bias.numel()
        for module, number in zip(of_module, of_number, strict=True):
            for kind in ("gradients", "masters", "states", "snapshot", "traffic"):
                assert number[kind] == pytest.approx(module[kind], rel=0.03), kind
            assert number["weights"] == pytest.approx(module["weights"] - 2 * frozen, rel=0.03)
            assert number["checkpoint"] == pytest.approx(module["checkpoint"] - 2 * frozen, rel=0.03)


def test_buckets_that_hold_less_than_an_element_hold_one(capsys: pytest.CaptureFixture[str]) -> None:
    stages = planned(capsys, "--params", "1000", "--world-size", "2", "--bucket-size-mb", "1e-7")["stages"]
    assert [stage["checkpoint"] for stage in stages] == [12 * 1000] * 3


def noisy() -> Net:
    print("a line")
    return Net()


def test_what_the_users_code_prints_is_none_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "tests.test_cli_plan:noisy", "--world-size", "2", "--json"]) == 0
    printed = capsys.readouterr()
    assert (json.loads(printed.out)["world_size"], printed.err) == (2, "a line\n")


@pytest.mark.parametrize(("name", "make"), [
    ("adamw-amsgrad", lambda p: torch.optim.AdamW(p, amsgrad=True)),
    ("sgd-momentum", lambda p: torch.optim.SGD(p, momentum=0.9)),
    *((kind.__name__.lower(), kind) for kind in ELEMENT_WISE),
])  # fmt: skip
def test_the_states_that_are_planned_are_the_optimizers(name: str, make: Any) -> None:
    parameter = nn.Parameter(torch.ones(7, 11))
    optimizer = make([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [state for state in optimizer.state[parameter].values() if isinstance(state, Tensor)]
    kind = OPTIMIZERS[name]
    assert (kind.states, kind.policy) == (sum(state.shape == parameter.shape for state in states), "element")


def test_a_whole_parameter_has_one_owner_and_the_plan_is_that_of_the_rank_with_most() -> None:
    sizes = (1000, 10, 10)
    parameters = tuple(ParameterSpec(str(index), (size,), 4) for index, size in enumerate(sizes))
    setup = Setup(2, OPTIMIZERS["muon"], "parameter", equal_shards=False)
    assert plan(Model(sum(sizes), parameters=parameters), setup, 2).states == 4 * 1000


def test_the_table_has_a_column_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--params", "7B", "--world-size", "64", "--precision", "bf16-true"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("7 B trained parameters, bf16-true, adamw, 64 ranks")
    rows = {" ".join(row.split()[:-6]): row.split()[-6:] for row in out.splitlines()[3:-3]}
    assert rows["optimizer states"] == ["28.0", "GB", "875.0", "MB", "875.0", "MB"]
    assert rows["disk a checkpoint"] == ["42.0", "GB", "84.0", "GB", "84.0", "GB"]
    assert main([*arguments, "--stage", "2"]) == 0
    assert "stage 1" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--params", "0"], 2),
        (["--params", "0.3"], 2),
        (["--params", "many"], 2),
        (["--params", "1e9", "--model", "a:B"], 2),
        (["--params", "1e9", "--model-args", "{}"], 2),
        (["--params", "1e9", "--bucket-size-mb", "-1"], 2),
        (["--model", "tests.test_cli_plan"], 2),
        (["--model", "tests.test_cli_plan:Net", "--model-args", "[]"], 2),
        (["--model", "tests.test_cli_plan:Net", "--model-args", "{"], 2),
        (["--model", "tests.test_cli_plan:Net", "--frozen", "3"], 2),
        ([], 2),
        (["--model", "tests.test_cli_plan:Nothing"], 1),
        (["--model", "no_such_module:Net"], 1),
        (["--model", "tests.test_cli_plan:Net", "--model-args", '{"depth": 3}'], 1),
    ],
)
def test_what_cannot_be_planned_is_refused(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if status == 2:
        with pytest.raises(SystemExit) as caught:
            main(["plan", "--world-size", "2", *arguments])
        assert caught.value.code == 2
    else:
        assert main(["plan", "--world-size", "2", *arguments]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
