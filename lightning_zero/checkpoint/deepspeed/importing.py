"""A DeepSpeed checkpoint, written again as one of our tags: see `checkpoint.importing` for what goes where.

The loss scale, the data sampler and DeepSpeed's configuration go nowhere.
"""

from __future__ import annotations

from lightning_zero.checkpoint.deepspeed.directory import find_deepspeed_tag, read_deepspeed
from lightning_zero.checkpoint.importing import write_imported
from lightning_zero.checkpoint.storage import Location, PathOrUrl, locate
from lightning_zero.checkpoint.torch_file import Progress


def import_deepspeed_checkpoint(
    source: PathOrUrl,
    save_dir: PathOrUrl,
    tag: str | None = None,
    *,
    submodule: str = "",
    module_only: bool = False,
    weights_only: bool = True,
    verify: bool = True,
    progress: Progress = lambda nbytes: None,
) -> Location:
    """Write a DeepSpeed checkpoint as one of ours, from which a `ZeroStrategy` resumes on any number of ranks.

    DeepSpeed needn't be installed. ZeRO stages 0 to 3 and `BF16_Optimizer` are read, by `deepspeed` itself or by
    Lightning's `DeepSpeedStrategy`; models that are themselves cut over ranks, and experts, are not.

    Args:
        source: DeepSpeed's save directory, a tag's, or Lightning's `NAME.ckpt`.
        save_dir: where the tag is written, under DeepSpeed's name for it; `latest` names it then.
        tag: of the source; its `latest` decides where it is None.
        submodule: the name that the saved module has within the LightningModule: `"model"`, where a plain DeepSpeed run
            trained what is `self.model` there.
        module_only: leave the optimizer out.
        weights_only: refuse files that name what would run code when they are loaded. Here it doesn't in any case.
        verify: compare the source with its own checksums first.
        progress: is told of bytes as they are read.

    Returns:
        The tag's directory.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        IncompleteCheckpointError: a rank's file, or a part of a parameter, is missing.
        CorruptCheckpointError: a file is damaged, or of another run.
        UntrustedContentError: it holds what would run code.
        CheckpointMismatchError: it can't be told which state is which parameter's (stage 0).
        UnsupportedModelError: the model is cut over ranks, or has experts.
        CheckpointWriteError: the tag can't be written, or is there already; what was there is there.
        ValueError: `submodule` is no name of one.
    """
    checkpoint = read_deepspeed(
        find_deepspeed_tag(source, tag),
        module_only=module_only,
        submodule=submodule,
        weights_only=weights_only,
        verify=verify,
        progress=progress,
    )
    return write_imported(checkpoint, locate(save_dir), weights_only=weights_only, verify=verify).path
