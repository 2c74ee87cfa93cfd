"""What the README and the docs name exists, and their Python and their commands run."""

import os
import pkgutil
import re
import subprocess
import sys

import pytest

from helpers.models import ROOT

PATHS = [*ROOT.glob("*.md"), ROOT / "models/shakespeare/README.md", *ROOT.glob("d*/*.md")]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
BLOCKS = {page: re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) for page, text in PAGES.items()}
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("tests/*.py")))
every_page = pytest.mark.parametrize("page", PAGES)


@every_page
def test_named_tests_exist(page):
    rows = re.findall(r"^\|.*\|(.*)\|$", PAGES[page], re.MULTILINE) if "reliability" in page else []
    names = re.findall(r"pytest [^`\n]*-k ([a-z]\w+)", PAGES[page]) + re.findall(r"`(\w+)`", "".join(rows))
    assert len(names) >= len(rows)
    assert [name for name in names if not re.search(rf"def test_\w*{name}", TESTS)] == []


@every_page
def test_named_files_scripts_and_flags_exist(page):
    text = PAGES[page]
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
    names = set(re.findall(r"\b(?:\w[\w/]*\.(?:py|npz)|requirements[\w-]*\.txt)\b", text))
    assert [name for name in names if not ((ROOT / name).is_file() or list(ROOT.glob(f"*/{name}")))] == []
    for script, arguments in re.findall(r"python (\w[\w/]*\.py)\b([^`\n#]*)", text):
        source = "".join((ROOT / path).read_text(encoding="utf-8") for path in (script, "show/cli.py"))
        assert [flag for flag in re.findall(r"--\w+", arguments) if flag not in source] == [], script


def test_named_functions_exist():
    pytest.importorskip("numba", reason="Numba is not installed")
    names = re.findall(r"\(`([\w.]+)(?<!\.py)`\)", PAGES["docs/speed.md"])
    assert len(names) >= 4
    for name in names:
        pkgutil.resolve_name(name)  # raises if it does not exist


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks])
def test_python_blocks_run(page):
    exec("\n".join(BLOCKS[page]).replace('"124M"', '"shakespeare"'), {})


@pytest.mark.slow
def test_commands_run_with_the_bundled_model(tmp_path):
    for path in (*ROOT.glob("*.py"), ROOT / "LICENSE", ROOT / "models"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "text.txt").write_text("To be, or not to be", encoding="utf-8")
    pattern = r"^    ((?:(?:cat|echo) .*|)python (?!train).* shakespeare\b.*)$"
    for command in dict.fromkeys(re.findall(pattern, "\n".join(PAGES.values()), re.MULTILINE)):
        command = re.sub(r"\bpython\b", sys.executable, command)
        subprocess.run(command, shell=True, check=True, cwd=tmp_path, env={**os.environ, "GPT2_OFFLINE": "1"})
