"""`make test-oldest` tests what pyproject.toml promises."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def bounds(text: str, operator: str) -> dict[str, tuple[int, ...]]:
    """Numbers of versions by package, without the noughts at their end."""
    found = re.findall(rf"([\w-]+)(?:\[\w+\])?{operator}([\d.]+)", text)
    return {name: tuple(map(int, re.sub(r"(\.0)+$", "", version).split("."))) for name, version in found}


def test_the_oldest_set_is_that_of_the_lower_bounds() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    pinned = bounds((ROOT / "tests" / "oldest.txt").read_text(), "==")
    promised = bounds(project, ">=")
    needed = bounds(project[project.index("\ndependencies") : project.index("[project.optional-dependencies]")], ">=")
    assert needed.keys() - pinned.keys() == {"typing-extensions"}
    for name in promised.keys() & pinned.keys():
        assert pinned[name] == promised[name], name
