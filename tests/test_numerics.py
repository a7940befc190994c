"""The numbers that the names in lib.versions stand for: where these fail, change the names and the numbers."""

import pytest

from lib import experiment, joint_plus, mean_teacher, params, rounds, training, versions
from test_training import made_up_cohort

# Of every stage the loss of the first step and the mean over all; of joint stages also the DSC of both networks on
# the unlabelled images in the end.
KNOWN = {
    "d7fa566ff1753849/4fd182be9f838728/refinement": {
        "paper": {
            "segmentation": [0.61729, 0.61560], "registration": [0.46581, 0.51745],
            "mean_teacher": [0.61821, 0.61554], "joint": [0.17639, 0.33257, 0.22469, 0.45063],
            "joint_plus": [0.52522, 0.43929, 0.95483, 0.64273],
        },
        "strong": {
            "segmentation": [0.71064, 0.36217], "registration": [0.46521, 0.55270],
            "mean_teacher": [0.74634, 0.38492], "joint": [0.18024, 0.33195, 0.76380, 0.44110],
            "joint_plus": [0.55114, 0.30772, 0.84164, 0.59762],
        },
    },
}


def summary(history):
    return [history["loss"].iloc[0], history["loss"].mean()]


@pytest.mark.parametrize("recipe", params.RECIPES)
def test_the_same_settings_give_the_numbers_that_the_names_stand_for(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    settings = params.load(recipe, seed=1, rate=10)
    settings |= {"device": "cpu", "precision": "float32"}
    settings.segmentation |= {"epochs": 20, "max_steps": 20}
    settings.joint_plus |= {"segmentation_epochs": 4}
    settings.joint_plus.refinement |= {"steps": [10, 20]}
    made_up_cohort().save(experiment.cohort_file(settings))
    trial = experiment.Experiment(settings)
    found = {"segmentation": summary(training.pretrain_segmentation(trial)[1].history),
             "registration": summary(training.pretrain_registration(trial)[1].history),
             "mean_teacher": summary(mean_teacher.train_mean_teacher(trial)[1].history)}
    for stage, train in (("joint", rounds.joint_rounds), ("joint_plus", joint_plus.joint_plus_rounds)):
        measured, history = train(trial)
        last = measured.iloc[-1]
        found[stage] = [*summary(history), last["dsc_segmentation"], last["dsc_registration"]]
    names = f"{versions.NUMERICS}/{versions.MEAN_TEACHER}/{versions.JOINT_PLUS}"
    for stage, numbers in KNOWN[names][recipe].items():
        assert found[stage] == pytest.approx(numbers, rel=1e-2), stage
