"""What the pages of the documentation show is what comes out."""

import doctest
from pathlib import Path

import pytest

import nbnorm

DOCS = Path(__file__).parents[1] / "docs"
WRITTEN = [*DOCS.glob("*.rst"), *DOCS.glob("guide/*.rst")]  # the others are generated
PAGES = sorted(page for page in WRITTEN if ">>>" in page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page):
    """The examples on a page give what stands there."""
    failed, attempted = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert attempted
    assert not failed


def test_every_public_name_has_a_page():
    """The reference lists what the package exports."""
    listed = {line.strip() for line in (DOCS / "api.rst").read_text().splitlines() if line.startswith("   ")}
    assert set(nbnorm.__all__) <= listed
