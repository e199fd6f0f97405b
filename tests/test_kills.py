"""The short form of `python -m benchmarks.kills`: a training that is killed again and again, at random moments."""

import random
from pathlib import Path

import pytest

import tests.launch  # noqa: F401  (says what the server of all ranks has imported)
from benchmarks.kills.chain import kills


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_whenever_a_training_is_killed_the_next_run_goes_on_where_latest_says(tmp_path: Path, mode: str) -> None:
    found = list(kills(tmp_path, mode, 6, random.Random(4), length=3))
    assert len(found) == 6
    assert not [kill for kill in found if kill.problems]
    assert any(kill.resumed_at for kill in found)
