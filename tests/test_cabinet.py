"""Where a run is kept: weights in one place, and what they cost in another."""

import json

import pytest
import torch
from test_training import made_up_cohort

from lib.methods.experiment import Experiment
from lib.methods.pretraining import pretrain_registration, pretrain_segmentation
from lib.results import costs
from lib.runs import params


@pytest.fixture
def trial(tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    settings = params.load("paper", rate=10, seed=3)
    made_up_cohort().save(params.cohort_file(settings))
    return Experiment(settings)


def test_what_a_stage_cost_is_noted_apart_from_its_weights(trial, tmp_path):
    _, segmentation = pretrain_segmentation(trial)
    pretrain_registration(trial)
    notes = {
        json.loads(file.read_text())["stage"]: json.loads(file.read_text())
        for file in (tmp_path / "work" / "costs").rglob("*.json")
    }
    assert set(notes) == {"segmentation", "registration"}
    of = {"cohort": "made up", "recipe": "paper", "rate": 10, "seed": 3, "variant": ""}
    for stage, labelled in (("segmentation", len(trial.data.labelled)), ("registration", None)):  # which needs no masks
        note = notes[stage]
        assert {key: note[key] for key in of} == of and note["n_labelled"] == labelled
        assert note["device"] == trial.numerics.name and note["precision"] == trial.numerics.precision
        assert [file.name for file in trial.cabinet.folder(stage).iterdir()] == ["network.pt"]
        assert b"seconds" not in trial.cabinet.file(stage).read_bytes()
    assert notes["segmentation"]["seconds"] == round(segmentation.seconds, 1) > 0


def test_a_stage_that_runs_again_leaves_one_note_and_every_run_has_its_own(trial):
    for seconds in (1.26, 2.34):
        trial.note_cost("segmentation", seconds)
    assert costs.collect()["seconds"].tolist() == [2.3]
    for recipe, rate, seed, variant in (
        ("strong", 10, 3, None),
        ("paper", 50, 3, None),
        ("paper", 10, 4, None),
        ("strong", 10, 3, "nothing fused"),
    ):
        other = Experiment(params.load(recipe, rate=rate, seed=seed))
        other.settings = other.cabinet.settings = params.load(recipe, rate=rate, seed=seed, variant=variant)
        other.note_cost("segmentation", 5)
    assert len(costs.collect()) == 5 and costs.collect()["seconds"].sum() == 2.3 + 4 * 5


def test_a_variant_shares_what_it_does_not_change(trial):
    cabinet = lambda variant: Experiment(params.load("strong", rate=10, seed=3, variant=variant)).cabinet
    plain, changed = cabinet(None), cabinet("with contrast")
    assert changed.file("segmentation") == plain.file("segmentation")
    assert changed.file("cctr") != plain.file("cctr")
    assert changed.cost_file("cctr") != plain.cost_file("cctr")


def test_what_a_method_cost_is_its_own_stage_and_those_before_it(trial):
    for stage, seconds in (("registration", 10), ("segmentation", 1), ("joint", 100)):
        trial.note_cost(stage, seconds)
    by_method = costs.by_method(costs.collect()).set_index("method")["seconds"]
    assert by_method.to_dict() == {"fs": 1, "registration": 111, "joint": 111, "combined": 111}


def test_a_checkpoint_is_loaded_by_its_own_key_alone(trial):
    mine, other = trial.cabinet.checkpoint("a"), trial.cabinet.checkpoint("b")
    assert mine.load() is None
    mine.save({"step": 3, "weights": torch.arange(4)})
    assert mine.load()["step"] == 3 and mine.load()["weights"].tolist() == [0, 1, 2, 3] and other.load() is None
    mine.file.rename(other.file)
    assert other.load() is None  # what lies there is of other work
