"""The numbers that the names in lib.runs.versions stand for: where these fail, change the names and the numbers."""

import pytest
from test_training import made_up_cohort
from test_volumes import made_up_volumes

from lib.methods import joint, mean_teacher, pretraining
from lib.methods.cctr import correspondence
from lib.methods.cctr import train as cctr
from lib.methods.experiment import Experiment
from lib.methods.peers import bcp, elastic, joint_plus, rounds, unimatch
from lib.runs import params, versions

# Of every stage the loss of the first step and the mean over all; of joint rounds also the DSC of both networks on the
# unlabelled images in the end.
KNOWN = {
    "d7fa566ff1753849/4fd182be9f838728": {
        "segmentation": [0.61729, 0.61560],
        "registration": [0.46581, 0.51745],
        "mean_teacher": [0.61821, 0.61554],
        "joint": [0.17639, 0.33257, 0.22469, 0.45063],
    },
}
KNOWN_STRONG = {
    "d7fa566ff1753849/first": {
        "registration": [0.46511, 0.54572],
        "elastic": [0.83336, 0.35178],
        "bcp": [0.79752, 0.38536],
        "unimatch": [0.41089, 0.18276],
        "joint": [0.38751, 0.33705],
        "joint_plus": [0.38571, 0.31931],
    },
}
# Of a cohort of volumes; CCT-R by its parts.
KNOWN_OF_VOLUMES = {
    "labels by share/last state": {
        "registration": [0.19769, 0.15077],
        "bcp": [0.73488, 0.54563],
        "joint_plus": [0.53234, 0.50238],
        "warped labels": [0.56667, 0.93771],
        "cctr": [5.87923, 3.98562, 2.27254, 1.02443, 0.86348, 4.53356, 4.29187],
    },
}
PEERS = {"elastic": elastic, "bcp": bcp, "unimatch": unimatch, "joint": rounds, "joint_plus": joint_plus}


def summary(history):
    return [history["loss"].iloc[0], history["loss"].mean()]


def experiment(recipe, images, **more):
    settings = params.load(recipe, seed=1, **more)
    settings |= {"device": "cpu", "precision": "float32"}
    settings.segmentation |= {"epochs": 20, "max_steps": 20}
    settings.refinement |= {"steps": [10, 20]}
    settings.strong.training |= {"steps": 20, "batch": 8}
    images.save(params.cohort_file(settings))
    return Experiment(settings)


def check(found, known, rel=1e-2):
    assert set(found) == set(known)
    for stage, numbers in known.items():
        assert found[stage] == pytest.approx(numbers, rel=rel), stage


def test_the_papers_recipe_gives_the_numbers_that_the_names_stand_for(tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    trial = experiment("paper", made_up_cohort(), rate=10)
    found = {
        "segmentation": summary(pretraining.pretrain_segmentation(trial)[1].history),
        "registration": summary(pretraining.pretrain_registration(trial)[1].history),
        "mean_teacher": summary(mean_teacher.train_mean_teacher(trial)[1].history),
    }
    measured, history = joint.joint_rounds(trial)
    last = measured.iloc[-1]
    found["joint"] = [*summary(history), last["dsc_segmentation"], last["dsc_registration"]]
    check(found, KNOWN[f"{versions.NUMERICS}/{versions.MEAN_TEACHER}"])


def test_recipe_strong_gives_the_numbers_that_the_names_stand_for(tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    trial = experiment("strong", made_up_cohort(), rate=10)
    found = {"registration": summary(pretraining.pretrain_registration(trial)[1].history)}
    found |= {name: summary(peer.train(trial)[1].history) for name, peer in PEERS.items()}
    check(found, KNOWN_STRONG[f"{versions.NUMERICS}/{versions.STRONG}"])


def test_cohorts_of_volumes_give_the_numbers_that_the_names_stand_for(tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    trial = experiment("strong", made_up_volumes(), cohort="acdc", rate=50)
    trial.settings.cctr |= {"threshold": 0.4}  # untrained networks are sure of little
    found = {
        "registration": summary(pretraining.pretrain_registration(trial)[1].history),
        "bcp": summary(bcp.train(trial)[1].history),
        "joint_plus": summary(joint_plus.train(trial)[1].history),
    }
    correspond = correspondence.stored_registration(trial)
    found["warped labels"] = correspondence.registration_scores(trial, correspond)["mean"][:2].tolist()
    history = cctr.train_cctr(trial, correspond)[1].history
    found["cctr"] = [*summary(history), *history[["supervised", "cross", "rsl", "contrast", "reps"]].mean()]
    check(found, KNOWN_OF_VOLUMES[f"{versions.VOLUMES}/{versions.CCTR}"])
