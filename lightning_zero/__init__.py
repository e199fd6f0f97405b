"""lightning_zero: ZeRO for PyTorch Lightning in plain PyTorch.

Train by `ZeroStrategy`, save by `ZeroCheckpoint`. `Fp32Export` writes a plain file at the end, and `TrainingReport` a
page. Weights come out of a checkpoint by `load_from_zero_checkpoint` (a LightningModule),
`load_state_dict_from_zero_checkpoint` (any module), `get_fp32_state_dict_from_zero_checkpoint` and
`convert_zero_checkpoint_to_fp32_state_dict`; DeepSpeed's and FSDP's become ours by `import_deepspeed_checkpoint` and
`import_fsdp_checkpoint`. All that is raised on purpose is in `errors`.

Importing the package registers the strategies `"zero_stage_1"` and `"zero_stage_2"`; `_offload`, and after it `_spawn`,
`_fork` or `_notebook`, may follow.

[Note: names are imported when they are asked for]
Lightning and torch take seconds to import, and neither `lightning-zero ls` nor an export needs them. So the public
names are resolved by `__getattr__`, and the strategies are registered when Lightning is there.
"""

import importlib
from typing import TYPE_CHECKING

from lightning_zero.plugin.registration import register_when_lightning_is_imported

if TYPE_CHECKING:
    from lightning_zero import errors as errors
    from lightning_zero.checkpoint.deepspeed.importing import (
        import_deepspeed_checkpoint as import_deepspeed_checkpoint,
    )
    from lightning_zero.checkpoint.export import (
        convert_zero_checkpoint_to_fp32_state_dict as convert_zero_checkpoint_to_fp32_state_dict,
    )
    from lightning_zero.checkpoint.fsdp.importing import import_fsdp_checkpoint as import_fsdp_checkpoint
    from lightning_zero.checkpoint.state_dict import (
        get_fp32_state_dict_from_zero_checkpoint as get_fp32_state_dict_from_zero_checkpoint,
    )
    from lightning_zero.checkpoint.state_dict import (
        load_state_dict_from_zero_checkpoint as load_state_dict_from_zero_checkpoint,
    )
    from lightning_zero.engine.optimizer import OwnedSegment as OwnedSegment
    from lightning_zero.plugin.callbacks import Fp32Export as Fp32Export
    from lightning_zero.plugin.callbacks import ZeroCheckpoint as ZeroCheckpoint
    from lightning_zero.plugin.checkpoint_io import ZeroCheckpointIO as ZeroCheckpointIO
    from lightning_zero.plugin.loading import load_from_zero_checkpoint as load_from_zero_checkpoint
    from lightning_zero.plugin.strategy import ZeroStrategy as ZeroStrategy
    from lightning_zero.plugin.training_report import TrainingReport as TrainingReport

__version__ = "0.1.0"

_HOMES = {
    "Fp32Export": "plugin.callbacks",
    "OwnedSegment": "engine.optimizer",
    "TrainingReport": "plugin.training_report",
    "ZeroCheckpoint": "plugin.callbacks",
    "ZeroCheckpointIO": "plugin.checkpoint_io",
    "ZeroStrategy": "plugin.strategy",
    "convert_zero_checkpoint_to_fp32_state_dict": "checkpoint.export",
    "get_fp32_state_dict_from_zero_checkpoint": "checkpoint.state_dict",
    "import_deepspeed_checkpoint": "checkpoint.deepspeed.importing",
    "import_fsdp_checkpoint": "checkpoint.fsdp.importing",
    "load_from_zero_checkpoint": "plugin.loading",
    "load_state_dict_from_zero_checkpoint": "checkpoint.state_dict",
}

__all__ = ["__version__", "errors", *_HOMES]


def __getattr__(name: str) -> object:
    if name == "errors":
        return importlib.import_module("lightning_zero.errors")
    if name in _HOMES:
        return getattr(importlib.import_module(f"lightning_zero.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_lightning_is_imported()
