"""What a stage of dvc.yaml depends on: the code that it can reach, and nothing else."""

import re
import shutil

import pytest
from ruamel.yaml import YAML

from lib.runs import notebooks
from lib.runs.params import ROOT


def stages():
    """Stages of both pipelines: dictionary of name to its command and the texts in work/source that it depends on."""
    found = {}
    for file in ("dvc.yaml", "demonstration/dvc.yaml", "contest/dvc.yaml"):
        for name, stage in YAML(typ="safe").load((ROOT / file).read_text())["stages"].items():
            texts = [
                dep.removeprefix("work/source/") for dep in stage.get("deps", []) if dep.startswith("work/source/")
            ]
            found[name] = stage["cmd"], texts
    return found


COMMANDS = re.findall(r"lib\.\w+\.\w+", stages()["sources"][0].split("extract")[1])


@pytest.fixture
def copy(tmp_path):
    """A copy of lib and the notebooks; gives the function that extracts its texts, as a dictionary."""
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")

    def texts():
        notebooks.extract(tmp_path / "notebooks", tmp_path / "source", COMMANDS, tmp_path / "lib")
        return {file.name: file.read_text() for file in (tmp_path / "source").iterdir()}

    return tmp_path, texts


def stale(before, after):
    """Names of the stages that depend on a text that has changed."""
    changed = {name for name, text in after.items() if text != before[name]}
    return {name for name, (_, texts) in stages().items() if changed & set(texts)}


TRAINING = {"segmentation", "registration", "joint", "mean_teacher", "peers", "joint_plus", "cctr"}
OWN = {"own_data", "capacity", "volumes", "throughput"}
EVALUATED = {"evaluation", "grid", "contest_items", *OWN}
TRAINED = {*TRAINING, *EVALUATED, "figure2"}


@pytest.mark.parametrize(
    "module, reached",
    [
        ("losses.py", {"cohort", "contest_cohort", *TRAINED, "bench", "roofline"}),
        (
            "methods/mean_teacher.py",
            {"mean_teacher", "peers", "joint_plus", "cctr", *EVALUATED, "roofline"},
        ),
        ("methods/peers/joint_plus.py", {"peers", "joint_plus", *EVALUATED}),
        ("methods/cctr/contrast.py", {"cctr", *EVALUATED}),
        ("methods/classical.py", EVALUATED),
        ("methods/peers/rounds.py", {"peers", *EVALUATED}),
        ("cohorts/hippocampus.py", {"cohort", "contest_cohort"}),
        ("results/tables.py", {"table1", "contest_table", "roofline"}),
        ("results/figures/comparisons.py", {"table1"}),
        ("results/pages.py", {"pages"}),
        ("runs/bench.py", {"bench", "roofline"}),
        ("scans/reading/store.py", OWN),
        ("results/costs.py", set()),
    ],
)
def test_one_changed_line_makes_exactly_those_stages_stale_that_can_reach_it(copy, module, reached):
    folder, texts = copy
    before = texts()
    file = folder / "lib" / module
    file.write_text(file.read_text() + "\nCHANGED = 1\n")
    assert stale(before, texts()) == reached


def test_comments_docstrings_and_prose_make_nothing_stale(copy):
    folder, texts = copy
    before = texts()
    for file in (folder / "lib").rglob("*.py"):
        code = file.read_text()
        file.write_text(code.replace('"""', '"""Other words. ', 1) + "\n# a comment\n")
    book = folder / "notebooks" / "04_joint_training.ipynb"
    book.write_text(book.read_text().replace("Joint training", "Training together"))
    assert texts() == before


def test_a_changed_cell_makes_the_stages_of_its_notebook_stale(copy):
    folder, texts = copy
    before = texts()
    book = folder / "notebooks" / "04_joint_training.ipynb"
    book.write_text(book.read_text().replace("rounds.measured.round(3)", "rounds.measured.round(4)"))
    assert stale(before, texts()) == {"joint", "grid"}


def test_every_stage_that_runs_a_notebook_or_a_module_depends_on_its_text(copy):
    there = copy[1]().keys()
    for name, (command, texts) in stages().items():
        assert set(texts) <= there, name
        ran = re.search(r"(?:run\}?) (\d\d_\w+)|python -m (lib\.(?!runs\.notebooks)\w+\.\w+)", command)
        if ran and name not in ("fetch", "sources"):
            assert f"{ran[1] or ran[2]}.py" in texts, name


def test_imports_are_followed_through_packages_and_names_that_begin_in_plain_text(tmp_path):
    package = tmp_path / "lib"
    for name, code in {
        "__init__": "",
        "a": "from lib.deep import b",
        "deep/__init__": "from lib import c",
        "deep/b": "import json",
        "c": "",
        "late": 'from importlib import import_module\nimport_module(f"lib.deep.{1}")',
        "unused": "",
    }.items():
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    known = {name: file.read_text() for name, file in notebooks.modules(package).items()}
    graph = {name: notebooks.imported(code, known) for name, code in known.items()}
    reached = lambda code: notebooks.reached(code, known, graph)
    assert reached("import lib.a") == ["lib", "lib.a", "lib.c", "lib.deep", "lib.deep.b"]
    assert reached("import lib.late") == ["lib", "lib.c", "lib.deep", "lib.deep.b", "lib.late"]
