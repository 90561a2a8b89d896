"""docs/reliability.md names tests that exist."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAMED = re.findall(
    r"`(test_\w+\.py)(?:::(\w+))?`( †)?", (HERE.parent / "docs" / "reliability.md").read_text()
)
ON_DEMAND = re.compile(
    r"@pytest\.mark\.(processes|fuzz|large)\b|^pytestmark = pytest\.mark\.large", re.MULTILINE
)


@pytest.mark.parametrize(("file", "test", "dagger"), sorted(set(NAMED)))
def test_named_tests_exist(file, test, dagger):
    """Every test of the tables, with the sign of those that run on demand."""
    source = (HERE / file).read_text()
    if test:
        found = re.search(rf"((?:^@.*\n(?:^[ )\]].*\n)*)*)^def {test}\(", source, re.MULTILINE)
        assert found, f"{file} has no {test}"
        on_demand = ON_DEMAND.search(found[1]) or re.search(r"^pytestmark = .*large", source, re.MULTILINE)
        assert bool(on_demand) == bool(dagger) or "param(16" in found[1]


def test_there_are_tables():
    """The pattern above finds them."""
    assert len(NAMED) > 80
