"""The strategy by its class path and by its names, in LightningCLI and in the Trainer; and wrong arguments."""

import inspect
import re
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)

from lightning_zero import Fp32Export, TrainingReport, ZeroCheckpoint, ZeroCheckpointIO, ZeroStrategy
from tests.models import Data, Model

QUIET = ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_steps=2"]


def cli(*arguments, run=False):
    return LightningCLI(
        Model,
        Data,
        args=[*(["fit"] if run else []), *QUIET, "--trainer.enable_checkpointing=false", *arguments],
        run=run,
        save_config_callback=None,
        seed_everything_default=3,
    )


def test_class_path_with_arguments():
    trainer = cli(
        "--trainer.strategy=lightning_zero.ZeroStrategy",
        "--trainer.strategy.stage=1",
        "--trainer.strategy.partition=parameter",
        "--trainer.strategy.bucket_size_mb=5",
        "--trainer.strategy.reduce_dtype=float32",
    ).trainer
    assert isinstance(trainer.strategy, ZeroStrategy)
    assert trainer.strategy.stage == 1
    assert trainer.strategy._partition_by == "parameter"
    assert trainer.strategy._reduce_dtype == torch.float32


def test_a_config_file_fits(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n"
        "  strategy:\n"
        "    class_path: lightning_zero.ZeroStrategy\n"
        "    init_args: {stage: 2, find_unused_parameters: true, timeout: null}\n"
        "  callbacks:\n"
        "    - class_path: lightning_zero.ZeroCheckpoint\n"
        f"      init_args: {{dirpath: {tmp_path}/ckpts, every_n_train_steps: 1, keep_last: 2}}\n"
        f"    - {{class_path: lightning_zero.Fp32Export, init_args: {{path: {tmp_path}/model.ckpt}}}}\n"
        "model: {dropout: 0.1}\n"
    )
    trainer = cli(f"--config={config}", "--trainer.enable_checkpointing=true", run=True).trainer
    assert trainer.global_step == 2
    assert (tmp_path / "ckpts" / "latest").read_text() == "step=2.ckpt"
    assert (tmp_path / "model.ckpt").is_file()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("suffix", "start_method"), [("", "popen"), ("_spawn", "spawn"), ("_notebook", "fork")])
def test_registered_names(stage, suffix, start_method):
    name = f"zero_stage_{stage}{suffix}"
    assert name in StrategyRegistry.available_strategies()
    for trainer in (cli(f"--trainer.strategy={name}").trainer, Trainer(strategy=name, accelerator="cpu", logger=False)):
        assert (trainer.strategy.stage, trainer.strategy._start_method) == (stage, start_method)


def test_a_wrong_argument_in_a_config_is_named(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli("--trainer.strategy=lightning_zero.ZeroStrategy", "--trainer.strategy.stagee=2")
    assert exit_.value.code == 2
    assert "stagee" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stagee": 2}, r"no argument 'stagee' \(did you mean 'stage'\?\); it takes stage, partition, bucket_size_mb"),
        ({"gradient_as_bucket_view": True}, "'gradient_as_bucket_view' .gradients have their buckets here in any case"),
        ({"static_graph": True}, "leave it out"),
        ({"bucket_cap_mb": 5}, "it is called bucket_size_mb here"),
        ({"config": "ds.json"}, "arguments of the Trainer and of ZeroStrategy"),
        ({"offload_parameters": True, "loss_scale": 0}, r"FSDPStrategy\(cpu_offload=True\).*precision='16-mixed'"),
        ({"sharding_strategy": "FULL_SHARD"}, "use FSDPStrategy for FULL_SHARD"),
        ({"zzz": 1}, "no argument 'zzz'; it takes"),
    ],
)
def test_an_unknown_argument_is_refused_with_what_to_write_instead(arguments, message):
    with pytest.raises(TypeError, match=message):
        ZeroStrategy(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": 3}, "stage must be 1 or 2, not 3; use DDPStrategy for stage 0, FSDPStrategy for 3"),
        ({"stage": 2.0}, "stage must be 1 or 2, not 2.0"),
        ({"stage": True}, "stage must be 1 or 2, not True"),
        ({"partition": "rows"}, 'partition must be "auto", "element" or "parameter", not \'rows\''),
        ({"bucket_size_mb": 0}, "bucket_size_mb must be a positive number, not 0"),
        ({"bucket_size_mb": "25"}, "bucket_size_mb must be a positive number, not '25'"),
        ({"start_method": "thread"}, "start_method must be one of"),
        ({"timeout": 5}, "timeout must be a datetime.timedelta"),
        ({"bucket_size_mb": float("nan")}, "bucket_size_mb must be a positive number, not nan"),
        ({"bucket_size_mb": float("inf")}, "bucket_size_mb must be a positive number, not inf"),
        ({"reduce_dtype": "int8"}, 'must be one of "float32", "bfloat16", "float16", "float64", or None, not \'int8\''),
        ({"reduce_dtype": torch.float8_e4m3fn}, "reduce_dtype must be one of"),
    ],
)
def test_a_wrong_value_is_refused_with_the_valid_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        ZeroStrategy(**arguments)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (ZeroStrategy, "offload_optimizer", {"device": "none"}),
        (ZeroStrategy, "offload_optimizer", "cpu"),
        (ZeroStrategy, "find_unused_parameters", "false"),
        (ZeroStrategy, "broadcast_buffers", None),
        (ZeroStrategy, "overlap_gather", 1),
        (ZeroCheckpointIO, "async_save", "no"),
        (ZeroCheckpointIO, "fsync", "no"),
        (ZeroCheckpointIO, "node_local", None),
        (ZeroCheckpoint, "async_save", "no"),
        (partial(Fp32Export, "model.ckpt"), "exclude_frozen_parameters", "no"),
        (partial(Fp32Export, "model.ckpt"), "weights_only", "no"),
    ],
)
def test_what_is_no_switch_switches_nothing_on(make, name, value):
    with pytest.raises(TypeError, match=f"^{name} must be True or False, not {re.escape(repr(value))}$"):
        make(**{name: value})


@pytest.mark.parametrize("stranger", [DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy])
def test_every_argument_of_other_strategies_has_a_word_of_what_to_do(stranger):
    for name in inspect.signature(stranger).parameters.keys() - inspect.signature(ZeroStrategy).parameters.keys():
        if name != "kwargs":
            with pytest.raises(TypeError, match=rf"{name}' \((?!did you mean)"):
                ZeroStrategy(**{name: None})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"checkpoint_io": ZeroCheckpointIO},
            r"must be an instance of CheckpointIO, .*did you mean ZeroCheckpointIO\(\)",
        ),
        ({"checkpoint_io": "zero"}, "must be an instance of CheckpointIO, not 'zero'$"),
        ({"precision_plugin": "bf16-true"}, "must be an instance of Precision"),
        ({"cluster_environment": "slurm"}, "must be an instance of ClusterEnvironment"),
        ({"accelerator": "cpu"}, "must be an instance of Accelerator"),
    ],
)
def test_what_is_no_plugin_is_refused_at_once(arguments, message):
    with pytest.raises(TypeError, match=message):
        ZeroStrategy(**arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ZeroCheckpoint(keep_last=0),
        lambda: ZeroCheckpoint(keep_last=True),  # it would keep one, and remove all others
        lambda: ZeroCheckpoint(filename="a/b"),
        lambda: ZeroCheckpoint(filename=".hidden"),
        lambda: Fp32Export("model.onnx"),
        lambda: Fp32Export("model.ckpt", every_n_checkpoints="2"),
        lambda: Fp32Export("model.ckpt", every_n_checkpoints=0),
        lambda: TrainingReport("report.txt"),
        lambda: TrainingReport(every_n_train_steps=0.5),
    ],
)
def test_a_callback_that_cannot_work_is_refused_at_once(make):
    with pytest.raises(ValueError, match=r"keep_last|hidden|one plain name|Fp32Export|every_n|\.html"):
        make()
