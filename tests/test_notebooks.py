import subprocess
import sys

import nbformat
import papermill
import pytest

from lib.runs import notebooks, params


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    cells = [
        nbformat.v4.new_code_cell("number = None\nword = None", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print(word, 10 / number)"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / "example.ipynb")
    return tmp_path


def printed(file):
    return [
        output.text
        for cell in nbformat.read(file, 4).cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    ]


def test_a_notebook_runs_with_the_values_that_it_is_given(folder):
    notebooks.run("example", {"number": 4, "word": "a b"})
    assert printed(folder / "work" / "notebooks" / "example-4-a b.ipynb") == ["a b 2.5\n"]
    notebooks.run("example", {"number": 5}, folder / "elsewhere" / "copy.ipynb")
    assert printed(folder / "elsewhere" / "copy.ipynb") == ["None 2.0\n"]


def test_a_failing_cell_is_an_error_and_the_copy_holds_its_traceback(folder):
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        notebooks.run("example", {"number": 0}, folder / "copy.ipynb")
    assert "ZeroDivisionError" in (folder / "copy.ipynb").read_text()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("lib.runs.notebooks", "torch"), ("lib.methods.experiment", "nibabel"), ("lib.methods.experiment", "SimpleITK")],
)
def test_a_stage_does_not_wait_for_packages_that_it_does_not_use(module, heavy):
    """torch takes a second, and papermill's own process needs none of it."""
    code = f"import sys, {module}; sys.exit('{heavy}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=params.ROOT, check=False).returncode == 0
