"""What the README and docs say of the tests is so."""

import re

import pytest

from helpers import ROOT

TESTS = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("tests/*.py")))


@pytest.mark.parametrize("page", ["README.md", "docs/reliability.md"])
def test_the_tests_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = re.findall(r"pytest [^`]*-k (\w+)`", text)
    if page.startswith("docs"):
        names = re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)`", text)
    assert len(names) >= 4
    assert [name for name in names if not re.search(rf"def test_\w*{name}", TESTS)] == []


@pytest.mark.parametrize("page", ["README.md", "docs/reliability.md", "docs/speed.md"])
def test_the_files_that_a_page_leads_to_are_there(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
