"""A DCP directory, written again as one of our tags: see `checkpoint.importing` for what goes where."""

from __future__ import annotations

from lightning_zero.checkpoint.fsdp.directory import find_distributed, read_distributed
from lightning_zero.checkpoint.importing import write_imported
from lightning_zero.checkpoint.storage import Location, PathOrUrl, locate
from lightning_zero.checkpoint.torch_file import Progress


def import_fsdp_checkpoint(
    source: PathOrUrl,
    save_dir: PathOrUrl,
    tag: str | None = None,
    *,
    model_key: str | None = None,
    optimizer_key: str | None = None,
    submodule: str = "",
    module_only: bool = False,
    weights_only: bool = True,
    verify: bool = True,
    progress: Progress = lambda nbytes: None,
) -> Location:
    """Write a sharded checkpoint of FSDP's as one of ours, from which a `ZeroStrategy` resumes on any number of ranks.

    Whatever torch.distributed.checkpoint has written is read: by Lightning's `FSDPStrategy(state_dict_type="sharded")`
    or `ModelParallelStrategy`, by Fabric, or by a loop with `get_state_dict` and `dcp.save`.

    Args:
        source: the directory with the `.metadata`.
        save_dir: where the tag is written; `latest` names it then.
        tag: that it becomes; the source's own name where it is None.
        model_key: where the module's state dict stands in what was saved: `"app.model"`; `""` where the module's own
            names stand there. If it is None, `model` or `state_dict`, wherever that is.
        optimizer_key: where the optimizer's does. If it is None, wherever there are param groups.
        submodule: the name that the saved module has within the LightningModule: `"model"`, where a loop trained what
            is `self.model` there.
        module_only: leave the optimizers out.
        weights_only: refuse what would run code when the tag is loaded. Here nothing does in any case.
        verify: compare the source with its own checksums first.
        progress: is told of bytes as they are read.

    Returns:
        The tag's directory.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        IncompleteCheckpointError: a file, or a part of a tensor, is missing.
        CorruptCheckpointError: a file is damaged, or of another save.
        UntrustedContentError: it holds what would run code.
        CheckpointMismatchError: it can't be told where the module stands, or whose a state is.
        UnsupportedModelError: a tensor isn't cut into rows, or the files were transformed as they were written.
        CheckpointWriteError: the tag can't be written, or is there already; what was there is there.
        ValueError: `submodule` is no name of one.
    """
    checkpoint = read_distributed(
        find_distributed(source),
        tag,
        model_key=model_key,
        optimizer_key=optimizer_key,
        module_only=module_only,
        submodule=submodule,
        verify=verify,
        progress=progress,
    )
    return write_imported(checkpoint, locate(save_dir), weights_only=weights_only, verify=verify).path
