"""Whether a pickle runs code when it is loaded, and its content where it doesn't, or where that is wanted: by torch."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

import torch

from lightning_zero.checkpoint.torch_file import read_torch_file, require_dict
from lightning_zero.errors import CorruptCheckpointError, UntrustedContentError


def require_allowed(content: bytes, described: bytes, where: str, *, unusual: bool) -> None:
    """Raise unless torch allows, or was told to allow, every name in a pickle.

    Args:
        content: what `torch.save` put out.
        described: the pickle in it.
        where: for the message.
        unusual: see `Pickled`; then torch is to load it.

    Raises:
        UntrustedContentError: it doesn't allow one.
        CorruptCheckpointError: it can't read the pickle.
    """
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:  # just that pickle, whatever else torch might find in the file
        archive.writestr("archive/data.pkl", described)
        archive.writestr("archive/version", b"3\n")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(stream.getvalue()))
    except Exception as error:
        raise _corrupt(where, error) from error
    if names:
        raise _untrusted(where, sorted(names))
    if unusual:
        _load(content, where)


def unpickle(content: bytes, where: str, weights_only: bool) -> dict[Any, Any]:
    """The dict that `torch.save` put into `content`.

    Args:
        content: its checksum says that it is what was written, and not who wrote it.
        where: for the messages.
        weights_only: refuse whatever would run code.

    Raises:
        UntrustedContentError: there is such a thing in it.
        CorruptCheckpointError: it is something else.
    """
    if not weights_only:  # the file is trusted: what its classes raise is for whoever wrote them
        return require_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=False), where)
    # Looked through first: torch.load's own message about a name that is a megabyte long takes it hours
    read_torch_file(content, where, weights_only=True)
    return require_dict(_load(content, where), where)


def _load(content: bytes, where: str) -> object:
    try:
        loaded: object = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _untrusted(where, ["an unknown class"]) from error
    except Exception as error:
        raise _corrupt(where, error) from error
    return loaded


def _untrusted(where: str, offending: list[str]) -> UntrustedContentError:
    # Each fit to be shown, whoever made it up
    shown = ", ".join(f"{name if name.isprintable() else ascii(name):.100}" for name in offending[:10])
    return UntrustedContentError(
        f"{where} holds objects of {shown}: in the hyper-parameters, a callback's state, client state or the like. "
        "If you trust whoever wrote it, pass weights_only=False (Trainer.fit takes it too; `lightning-zero export`: "
        "--unsafe): whatever loads it then runs what the file says"
    )


def _corrupt(where: str, error: Exception) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{where} can't be read: {type(error).__name__}, {str(error)!r:.200}")
