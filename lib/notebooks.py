"""The code cells of the notebooks, on which the pipeline depends instead of the notebooks themselves.

Opening a notebook, running it or editing its prose changes the file; only a change of its code repeats a stage.
"""

import sys
from pathlib import Path

import nbformat


def code_of(file):
    """The code cells of a notebook as one Python text."""
    cells = nbformat.read(file, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "code") + "\n"


def extract(source, target):
    """Write the code of every notebook in folder ``source`` to folder ``target``."""
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(Path(source).glob("*.ipynb")):
        (target / f"{file.stem}.py").write_text(code_of(file))


if __name__ == "__main__":
    extract(*sys.argv[1:])
