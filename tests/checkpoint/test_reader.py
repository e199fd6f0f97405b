"""A reader from docs/format.md alone, with json, numpy and a checksum: nothing of ours, and no torch."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from tests.checkpoint.sample import Sample

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?", "BF16": "<u2"}


def read(save_dir: Path) -> dict[str, np.ndarray]:
    """The model of the newest checkpoint, by what the page says."""
    tag = save_dir / (save_dir / "latest").read_text().strip()
    content = (tag / "manifest.json").read_bytes()
    body, seal = content.rsplit(b',\n"manifest_xxh3": "', 1)
    assert seal == xxhash.xxh3_64_hexdigest(body).encode() + b'"\n}\n'
    manifest = json.loads(content)
    assert manifest["format_version"] == 1
    pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
    for file in manifest["files"]:
        data = (tag / file["name"]).read_bytes()
        assert len(data) == file["nbytes"]
        assert xxhash.xxh3_64_hexdigest(data[: file["header_nbytes"]]) == file["header_xxh3"]
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert 8 + length == file["header_nbytes"]
        end = file["header_nbytes"]
        for tensor in file["tensors"]:
            assert tensor["offset"] == end
            end += tensor["nbytes"]
            raw = data[tensor["offset"] : end]
            assert xxhash.xxh3_64_hexdigest(raw) == tensor["xxh3"]
            if tensor["kind"] == "model":
                key = f"model/{tensor['name']}[{tensor['start']}:{tensor['stop']}]"
                assert header[key]["data_offsets"] == [
                    tensor["offset"] - file["header_nbytes"],
                    end - file["header_nbytes"],
                ]
                array = np.frombuffer(raw, DTYPES[tensor["dtype"]])
                pieces.setdefault(tensor["name"], []).append((tensor["start"], array))
        assert end == len(data)
    model = {}
    for entry in (entry for entry in manifest["entries"] if entry["role"] != "elsewhere"):
        found = [array for _, array in sorted(pieces.get(entry["name"], []), key=lambda piece: piece[0])]
        flat = np.concatenate(found) if found else np.zeros(0, "<f4")
        assert flat.size == math.prod(entry["shape"])
        model[entry["name"]] = flat.reshape(entry["shape"])
    return model | {alias: model[stored] for alias, stored in manifest["aliases"].items()}


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_reader_can_be_written_from_the_page_on_the_format(tmp_path: Path, world_size: int) -> None:
    sample = Sample(world_size=world_size)
    sample.save(tmp_path / "tag")
    model = read(tmp_path)
    assert model.keys() == sample.state_dict.keys()
    for name, tensor in sample.state_dict.items():
        expected = tensor.view(tensor.dtype if tensor.dtype.itemsize != 2 else torch.uint16).numpy()
        assert np.array_equal(model[name], expected), name
