"""What the README and the docs name is there, and the README's Python runs."""

import pkgutil
import re

import pytest

from helpers.models import ROOT

PAGES = ("README.md", "dev/README.md", "docs/reliability.md", "docs/speed.md", "models/shakespeare/README.md")
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("tests/*.py")))


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "docs/reliability.md"])
def test_the_tests_that_a_page_names_are_there(page):
    names = re.findall(r"pytest [^`]*-k (\w+)`", read(page))
    if page.startswith("docs"):
        names = re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)`", read(page))
    assert len(names) >= 4
    assert [name for name in names if not re.search(rf"def test_\w*{name}", TESTS)] == []


@pytest.mark.parametrize("page", PAGES)
def test_the_files_and_scripts_that_a_page_names_are_there(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", read(page))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
    names = set(re.findall(r"\b\w[\w/]*\.py\b", read(page)))
    commands = set(re.findall(r"python (\S+\.py)\b", read(page)))
    assert [name for name in names if not ((ROOT / name).is_file() or list(ROOT.glob(f"*/{name}")))] == []
    assert [name for name in commands if not (ROOT / name).is_file()] == []


def test_the_functions_that_the_page_on_speed_names_are_there():
    pytest.importorskip("numba", reason="Numba is not installed")
    names = re.findall(r"\(`([\w.]+)(?<!\.py)`\)", read("docs/speed.md"))
    assert len(names) >= 4
    for name in names:
        pkgutil.resolve_name(name)  # raises if it is not there


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"^```python\n(.*?)^```$", read("README.md"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    bundled = {'"124M"': '"shakespeare"', "stride=512": "stride=128"}  # its context is shorter
    exec(re.sub("|".join(bundled), lambda found: bundled[found[0]], "\n".join(blocks)), {})
