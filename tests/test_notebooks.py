"""The notebooks show what their code computes, and all of it runs, the solutions included."""

import re

import pytest

from helpers.models import ROOT

nbformat, preprocessors, *_ = (
    pytest.importorskip(name) for name in ("nbformat", "nbconvert.preprocessors", "ipykernel", "matplotlib")
)

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTION = re.compile(r"<details><summary>Solution</summary>\n\n(.*?)\n</details>", re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/\w+/|file:/|\\Users\b")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def solutions(notebook):
    """The code of each folded solution."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return ["".join(PYTHON.findall(solution)) for solution in SOLUTION.findall(text)]


def n_pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_notebooks_are_small():
    assert NOTEBOOKS
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 1_000_000


def test_all_cells_were_run_in_order_without_errors_or_warnings(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output.text for output in outputs if "Warning" in output.get("text", "")] == []


def test_no_path_of_the_machine_is_shown(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)  # base64 has slashes, too
    assert ABSOLUTE_PATH.findall(nbformat.writes(notebook)) == []


def test_three_exercises_with_folded_and_checked_solutions_come_last(notebook):
    headings = [i for i, cell in enumerate(notebook.cells) if re.match(r"#+ Exercises\b", cell.source)]
    exercises = notebook.cells[headings[-1] :]
    assert {cell.cell_type for cell in exercises} == {"markdown"}
    assert exercises[-1].source.endswith("</details>")
    assert [bool(re.search(r"^ *assert ", code, re.MULTILINE)) for code in solutions(notebook)] == [True] * 3


@pytest.mark.slow
def test_each_notebook_and_its_solutions_run_without_network(notebook, monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # without the user's start-up files and history
    monkeypatch.delenv("MPLBACKEND", raising=False)  # so that pictures are drawn into the notebook
    pictures = [n_pictures(cell) for cell in code_cells(notebook)]
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in solutions(notebook)]
    run = preprocessors.ExecutePreprocessor(timeout=300, kernel_name="python3")
    run.preprocess(notebook, {"metadata": {"path": str(ROOT / "notebooks")}})
    assert [n_pictures(cell) for cell in code_cells(notebook)][: len(pictures)] == pictures
