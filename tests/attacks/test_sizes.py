"""Sizes that nothing has: what a manifest claims is not allocated, nor read, before the files are known to hold it."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.entrances import enter_all, refused_everywhere
from tests.attacks.forge import Edit, Json, edit_manifest, read_json, replace, sparse

SPARE_BYTES = 1 << 30


@pytest.fixture(autouse=True)
def _no_memory_to_waste() -> Iterator[None]:
    """An allocation of what is claimed fails, and fails the test, on every machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def grow_rank_state(nbytes: int) -> Edit:
    def edit(manifest: Json) -> None:
        file = manifest["files"][1]
        stored = file["tensors"][-1]
        stored.update(nbytes=nbytes, shape=[nbytes], stop=nbytes)
        file.update(nbytes=stored["offset"] + nbytes)

    return edit


def add_entry(numel: int, *, code: str = "I8", dtype: str = "int8", item_bytes: int = 1) -> Edit:
    """One more entry, behind everything else in the last shard."""

    def edit(manifest: Json) -> None:
        file = manifest["files"][1]
        manifest["entries"].append({"name": "huge", "shape": [numel], "dtype": dtype, "role": "buffer"})
        place = {"offset": file["nbytes"], "nbytes": numel * item_bytes, "xxh3": "0" * 16}
        file["tensors"].append(
            {"kind": "model", "name": "huge", "start": 0, "stop": numel, "dtype": code, "shape": [numel], **place}
        )
        file["nbytes"] += numel * item_bytes

    return edit


def add_state(numel: int, **more: object) -> Edit:
    def edit(manifest: Json) -> None:
        file = manifest["files"][1]
        name = next(item["name"] for item in manifest["files"][0]["tensors"] if item["kind"] == "optimizer")
        stop = next(entry["shape"][0] * entry["shape"][1] for entry in manifest["entries"] if entry["name"] == name)
        place = {"offset": file["nbytes"], "nbytes": numel, "xxh3": "0" * 16, "optimizer": 0, "state": "huge"}
        state = {"kind": "optimizer", "name": name, "start": 0, "stop": stop, "dtype": "I8", "shape": [numel], **place}
        file["tensors"].append(state | more)
        file["nbytes"] += numel

    return edit


def grow_header(nbytes: int) -> Edit:
    def edit(manifest: Json) -> None:
        for file in manifest["files"]:
            more = nbytes - file["header_nbytes"]
            file.update(nbytes=file["nbytes"] + more, header_nbytes=nbytes)
            for item in file["tensors"]:
                item["offset"] += more

    return edit


CLAIMS: dict[str, Edit] = {
    **{f"trainer.pt of {n} bytes": lambda m, n=n: m["trainer"].update(nbytes=n) for n in (0, 2**33, 2**62, 2**63 - 1)},
    **{f"a rank's own state of {n} bytes": grow_rank_state(n) for n in (2**33, 2**40, 2**62)},
    **{f"a tensor of {n} bytes": add_entry(n) for n in (2**33, 2**40, 2**62)},
    "a tensor that doesn't fit in 64 bits as fp32": add_entry(2**61 - 1, code="BF16", dtype="bfloat16", item_bytes=2),
    **{f"a whole state of {n} bytes": add_state(n) for n in (2**33, 2**40, 2**62)},
    "an element-wise state of an unknown parameter, huge": add_state(2**40, name="x", stop=2**40),
    **{f"a header of {n} bytes": grow_header(n) for n in (2**33, 2**40, 2**62)},
}


@pytest.mark.parametrize("what", CLAIMS)
def test_a_claim_is_refused_and_not_allocated_of(what: str, tag: Path) -> None:
    edit_manifest(tag, CLAIMS[what])
    outcomes = enter_all(tag)
    del outcomes["Checkpoint(verify='none')"]  # it may not meet the lie; then it makes no room for it either
    assert all(outcomes.values()), [name for name, error in outcomes.items() if error is None]


def test_a_manifest_of_a_terabyte_of_zeros_is_refused_unread(tag: Path) -> None:
    sparse(tag / "manifest.json", 2**40)
    refused_everywhere(tag)


def test_a_trainer_file_of_a_terabyte_of_zeros_is_refused_unread(tag: Path) -> None:
    sparse(tag / "trainer.pt", 2**40)
    refused_everywhere(tag)
    edit_manifest(tag, lambda manifest: manifest["trainer"].update(nbytes=2**40))
    refused_everywhere(tag)


def test_a_shard_whose_header_is_a_terabyte_of_zeros_is_refused_unread(tag: Path) -> None:
    edit_manifest(tag, grow_header(2**40))
    for file in read_json(tag)["files"]:
        sparse(tag / file["name"], file["nbytes"])
    refused_everywhere(tag)


def test_a_file_that_grew_is_refused(tag: Path) -> None:
    for name in ("trainer.pt", "rank-00000-of-00002.safetensors"):
        whole = (tag / name).read_bytes()
        replace(tag / name, whole + b"\0")
        outcomes = enter_all(tag)
        outcomes.pop("Checkpoint(verify='none')")  # believes the manifest
        assert all(outcomes.values())
        replace(tag / name, whole)
