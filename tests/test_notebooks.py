"""The notebooks show what their code computes, and run as they are, solutions included."""

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
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    folded = [solution for text in texts for solution in SOLUTION.findall(text)]
    return [code for solution in folded for code in PYTHON.findall(solution)]


def n_pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_there_are_notebooks_and_they_are_small():
    assert NOTEBOOKS
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 1_000_000


def test_each_was_run_from_its_first_cell_to_its_last_without_an_error_or_a_warning(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output.text for output in outputs if "Warning" in output.get("text", "")] == []


def test_none_tells_where_it_was_run(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)  # base64 has slashes too
    assert ABSOLUTE_PATH.findall(nbformat.writes(notebook)) == []


def test_each_ends_with_three_exercises_whose_solutions_are_folded_and_checked(notebook):
    headings = [i for i, cell in enumerate(notebook.cells) if re.match(r"#+ Exercises\b", cell.source)]
    exercises = notebook.cells[headings[-1] :]
    assert {cell.cell_type for cell in exercises} == {"markdown"}
    assert exercises[-1].source.endswith("</details>")
    assert len(SOLUTION.findall("\n".join(cell.source for cell in exercises))) == 3
    assert [bool(re.search(r"^ *assert ", code, re.MULTILINE)) for code in solutions(notebook)] == [True] * 3


@pytest.mark.slow
def test_each_runs_whole_with_its_solutions_and_without_network(notebook, monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # no start-up files of the user, and no history
    monkeypatch.delenv("MPLBACKEND", raising=False)  # so that the pictures are drawn into the notebook
    pictures = [n_pictures(cell) for cell in code_cells(notebook)]
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in solutions(notebook)]
    run = preprocessors.ExecutePreprocessor(timeout=300, kernel_name="python3")
    run.preprocess(notebook, {"metadata": {"path": str(ROOT / "notebooks")}})
    assert [n_pictures(cell) for cell in code_cells(notebook)][: len(pictures)] == pictures
