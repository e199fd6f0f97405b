"""Callbacks: periodic sharded checkpoints, and files of the model at the end and on the way."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_zero.checkpoint import commit
from lightning_zero.checkpoint.background_export import BackgroundExport
from lightning_zero.checkpoint.export import (
    PLAIN_STATE_DICTS,
    Wanted,
    export,
    is_lightnings,
    parse_dtype,
    parse_size,
    require_suitable,
)
from lightning_zero.checkpoint.integrity import read_manifest
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.manifest import MANIFEST_NAME, Manifest
from lightning_zero.checkpoint.resolution import is_checkpoint, resolve
from lightning_zero.checkpoint.retention import Retention
from lightning_zero.checkpoint.storage import Location, PathOrUrl, absolute, is_remote, locate, names_in
from lightning_zero.errors import UnsupportedModelError
from lightning_zero.plugin.arguments import require_bool, require_count
from lightning_zero.plugin.checkpoint_io import LoadedCheckpoint
from lightning_zero.plugin.savers import FOR_GOOD, Savers
from lightning_zero.plugin.strategy import ZeroStrategy

_SAVERS = "savers"


class ZeroCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` for checkpoint directories: everything that one has, and retention by number.

    `fit(ckpt_path="last")` resumes from the tag that `latest` names in `dirpath`, or from what SLURM's signal saved if
    that is newer. When a rank gets SIGTERM, all of them stop between two batches, and save first.

    Args:
        dirpath: the save directory; `checkpoints/` under the Trainer's `default_root_dir` by default, where a fresh
            process finds it again.
        filename: the tag, as for `ModelCheckpoint`; `"{step}"` by default. A tag that is there already is replaced
            atomically, unless `enable_version_counter` is set.
        keep_last: keep this many of the newest tags of `dirpath` (and the best by `monitor`, if one is given), and
            remove older ones: tags with names like its own that nobody else has saved. None: as `save_top_k` says.
        keep_every_n_steps: tags whose step is a multiple of it are never removed.
        async_save: go on with training while a checkpoint is written: see `ZeroCheckpointIO`. None: as that one says.
        monitor: as for `ModelCheckpoint`, like all that follow.
        save_top_k: by default 1; all, where tags are kept by number and nothing is monitored.
        enable_version_counter: save a tag that is there already as another, `-v1`.
        **kwargs: `ModelCheckpoint`'s other arguments.

    Raises:
        ValueError: a number to keep is less than 1.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        *,
        keep_last: int | None = None,
        keep_every_n_steps: int | None = None,
        async_save: bool | None = None,
        monitor: str | None = None,
        save_top_k: int | None = None,
        enable_version_counter: bool = False,
        **kwargs: Any,
    ) -> None:
        require_count("keep_last", keep_last)
        require_count("keep_every_n_steps", keep_every_n_steps)
        if async_save is not None:
            require_bool("async_save", async_save)
        if dirpath is not None:
            dirpath = str(locate(dirpath))  # Lightning would make a path even of a file's URL, or of what is refused
        self.keep_last = keep_last
        self.keep_every_n_steps = keep_every_n_steps
        self.async_save = async_save
        self._savers: Savers | None = None
        self._settled: dict[str, tuple[int, float]] = {}
        self._over_when_saved = (0, 0)
        name = filename or ""
        if name.startswith("."):
            raise ValueError(
                f"the filename {filename!r} would be hidden, and never found again; begin it without a dot"
            )
        if "/" in (name if kwargs.get("auto_insert_metric_name", True) else re.sub(r"{[^}]*}", "", name)):
            raise ValueError(
                f"the filename {filename!r} would make a directory in a directory: a tag is one plain name. For a "
                "metric with a slash: auto_insert_metric_name=False, and a filename such as 'loss={val/loss:.2f}'"
            )
        if save_top_k is None:
            save_top_k = -1 if self._retains and monitor is None else 1
        super().__init__(
            dirpath,
            filename or "{step}",
            monitor=monitor,
            save_top_k=save_top_k,
            enable_version_counter=enable_version_counter,
            **kwargs,
        )

    @property
    def _retains(self) -> bool:
        return self.keep_last is not None or self.keep_every_n_steps is not None

    @property
    def _saver(self) -> str:
        """What it is called among `Savers`."""
        return self.state_key if self._retains or self.save_top_k != -1 else FOR_GOOD

    @override
    def state_dict(self) -> dict[str, Any]:
        """With what is known of who has saved what in its directory: a run that goes on from here keeps it all."""
        state = super().state_dict()
        if self._retains and self._savers is not None and self.dirpath is not None:
            state[_SAVERS] = self._savers.state(self.dirpath)
        return state

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        if self._savers is not None and _SAVERS in state and isinstance(checkpoint, LoadedCheckpoint):
            there = [callback.state_key for callback in trainer.checkpoint_callbacks]
            self._savers.restore(self._save_directory(trainer), state[_SAVERS], there, checkpoint.source.directory)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.async_save and not isinstance(trainer.strategy, ZeroStrategy):
            raise UnsupportedModelError(
                f"ZeroCheckpoint(async_save=True) needs Trainer(strategy=ZeroStrategy()), not "
                f"{type(trainer.strategy).__name__}"
            )
        if self._retains and not (
            isinstance(trainer.strategy, ZeroStrategy) and trainer.strategy.saves.writes_directories
        ):
            raise UnsupportedModelError(
                "keep_last and keep_every_n_steps count checkpoint directories, which ZeroStrategy writes by its "
                "ZeroCheckpointIO; use save_top_k with another strategy or CheckpointIO"
            )
        self.dirpath = self._save_directory(trainer)
        if stage == "fit" and isinstance(trainer.strategy, ZeroStrategy):
            trainer.strategy.saves.require_writable(locate(self.dirpath))
            self._savers = trainer.strategy.saves.savers
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.async_save and isinstance(trainer.strategy, ZeroStrategy):
            trainer.strategy.saves.expect_behind()

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save where the window of accumulated batches is over: no checkpoint has the gradients of one that isn't."""
        if not trainer.fit_loop._should_accumulate():
            super().on_train_batch_end(trainer, *args, **kwargs)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if isinstance(trainer.strategy, ZeroStrategy):
            trainer.strategy.saves.wait()  # whoever comes next finds what this one has saved

    @override
    def file_exists(self, filepath: str | Path, trainer: Trainer) -> bool:
        """Whether there is such a checkpoint, or is going to be."""
        behind = isinstance(trainer.strategy, ZeroStrategy) and trainer.strategy.saves.is_under_way(filepath)
        return trainer.strategy.reduce_boolean_decision(behind, all=False) or super().file_exists(filepath, trainer)

    def _save_directory(self, trainer: Trainer) -> str:
        return str(self.dirpath or locate(trainer.default_root_dir) / "checkpoints")

    @override
    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        directory = self._save_directory(trainer)
        requeued = trainer._checkpoint_connector._hpc_resume_path if SLURMEnvironment.detect() else None
        found = {requeued} if requeued else set()  # Lightning takes whichever is newest
        save_dir = locate(directory)
        if not is_remote(save_dir):  # as DDP saves them
            found |= {path for path in super()._find_last_checkpoints(trainer) if os.path.isfile(path)}
        if not is_checkpoint(directory):
            if not found:
                rank_zero_info(f"no checkpoint in {directory} yet: training starts afresh")
                # Lightning says so too, and advises a save_last=True that isn't needed
                warnings.filterwarnings("ignore", '.*ckpt_path="last".* is set, but there is no last checkpoint')
                ending = self.FILE_EXTENSION
                files = [name for name in sorted(names_in(save_dir)) if (save_dir / name).suffix == ending]
                files = [name for name in files if (save_dir / name).is_file()]
                if files:
                    rank_zero_warn(
                        f'{directory} holds checkpoints of another strategy, {files}, which ckpt_path="last" doesn\'t '
                        "resume from: stop, and pass one of them as ckpt_path, or take another dirpath"
                    )
            return found
        newest = resolve(directory)
        if not read_manifest(newest).optimizers:
            rank_zero_warn(f"{newest} holds weights alone, which no training can resume from: it starts afresh")
            return found
        # Lightning takes whichever was written last, and what has no directories knows that of files alone; the time of
        # a directory is also that of a dead save in it, or of a removal
        if (latest := save_dir / commit.LATEST).is_file():
            return {str(latest), *found}
        return {str(newest / MANIFEST_NAME) if is_remote(save_dir) else directory, *found}

    @override
    def _save_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_monitor_checkpoint(trainer, monitor_candidates)
        if self._retains and self._last_global_step_saved != trainer.global_step:
            # Not among the best, but among the last.
            self._save_checkpoint(trainer, self._get_metric_interpolated_filepath_name(monitor_candidates, trainer))

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        strategy = trainer.strategy
        self._over_when_saved = _over(trainer)
        if not isinstance(strategy, ZeroStrategy):
            super()._save_checkpoint(trainer, filepath)
            return
        if self._holds_the_same(trainer, filepath):
            if strategy.saves.tends_directory:
                strategy.saves.after_commit(partial(commit.copy_tag, Path(self._last_checkpoint_saved), Path(filepath)))
            return
        if strategy.saves.tends_directory:
            strategy.saves.savers.note(filepath, self._saver)  # before this callback's state goes into the checkpoint
        with strategy.saves.asked_by(self._saver, behind=self.async_save):
            super()._save_checkpoint(trainer, filepath)
        if self._retains and strategy.saves.tends_directory:
            strategy.saves.after_commit(self._retention(trainer, strategy.saves.savers))

    def _holds_the_same(self, trainer: Trainer, filepath: str) -> bool:
        """Whether this is `save_last`'s, right after what it is a copy of: nothing has to be written a second time."""
        saved = self._last_checkpoint_saved
        if self._enable_version_counter:  # what was saved before doesn't know this one's name yet
            return False
        if filepath != self.last_model_path or self._last_global_step_saved != trainer.global_step:
            return False
        beside = os.path.dirname(saved) == os.path.dirname(filepath) and saved != filepath
        return beside and not is_remote(locate(filepath))

    @staticmethod
    @override
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if not isinstance(trainer.strategy, ZeroStrategy):
            ModelCheckpoint._link_checkpoint(trainer, filepath, linkpath)
            return
        if trainer.strategy.saves.tends_directory and os.path.abspath(filepath) != os.path.abspath(linkpath):
            trainer.strategy.saves.after_commit(partial(commit.link_tag, Path(filepath), Path(linkpath)))
        trainer.strategy.barrier()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """When all ranks were told to stop (SIGTERM, Ctrl+C), save where they are."""
        strategy = trainer.strategy
        saves = getattr(self, "save_on_exception", False)  # only then is it worth waiting for the other ranks
        if not saves or not isinstance(strategy, ZeroStrategy) or strategy.all_ranks_are_here():
            super().on_exception(trainer, pl_module, exception)
        interrupted = isinstance(exception, KeyboardInterrupt) and getattr(strategy, "stopped_together", False)
        stopped = interrupted or isinstance(exception, SIGTERMException)
        if stopped and self._over_when_saved != _over(trainer):
            self._last_global_step_saved = 0  # what was saved at this step doesn't have what has come of it since
        if stopped and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_checkpoint(trainer, self.format_checkpoint_name(candidates))
            self._save_last_checkpoint(trainer, candidates)

    @override
    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        # What is no longer among the best may still be among the last: retention removes it in its time.
        if self._retains:
            return
        strategy = trainer.strategy
        if not isinstance(strategy, ZeroStrategy) or strategy.saves.savers.let_go(filepath, self._saver):
            super()._remove_checkpoint(trainer, filepath)

    def _retention(self, trainer: Trainer, savers: Savers) -> Callable[[], object]:
        """What removes the tags that needn't be kept after this save: it may have to wait for the commit."""
        assert self.dirpath is not None
        kept: set[str] = set()
        for callback in trainer.checkpoint_callbacks:  # another one may keep its best in the same directory
            if isinstance(callback, ModelCheckpoint) and (callback.monitor or callback is not self):
                kept |= {callback.best_model_path, callback.last_model_path, *callback.best_k_models}
        directory = locate(self.dirpath)
        last = directory / locate(self.last_model_path).name if self.last_model_path else None
        pattern, own = self._tag_pattern(), self._saver
        retention = Retention(
            self.keep_last or 1,
            self.keep_every_n_steps,
            among=lambda name: pattern.fullmatch(name) is not None and savers.may_count(directory / name, own),
            let_go=lambda name: savers.let_go(directory / name, own),
            settled=self._settled,
        )

        def remove() -> None:
            extra = 1 if last is not None and last.is_dir() and not last.is_symlink() else 0  # `save_last` is one more
            retention.apply(directory, {locate(path).name for path in kept if path}, beside=extra)

        return remove

    def _tag_pattern(self) -> re.Pattern[str]:
        """What this callback's own tags look like; nobody else's are removed."""
        names = [self.filename or "", self.CHECKPOINT_NAME_LAST]
        if self.auto_insert_metric_name:
            names = [
                re.sub(r"{([^}:]*)", lambda m: f"{m[1]}{self.CHECKPOINT_EQUALS_CHAR}{m[0]}", name) for name in names
            ]
        # Every second piece is a field
        pieces = [re.split(r"({[^}]*})", name) for name in names]
        ours = "|".join("".join(_value(p) if k % 2 else re.escape(p) for k, p in enumerate(name)) for name in pieces)
        return re.compile(rf"(?:{ours})(?:{self.CHECKPOINT_JOIN_CHAR}v\d+)?{re.escape(self.FILE_EXTENSION)}")


def _value(field: str) -> str:
    """What a field of a filename is filled with: a number, where its format is one of those that are usual."""
    return r"-?(?:\d[\d.]*(?:e[-+]\d+)?|nan|inf)" if re.fullmatch(r"{[^:]*(?::\d*(?:\.\d+)?[defg]?)?}", field) else ".*"


def _over(trainer: Trainer) -> tuple[int, int]:
    """How many epochs, and batches of validations, are over: a step may be followed by both before the next."""
    loop = trainer.fit_loop
    return loop.epoch_progress.total.completed, loop.epoch_loop.val_loop.batch_progress.total.completed


class Fp32Export(Callback):
    """Writes the model as a file when fit ends: what plain Lightning, or anything that reads safetensors, loads.

    At the end of fit all ranks wait for it. After every N-th checkpoint, rank 0 writes it in a thread, from what was
    committed, while training goes on; what fails is warned of, and raised at the end of fit.

    Args:
        path: a path or a URL: `.ckpt` for `MyModule.load_from_checkpoint`, `.safetensors` or a plain state dict
            (`.bin`, `.pt`, `.pth`) for the weights alone; `{step}` and `{epoch}` in it stand for the checkpoint's.
            Without them, a newer export replaces the older.
        every_n_checkpoints: write one after every N-th checkpoint directory that is saved in the fit, too.
        exclude_frozen_parameters: leave out the parameters that are not trained.
        max_shard_size: write a folder in the Hugging Face layout, of files of this size: in bytes, or as `"5GB"`.
        submodule: write this part of the module alone, under the names that it has by itself, such as `"model"`.
        dtype: of the parameters: `"bf16"` or `"fp16"` for deployment, where buffers keep their own; fp32 by default.
        weights_only: False to export a checkpoint during the fit whose hyper-parameters are objects of any class.

    Raises:
        ValueError: the path has another ending or placeholder, or is a directory; a number or dtype has no meaning.
        FileExistsError: with `max_shard_size`, the path is a folder that holds something else.
    """

    def __init__(
        self,
        path: PathOrUrl,
        *,
        every_n_checkpoints: int | None = None,
        exclude_frozen_parameters: bool = False,
        max_shard_size: int | str | None = None,
        submodule: str = "",
        dtype: str | torch.dtype | None = None,
        weights_only: bool = True,
    ) -> None:
        self.path = locate(path)
        self._max_shard_bytes = None if max_shard_size is None else parse_size(max_shard_size)
        endings = (".ckpt", ".safetensors", *PLAIN_STATE_DICTS)
        if self._max_shard_bytes is None and self.path.suffix not in endings:
            raise ValueError(
                f"Fp32Export writes {', '.join(endings)} files, or with max_shard_size a folder, not {str(path)!r}"
            )
        require_count("every_n_checkpoints", every_n_checkpoints)
        require_bool("exclude_frozen_parameters", exclude_frozen_parameters)
        require_bool("weights_only", weights_only)
        self.every_n_checkpoints = every_n_checkpoints
        self.weights_only = weights_only
        self._wanted = Wanted(
            exclude_frozen_parameters=exclude_frozen_parameters, dtype=parse_dtype(dtype), submodule=submodule
        )
        self._exports: BackgroundExport | None = None  # a process's own
        self._count = 0
        try:
            self._output(step=0, epoch=0)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} can't be filled in: {{step}} and {{epoch}} are all that it may hold ({error!r})"
            ) from None
        require_suitable(self._output(step=0, epoch=0), self._wanted, self._max_shard_bytes)

    def _output(self, *, step: int, epoch: int) -> Location:
        return absolute(locate(str(self.path).format(step=step, epoch=epoch)))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, ZeroStrategy):
            raise UnsupportedModelError(
                f"Fp32Export needs Trainer(strategy=ZeroStrategy()), not {type(strategy).__name__}; "
                "use trainer.save_checkpoint(path, weights_only=True) there"
            )
        self._exports = BackgroundExport()
        self._count = 0
        if stage == "fit":
            strategy.saves.require_writable(self._output(step=0, epoch=0).parent)
        if stage == "fit" and self.every_n_checkpoints is not None and strategy.is_global_zero:
            strategy.saves.listeners.append(self._after_save)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        part = self._wanted.submodule
        if part and not any(name.startswith(f"{part}.") for name in pl_module.state_dict()):
            parts = sorted(name for name, _ in pl_module.named_children())
            raise UnsupportedModelError(
                f"Fp32Export(submodule={part!r}): the module has no such part with tensors in it; it has {parts}"
            )

    def _after_save(self, directory: Location) -> None:
        """Called on rank 0 when a checkpoint is there, and before anything can remove it."""
        assert self._exports is not None
        assert self.every_n_checkpoints is not None
        self._count += 1
        if self._count % self.every_n_checkpoints == 0:
            self._exports.begin(directory, self._output_of, self._export_saved)

    def _output_of(self, manifest: Manifest) -> Location:
        return self._output(step=manifest.step, epoch=manifest.epoch)

    def _export_saved(self, directory: Location, output: Location) -> None:
        self._export(Checkpoint(directory, check_reads=True), output, None, weights_only=self.weights_only)

    def _export(self, saved: Checkpoint, output: Location, trainer: bytes | None, *, weights_only: bool) -> None:
        size = self._max_shard_bytes
        export(saved, output, self._wanted, max_shard_bytes=size, trainer=trainer, weights_only=weights_only)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Behind everybody's `on_train_end`, where averages are swapped in; and where nothing was left to train."""
        if getattr(trainer, "fast_dev_run", False):
            return
        assert isinstance(trainer.strategy, ZeroStrategy)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        output = self._output(step=checkpoint["global_step"], epoch=checkpoint["epoch"])

        def write(saved: Checkpoint, rest: dict[str, Any]) -> None:
            assert self._exports is not None
            self._exports.wait()  # an older one may be on its way to the same file
            trainer = _saved(rest) if is_lightnings(output, self._max_shard_bytes) else None
            # This process's own objects: there is nobody to mistrust
            self._export(saved, output, trainer, weights_only=False)
            self._exports.join()

        trainer.strategy.saves.export(checkpoint, output, write)
        rank_zero_info(f"the exported model is in {output}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for what was saved when training had ended (`save_last`)."""
        self._stop_listening(trainer)
        exports, self._exports = self._exports, None
        if exports is not None:
            exports.join()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_listening(trainer)

    def _stop_listening(self, trainer: Trainer) -> None:
        listeners = trainer.strategy.saves.listeners if isinstance(trainer.strategy, ZeroStrategy) else []
        if self._after_save in listeners:
            listeners.remove(self._after_save)


def _saved(content: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()
