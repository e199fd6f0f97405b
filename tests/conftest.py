"""What holds for every test."""

import os

import pytest
from hypothesis import settings

# A busy machine is no failure: nothing here is judged by the clock.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _same_environment():
    """What a test's Trainer or CLI leaves in it (a seed, ports) isn't handed down to the ranks of the next tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
