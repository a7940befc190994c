"""`python -m lib.runs.notebooks run NAME -p KEY VALUE ...`: a notebook through papermill; and what stages depend on.

`extract` writes one text per notebook, with its code and that of every module of lib that it can reach by imports.
Comments, docstrings and prose are left out. A stage depends on the text of its notebook: only a change of code that the
stage can reach repeats it.
"""

import argparse
import ast
import io
import logging
import os
import tokenize
from pathlib import Path

import nbformat

from lib.runs.params import ROOT, parse, work_folder


def code_of(file):
    """The code cells of a notebook as one Python text."""
    cells = nbformat.read(file, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "code") + "\n"


def bare(code):
    """Python code without comments, docstrings and blank lines."""
    lines = code.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            start, end = node.body[0].lineno, node.body[0].end_lineno
            lines[start - 1 : end] = [""] * (end - start + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip()) + "\n"


def modules(folder):
    """Files of the modules of a package by their dotted names; ``folder`` is the package's."""
    names = {
        file: ".".join((folder.name, *file.relative_to(folder).with_suffix("").parts))
        for file in sorted(folder.rglob("*.py"))
    }
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def imported(code, known):
    """Names of modules that code imports, among ``known`` ones, with the packages that they are in.

    ``import_module`` with a name whose beginning is written out stands for all modules that begin so.
    """
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            found |= {module for module in known if module.startswith(name.value)}
    found |= {name[:end] for name in found if name for end in range(len(name)) if name[end] == "."}
    return found & known.keys()


def reached(code, known, graph):
    """Names of all modules that code can reach, sorted: those that it imports, those that they import, and so on.

    Args:
        known: see ``imported``; graph: dictionary of every known name to what its module imports.
    """
    found, new = set(), imported(code, known)
    while new:
        found |= new
        new = set().union(*(graph[name] for name in new)) - found
    return sorted(found)


def extract(source, target, commands=(), package=ROOT / "lib"):
    """Write the texts that stages depend on.

    Args:
        source: folder of the notebooks.
        target: folder for one text per notebook, and one per command.
        commands: modules that stages run by ``python -m``.
        package: folder of the modules that are followed.
    """
    target, known = Path(target), {name: file.read_text() for name, file in modules(Path(package)).items()}
    target.mkdir(parents=True, exist_ok=True)
    graph = {name: imported(code, known) for name, code in known.items()}
    parts = {name: f"# {name}\n{bare(code)}" for name, code in known.items()}
    texts = {file.stem: code_of(file) for file in sorted(Path(source).glob("*.ipynb"))}
    texts |= {name: f"import {name}\n" for name in commands}
    for name, code in texts.items():
        whole = [f"# this\n{bare(code)}", *(parts[module] for module in reached(code, known, graph))]
        (target / f"{name}.py").write_text("\n".join(whole))


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
    if os.environ.get("RANK", "0") != "0":  # of processes that train together each runs the notebook
        executed = executed.with_suffix(f".{os.environ['RANK']}.ipynb")
    executed.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb",
        executed,
        values,
        kernel_name="python3",
        progress_bar=False,
        log_output=True,
        autosave_cell_every=30,
        shutdown_kernel="immediate",  # all that it has done is on disk; a graceful end takes it two seconds
    )


def main():
    parser = argparse.ArgumentParser(prog="python -m lib.runs.notebooks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run a notebook through papermill")
    runs.add_argument("name", help="of the notebook, without .ipynb")
    runs.add_argument("-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), dest="values")
    runs.add_argument("--to", metavar="FILE", help="the executed copy; default work/notebooks/NAME-VALUES.ipynb")
    extracts = commands.add_parser("extract", help="write what stages depend on")
    extracts.add_argument("source")
    extracts.add_argument("target")
    extracts.add_argument("commands", nargs="*", help="modules that stages run, besides notebooks")
    given = parser.parse_args()
    if given.command == "run":
        run(given.name, {key: parse(value) for key, value in given.values}, given.to)
    else:
        extract(given.source, given.target, given.commands)


if __name__ == "__main__":
    main()
