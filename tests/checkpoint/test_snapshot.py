"""The copy that a save behind training writes."""

import torch

from lightning_zero.checkpoint.content import RankContent, TensorToSave
from lightning_zero.checkpoint.snapshot import Snapshot


def content(numel: int) -> RankContent:
    """A tensor that grows from save to save, and others behind it."""
    tensors = [torch.full((size,), float(size)) for size in (numel, 7, 5)]
    items = [TensorToSave("model", f"p{place}", 0, len(tensor), tensor) for place, tensor in enumerate(tensors)]
    return RankContent(items, (), b"", 0)


def test_a_snapshot_holds_as_many_tensors_as_the_last_content_has() -> None:
    snapshot = Snapshot()
    snapshot.reserve(1 << 20, pinned=False)
    for numel in range(16, 400, 16):
        taken = snapshot.take(content(numel))
        assert [item.tensor.tolist() for item in taken.tensors] == [[float(size)] * size for size in (numel, 7, 5)]
        assert len(snapshot._places) == 3
    again = snapshot.take(content(numel))
    assert all(new.tensor is old.tensor for new, old in zip(again.tensors, taken.tensors, strict=True))
