import re

import nbformat
import pytest
import torch

from lib import compute
from lib.runs import notebooks, params


def test_overrides_reach_the_setting(monkeypatch):
    monkeypatch.setenv("JOINT_SET", "scale=cpu,scales.cpu.joint.rounds=9,seed=7")
    settings = params.load()
    assert settings.joint.rounds == 9 and settings.seed == 7


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("cohort=brain", "cohort 'brain'.*midbrain, hippocampus"),
        ("scale=best", "scale 'best'"),
        ("scale=huge", "scale 'huge'"),
        ("rate=0", "rate 0"),
        ("sed=1", "'sed' is not a setting"),
        ("joint.rouns=1", "'joint' is not a setting|'rouns' is not a setting"),
        ("rate=abc", "rate 'abc' is not of the kind"),
        ("precision=half", "precision 'half'.*auto, bfloat16"),
        ("folder.size=big", "size 'big'.*has: size: 128"),
        ("folder.size=0", "folder.size 0"),
        ("folder.axis=3", "folder.axis 3"),
        ("folder.method=unimatch", "auto, fs.elastic, bcp, joint"),
        ("folder.review=high", "review 'high'"),
        ("strong.bcp.one_piece=7", "one_piece '7'"),
        ("strong.selection=test", "selection 'test'"),
    ],
)
def test_unknown_settings_and_values_are_errors(monkeypatch, assignment, words):
    monkeypatch.setenv("JOINT_SET", assignment)
    with pytest.raises(ValueError, match=words):
        params.load()


@pytest.mark.parametrize("key", ["rate", "seed", "split_seed"])
def test_a_word_for_a_number_in_the_file_itself_is_an_error(monkeypatch, tmp_path, key):
    text, count = re.subn(rf"^{key}: \S+", f"{key}: few", (params.ROOT / "params.yaml").read_text(), flags=re.MULTILINE)
    (tmp_path / "params.yaml").write_text(text)
    monkeypatch.setattr(params, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=f"^{key} 'few' in params.yaml is not a number"):
        params.load()
    assert count == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{case}_seg", "{case}_seg"),
        ("3", 3),
        ("1e-4", 1e-4),
        ("[1, 2]", [1, 2]),
        ("all", "all"),
        ("(sub-[0-9]+)", "(sub-[0-9]+)"),
    ],
)
def test_values_are_read_as_params_yaml_would_have_them(text, value):
    assert params.parse(text) == value
    assert params.load(changes=["folder.pattern={case}_seg"]).folder.pattern == "{case}_seg"
    for slices, found in (("largest", "largest"), ("[2,5]", [2, 5])):
        assert params.load(changes=[f"folder.slices={slices}"]).folder.slices == found


@pytest.mark.parametrize("scale", params.CHOICES["scale"])
@pytest.mark.parametrize("recipe", params.RECIPES)
def test_every_scale_and_recipe_is_complete(monkeypatch, scale, recipe):
    monkeypatch.setenv("JOINT_SET", f"scale={scale}")
    settings = params.load(recipe)
    assert settings.segmentation.epochs and settings.registration.epochs and settings.joint.rounds
    trained = settings.strong.training if recipe == "strong" else settings.segmentation
    assert trained.learning_rate > 0 and settings.registration.learning_rate > 0
    assert settings.joint.segmentation_learning_rate > 0 and settings.strong.joint.rounds > 0
    assert settings.midbrain.field_of_view % settings.midbrain.size == 0


def test_the_paper_scale_and_recipe_are_the_papers(monkeypatch):
    monkeypatch.setenv("JOINT_SET", "scale=paper")
    settings = params.load("paper")
    assert (settings.segmentation.epochs, settings.segmentation.learning_rate) == (500, 1e-4)
    assert (settings.registration.epochs, settings.registration.learning_rate) == (200, 1e-3)
    assert (settings.joint.segmentation_epochs, settings.joint.segmentation_learning_rate) == (100, 1e-5)
    assert (settings.joint.registration_epochs, settings.joint.registration_learning_rate) == (50, 1e-4)
    assert settings.registration.smoothness == [128, 64, 32, 16, 8] and settings.pseudo_masks.n == 5
    assert settings.midbrain.split == {"train": 600, "validation": 20, "test": 200} and settings.midbrain.size == 256
    assert settings.segmentation.normalisation == settings.registration.normalisation == "none"


@pytest.mark.parametrize(
    ("assignment", "variant", "words"),
    [
        ("cctr.recipes=[paper]", None, "cctr.recipes .* may name strong alone"),
    ],
)
def test_what_makes_no_sense_is_refused(monkeypatch, assignment, variant, words):
    monkeypatch.setenv("JOINT_SET", assignment)
    with pytest.raises(ValueError, match=words):
        params.load(variant=variant)


def test_weights_are_chosen_by_validation_in_the_papers_recipe_and_by_nothing_in_the_other():
    assert params.load("paper").selection == "validation" and params.load("strong").selection == "none"
    assert params.load("strong", changes=["strong.selection=validation"]).selection == "validation"


def test_a_cohorts_own_settings_of_the_recipe_hold_for_it_alone():
    hearts, others = params.load(cohort="acdc").strong, params.load(cohort="midbrain").strong
    assert hearts.bcp.one_piece and not others.bcp.one_piece and hearts.augmentation.rotation == 45
    assert "acdc" not in hearts and "acdc" not in others


def test_a_mistyped_attribute_names_what_there_is():
    with pytest.raises(AttributeError, match="no 'epoch' here; it has epochs"):
        _ = params.Section(epochs=1).epoch


def test_prose_does_not_change_a_notebooks_code(tmp_path):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("a"), nbformat.v4.new_code_cell("x = 1")])
    (tmp_path / "in").mkdir()
    texts = []
    for prose, code in (("a", "x = 1"), ("b", "x = 1"), ("b", "x = 2")):
        book.cells[0].source, book.cells[1].source = prose, code
        nbformat.write(book, tmp_path / "in" / "book.ipynb")
        notebooks.extract(tmp_path / "in", tmp_path / "out")
        texts.append((tmp_path / "out" / "book.py").read_text())
    assert texts[0] == texts[1] != texts[2] and "x = 1" in texts[0].splitlines()


def test_seeds_depend_on_every_name():
    assert compute.seed_of(1, "a") == compute.seed_of(1, "a") != compute.seed_of(1, "b") != compute.seed_of(2, "b")


def test_unknown_precision_and_missing_gpu_are_errors():
    with pytest.raises(ValueError, match="precision 'half'"):
        compute.Numerics("cpu", "half")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: auto"):
            compute.Numerics("cuda")
