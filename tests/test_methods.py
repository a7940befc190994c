"""The table of methods: what stands in it is evaluated, tabulated, drawn and run by the grid, and nothing else is."""

import sys
from types import ModuleType

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgba
from test_training import made_up_cohort

from lib.methods import table
from lib.methods.experiment import Experiment, Prediction
from lib.methods.pretraining import pretrain_segmentation
from lib.results import evaluation, grid, tables
from lib.results.figures import comparisons
from lib.results.statistics import average_classes
from lib.runs import params

NAME, NOTEBOOK, COLOUR = "made up", "12_made_up", "#123456"


def add_a_method(patch, **changes):
    """A method of a module of its own, that the paper's recipe runs: its masks are the true ones."""
    module = ModuleType("lib.methods.made_up")
    module.predict = lambda experiment, index: {NAME: Prediction(0, experiment.data.masks[index])}
    patch.setitem(sys.modules, module.__name__, module)
    stage = table.Stage(
        "made_up",
        "made_up",
        NOTEBOOK,
        sections=("made_up",),
        version="first",
        recipes=("paper",),
    )
    method = table.Method(NAME, stage._replace(**changes), COLOUR, "the truth", in_reliability=True)
    patch.setattr(table, "METHODS", (*table.METHODS, method))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The baseline and a made-up method, evaluated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOINT_OUTPUT", str(tmp_path_factory.mktemp("methods")))
        settings = params.load("paper")
        made_up_cohort().save(params.cohort_file(settings))
        trial = Experiment(settings)
        pretrain_segmentation(trial)
        add_a_method(patch)
        assert set(evaluation.evaluate(trial).per_image["method"]) == {"fs"}  # it has not been trained
        trial.cabinet.save({}, "made_up")
        return trial, evaluation.evaluate(trial)


@pytest.fixture
def listed(monkeypatch):
    """The made-up method stands in the table."""
    add_a_method(monkeypatch)


def test_a_method_more_is_evaluated_and_costs_stand_in_no_results(evaluated):
    trial, found = evaluated
    rows = found.per_image[found.per_image["method"] == NAME]
    assert len(rows) == len(trial.cohort.index("test")) and (rows["dsc"] == 1).all() and (rows["hd"] == 0).all()
    assert set(found.masks) == {"fs", NAME} == set(found.reliability["method"])
    assert not {"seconds", "device", "train_seconds"} & {*found.per_image, *found.reliability}


def test_it_has_its_row_its_tests_and_its_place_in_table_1(evaluated, listed):
    averaged = average_classes(evaluated[1].per_image)
    compared = tables.compare(averaged)
    assert {*zip(compared["method"], compared["reference"])} == {(NAME, "fs")}
    table1 = tables.table1(averaged, compared)
    overall = table1[(table1["seed"] == "all") & (table1["class"] == "mean")]
    assert overall["method"].tolist() == ["fs", NAME] and overall["dsc_mean"].iloc[1] == 1
    assert overall["p_fs"].notna().tolist() == [False, True]
    assert f"| {NAME} " in tables.markdown(table1) and not {"seconds", "device", "train_seconds"} & {*table1}
    assert NAME in tables.summary(table1) and NAME in tables.in_words(compared)


def test_every_figure_of_methods_draws_it_in_its_colour(evaluated, listed):
    averaged = average_classes(evaluated[1].per_image)
    table1 = tables.table1(averaged, tables.compare(averaged))
    mean = averaged[averaged["class"] == "mean"]
    upper = comparisons.score_boxes(mean).axes[0]
    assert [tick.get_text() for tick in upper.get_xticklabels()] == ["fs", NAME]
    assert upper.patches[1].get_facecolor() == to_rgba(COLOUR)
    for figure in (comparisons.label_efficiency(table1), comparisons.reliability(evaluated[1].reliability, mean)):
        (line,) = [line for line in figure.axes[0].get_lines() if line.get_label() == NAME]
        assert line.get_color() == COLOUR
        labels = [
            text.get_text()
            for legend in (*figure.legends, figure.axes[0].get_legend())
            if legend
            for text in legend.get_texts()
        ]
        assert labels == ["fs", NAME]
    plt.close("all")


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    return params.load()


ITEMS = [
    grid.Item("paper", 10, 2),
    grid.Item("strong", 10, 2, "", "bcp"),
    grid.Item("strong", 1, 2, "with contrast", "cctr"),
]


def test_the_grid_runs_its_notebook_where_it_runs(settings, monkeypatch):
    before = [grid.notebooks_of(item) for item in ITEMS]
    add_a_method(monkeypatch)
    after = [grid.notebooks_of(item) for item in ITEMS]
    assert after[0] == [*before[0][:-1], NOTEBOOK, before[0][-1]] and after[1:] == before[1:]


def test_an_items_key_names_the_code_and_the_settings_of_its_own_stage(settings, monkeypatch):
    load = params.load

    def keys(version, strength):
        with pytest.MonkeyPatch.context() as patch:
            add_a_method(patch, version=version, recipes=("strong",))
            more = {"made_up": params.Section(strength=strength)}
            patch.setattr(grid.params, "load", lambda *a, **k: params.Section({**load(*a, **k), **more}))
            return [grid.key_of(item, settings) for item in [*ITEMS, grid.Item("strong", 10, 2, "", "made_up")]]

    before = [grid.key_of(item, settings) for item in ITEMS]
    found = [keys("first", 1), keys("first", 2), keys("second", 2)]
    assert all(mine[:-1] == before for mine in found) and len({mine[-1] for mine in found}) == 3


def test_every_stage_has_its_module_and_every_comparison_its_method():
    names = table.by_name()
    assert len(names) == len(table.METHODS) and len({method.colour for method in table.METHODS}) == len(names)
    for method in table.METHODS:
        assert set(method.compared_with) <= set(names)
        for recipe in method.stage.recipes:
            assert callable(evaluation.module_of(method.stage, recipe).predict)
        assert hasattr(evaluation.module_of(method.stage, "paper"), "rounds") or not method.stage.rounds
    books = {file.stem for file in (params.ROOT / "notebooks").glob("*.ipynb")}
    assert {stage.notebook for trained in (True, False) for stage in table.stages(trained)} <= books
