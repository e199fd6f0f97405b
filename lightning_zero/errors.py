"""The exceptions: one small family, so that `except ZeroError` catches everything this package raises on purpose.

A message says what is wrong, where (file, tensor, rank), and what to do about it.
"""

from pickle import UnpicklingError


class ZeroError(Exception):
    """Base class of every error that lightning_zero raises on purpose."""


class CheckpointNotFoundError(ZeroError, FileNotFoundError):
    """The checkpoint, or the tag that was asked for, is not there."""


class IncompleteCheckpointError(ZeroError):
    """A checkpoint lacks something that it needs: its manifest, a shard, or a part of a tensor."""


class CorruptCheckpointError(ZeroError):
    """A checkpoint's bytes are not the ones that were written, or its manifest contradicts itself."""


class CheckpointMismatchError(ZeroError):
    """A sound checkpoint that doesn't fit the model, the optimizer or the partition it is loaded into."""


class CheckpointWriteError(ZeroError):
    """A checkpoint could not be written. Every rank raises it, and it names the rank that failed."""


class TagMismatchError(ZeroError):
    """The ranks were asked to save, or to load, different tags or different steps."""


class UnreachableRankError(ZeroError):
    """The other ranks didn't come to what all of them have to do together, within the time-out."""


class UnsupportedModelError(ZeroError, ValueError):
    """A model, an optimizer or a setting that ZeRO can't train; the message says why, and the way out."""


class UntrustedContentError(ZeroError, UnpicklingError):
    """A checkpoint holds objects that are only loaded on request, with `weights_only=False`."""
