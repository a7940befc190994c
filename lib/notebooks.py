"""`python -m lib.notebooks run NAME -p KEY VALUE ...`: a notebook through papermill; what the pipeline depends on.

The pipeline depends on the code cells of the notebooks instead of the notebooks themselves (`extract`): opening a
notebook, running it or editing its prose changes the file; only a change of its code repeats a stage.
"""

import argparse
import logging
from pathlib import Path

import nbformat

from lib.params import ROOT, parse, work_folder


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


def run(name, values, executed=None):
    """Run ``notebooks/<name>.ipynb`` with ``values`` in the place of its parameters.

    Args:
        executed: where the executed copy goes; None for ``work/notebooks/<name>-<values>.ipynb``. It is written
            while the notebook runs and, where a cell fails, holds its traceback.

    Raises:
        papermill.PapermillExecutionError: a cell failed.
    """
    from papermill import execute_notebook

    executed = Path(executed or work_folder("notebooks", "-".join([name, *map(str, values.values())]) + ".ipynb"))
    executed.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb", executed, values, kernel_name="python3", progress_bar=False,
        log_output=True, autosave_cell_every=30,
        shutdown_kernel="immediate",  # all that it has done is on disk; a graceful end takes it two seconds
    )


def main():
    parser = argparse.ArgumentParser(prog="python -m lib.notebooks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run a notebook through papermill")
    runs.add_argument("name", help="of the notebook, without .ipynb")
    runs.add_argument("-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), dest="values")
    runs.add_argument("--to", metavar="FILE", help="the executed copy; default work/notebooks/NAME-VALUES.ipynb")
    extracts = commands.add_parser("extract", help="write the code cells of all notebooks")
    extracts.add_argument("source")
    extracts.add_argument("target")
    given = parser.parse_args()
    if given.command == "run":
        run(given.name, {key: parse(value) for key, value in given.values}, given.to)
    else:
        extract(given.source, given.target)


if __name__ == "__main__":
    main()
