"""What lies in the archives of a DCP directory: tensors, unread, in ranges of their elements; and objects, described.

A chunk (see [Note: DCP's layout] in `metadata`) has to be one range of its tensor's flattened elements: a run of rows,
as FSDP cuts. A chunk across the rows (tensor parallelism over columns) is as many ranges as it has rows, and a
checkpoint that lists millions of ranges is none that anybody wants: it is refused.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeAlias

from lightning_zero.checkpoint.elements import Elements
from lightning_zero.checkpoint.foreign import Piece
from lightning_zero.checkpoint.fsdp.metadata import METADATA_NAME, Chunk, Chunked, Leaf, Place
from lightning_zero.checkpoint.storage import Location, open_file
from lightning_zero.checkpoint.torch_file import Progress, describe_torch_file, part_of, unread_tensor
from lightning_zero.errors import CorruptCheckpointError, IncompleteCheckpointError, UnsupportedModelError
from lightning_zero.segments import Segment, SegmentIndex

Held: TypeAlias = "list[tuple[int, Piece]]"
"""Pieces, each with the rank that held it."""


class Archives:
    """The archives of one directory; its files are opened when something is read."""

    def __init__(self, directory: Location, progress: Progress, *, verify: bool) -> None:
        self.where = str(directory / METADATA_NAME)
        self._directory = directory
        self._progress = progress
        self._verify = verify
        self._open = lru_cache(maxsize=64)(open_file)  # with a thousand ranks there are more than may be open

    def value(self, name: str, leaf: Leaf) -> Any:
        """An object, in the terms of `pickled`; or a tensor that isn't cut.

        Raises:
            UnsupportedModelError: it is cut.
        """
        if isinstance(leaf, Place):
            return self._describe(leaf)
        if len(leaf.chunks) != 1 or leaf.chunks[0].sizes != leaf.shape:
            raise UnsupportedModelError(f"{self.where}: {name!r:.200} of shape {leaf.shape!s:.80} is cut over ranks")
        return self._chunk(name, leaf, leaf.chunks[0])

    def pieces(self, name: str, tensor: Chunked, state: str | None = None, optimizer: int = 0) -> Held:
        """The ranges that a tensor is cut into; every element is in one.

        Args:
            name: of the entry that it is, or is a state of.
            tensor: to be read.
            state: which one it is.
            optimizer: whose.

        Raises:
            UnsupportedModelError: a chunk is no range.
            IncompleteCheckpointError: a part of it is missing.
            CorruptCheckpointError: two chunks overlap, or an archive holds something else.
        """
        what = f"{state} of {name}" if state else name
        found = []
        for chunk in tensor.chunks:
            # Behind the last dimension that it hasn't whole, all elements are its own; before, there may be but one row
            cut = max((at for at, size in enumerate(chunk.sizes) if size != tensor.shape[at]), default=0)
            if math.prod(chunk.sizes[:cut]) != 1:
                raise UnsupportedModelError(
                    f"{self.where}: {what!r:.200} of shape {tensor.shape!s:.80} is cut along dimension {cut} (tensor "
                    "parallelism); only what is cut into rows can be imported. Load it into a model that FSDP alone "
                    "cuts, and save that"
                )
            begin = sum(offset * math.prod(tensor.shape[at + 1 :]) for at, offset in enumerate(chunk.offsets))
            found.append((Segment(what, begin, begin + math.prod(chunk.sizes)), chunk))
        try:
            SegmentIndex(found).check_cover(what, tensor.numel)
        except (CorruptCheckpointError, IncompleteCheckpointError) as error:
            raise type(error)(f"{self.where}: {error}") from None
        pieces = []
        for segment, chunk in found:
            elements = part_of(self._chunk(what, tensor, chunk), 0, segment.numel)
            pieces.append((chunk.place.rank, Piece(replace(segment, name=name), elements, state, optimizer)))
        return pieces

    def _chunk(self, what: str, tensor: Chunked, chunk: Chunk) -> Elements:
        where = f"{self._directory / chunk.place.file}: {what!r:.200}"
        found = unread_tensor(self._describe(chunk.place), where)
        if (found.shape, found.stored) != (chunk.sizes, tensor.code):
            raise CorruptCheckpointError(
                f"{where} is a tensor of shape {found.shape!s:.80} in {found.stored}, and {METADATA_NAME} says "
                f"{chunk.sizes!s:.80} in {tensor.code}: the files are of different saves"
            )
        return found

    def _describe(self, place: Place) -> Any:
        path, within = self._directory / place.file, (place.begin, place.end)
        return describe_torch_file(path, self._open, self._progress, verify=self._verify, within=within).value
