import contextlib
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from lib import training
from lib.cohorts.cohort import Cohort, min_max
from lib.cohorts.splitting import split_by_subject
from lib.methods import experiment, joint, mean_teacher, pretraining
from lib.methods.peers import elastic, joint_plus, rounds
from lib.results import evaluation, tables
from lib.results.statistics import average_classes
from lib.runs import params
from lib.runs.cabinet import Checkpoint, load_saved, save_atomically
from lib.runs.params import cohort_file

PAPER = {"fs", "mt", "registration", "joint", "combined"}
STRONG = {"registration", "joint", "combined", "fs+elastic", "joint+"}


def made_up_cohort(slices=30, side=32, classes=("ellipse",)):
    """Bright ellipses that the masks cover, two slices a subject; a second class is their right half."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    images, labels = [], []
    for _ in range(slices):
        centre, radius = rng.uniform(12, 20, 2), rng.uniform(5, 8, 2)
        inside = ((rows - centre[0]) / radius[0]) ** 2 + ((columns - centre[1]) / radius[1]) ** 2 < 1
        images.append(min_max(inside + 0.2 * rng.standard_normal((side, side))))
        right = inside & (columns > centre[1]) & (len(classes) == 2)
        labels.append(inside.astype(np.uint8) + right)
    subjects = np.repeat([f"s{k:02d}" for k in range(slices // 2)], 2)
    return Cohort(
        "midbrain",
        "made up",
        np.stack(images),
        np.stack(labels),
        subjects,
        split_by_subject(subjects, {"train": 20, "validation": 4, "test": 6}, 1),
        classes,
        True,
        1.0,
    )


def made_up_volumes(count=12, shape=(16, 20, 24)):
    """Bright balls of two classes, halves of one ball, one volume a subject, voxels of 2 mm."""
    rng, grid = np.random.default_rng(0), np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    images, labels = [], []
    for _ in range(count):
        centre = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
        inside = np.square(grid - centre[:, None, None, None]).sum(axis=0) < rng.uniform(5, 7) ** 2
        images.append(min_max(inside + 0.2 * rng.standard_normal(shape)))
        labels.append(inside.astype(np.uint8) + (inside & (grid[2] > centre[2])))
    subjects = np.array([f"s{k:02d}" for k in range(count)])
    split = split_by_subject(subjects, {"train": 8, "validation": 2, "test": 2}, 1)
    return Cohort(
        "hippocampus", "made up", np.stack(images), np.stack(labels), subjects, split, ("left", "right"), False, 2.0
    )


@pytest.fixture
def trial(tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    settings = params.load("paper")
    made_up_cohort().save(cohort_file(settings))
    return experiment.Experiment(settings)


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_the_same_seed_gives_the_same_numbers(trial, tmp_path, monkeypatch):
    network, fit = pretraining.pretrain_segmentation(trial)
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path / "again"))
    made_up_cohort().save(cohort_file(trial.settings))
    again, fit_again = pretraining.pretrain_segmentation(experiment.Experiment(trial.settings))
    assert same_weights(network, again)
    pd.testing.assert_frame_equal(fit.history, fit_again.history)


def test_segmentation_learns_ellipses(trial):
    settings = params.load("paper")
    settings.segmentation |= {"epochs": 120, "max_steps": 120}
    settings.segmentation["learning_rate"] = 0.003
    trial = experiment.Experiment(settings)
    network, fit = pretraining.pretrain_segmentation(trial)
    best = fit.history["validation"].max()
    assert best > 0.8
    assert pretraining.validation_dice(trial, network) == pytest.approx(best)


def test_joint_rounds_measure_save_and_resume(trial):
    pretraining.pretrain_segmentation(trial)
    pretraining.pretrain_registration(trial)
    first = joint.joint_rounds(trial)
    assert first.measured["round"].tolist() == [0, 0, 1, 1]
    assert first.measured["split"].tolist() == ["validation", "unlabelled"] * 2
    (segmentation, _), _ = experiment.load_round(trial, 0)
    assert same_weights(segmentation, experiment.load_pretrained(trial)[0])
    again = joint.joint_rounds(trial)  # everything is there already: same numbers
    pd.testing.assert_frame_equal(first.measured, again.measured)
    pd.testing.assert_frame_equal(first.history, again.history)


def test_true_masks_of_unlabelled_and_test_images_train_nothing(trial, tmp_path, monkeypatch):
    """Every method gives the same weights whatever those masks are; only what is measured of them changes."""
    weights, measured = [], []
    for name in ("as they are", "inverted"):
        monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path / name))
        made_up_cohort().save(cohort_file(trial.settings))
        own = experiment.Experiment(trial.settings)
        if name == "inverted":
            hidden = torch.cat((own.data.unlabelled, own.data.as_index(own.cohort.index("test"))))
            own.data.masks[hidden] = 1 - own.data.masks[hidden]
        segmentation, _ = pretraining.pretrain_segmentation(own)
        registration, _ = pretraining.pretrain_registration(own)
        teacher, *_ = mean_teacher.train_mean_teacher(own)
        measured.append(joint.joint_rounds(own).measured)
        weights.append([segmentation, registration, teacher, *experiment.load_round(own, 1)[0]])
    assert all(same_weights(*pair) for pair in zip(*weights, strict=True))
    unlabelled = [frame[frame["split"] == "unlabelled"]["dsc_segmentation"].to_numpy() for frame in measured]
    assert (np.abs(unlabelled[0] - unlabelled[1]) > 0.1).all()


def test_several_classes_from_training_to_tables_by_every_method(trial):
    made_up_cohort(side=36, classes=("left", "right")).save(cohort_file(trial.settings))
    trial = experiment.Experiment(trial.settings)  # 36 pixels: not a multiple of 16
    pretraining.pretrain_segmentation(trial)
    pretraining.pretrain_registration(trial)
    joint.joint_rounds(trial)
    mean_teacher.train_mean_teacher(trial)
    strong = experiment.Experiment(params.load("strong"))
    pretraining.pretrain_registration(strong)
    for peer in (elastic, rounds, joint_plus):
        peer.train(strong)
    found = [evaluation.evaluate(trial), evaluation.evaluate(strong), evaluation.evaluate_untrained(trial)]
    assert [set(part.masks) for part in found] == [PAPER, STRONG, {"classical"}]
    per_image = pd.concat([part.per_image for part in found], ignore_index=True)
    assert set(per_image["class"]) == {"left", "right"} and per_image["confidence"].between(0.5, 1).all()
    best = set(" ".join(evaluation.rounds(trial)["best_for"]).split())
    assert best == {"joint", "registration", "combined"} and not len(evaluation.rounds(strong))
    averaged = average_classes(per_image)
    table = tables.table1(averaged, tables.compare(averaged))
    overall = table[(table["seed"] == "all") & (table["recipe"] == "paper")]
    assert overall["class"].value_counts().to_dict() == {"mean": 5, "left": 5, "right": 5}
    assert overall["n_test"].unique().tolist() == [len(trial.cohort.index("test"))]
    assert overall.loc[overall["class"] == "mean", "p_fs_holm"].notna().sum() == 4
    assert len(tables.calibrated(averaged, pd.concat([part.reliability for part in found]))) == 11


SCRIPT = """
import sys
from lib import training
from lib.methods import experiment, joint, mean_teacher, pretraining
from lib.methods.cctr import correspondence
from lib.methods.cctr import train as cctr
from lib.methods.peers import joint_plus, rounds
from lib.runs import params
training.CHECKPOINT_SECONDS = 0
trial = experiment.Experiment(params.load("paper"))
trial.settings.segmentation |= {"epochs": 80, "max_steps": 80}
pretraining.pretrain_segmentation(trial)
pretraining.pretrain_registration(trial)
joint.joint_rounds(trial)
mean_teacher.train_mean_teacher(trial)
trial = experiment.Experiment(params.load("strong"))
trial.settings.strong.training |= {"steps": 30, "batch": 4}
pretraining.pretrain_registration(trial)
joint_plus.train(trial)
rounds.train(trial)
trial.settings.cctr |= {"watched": 4}
cctr.train_cctr(trial, correspondence.stored_registration(trial))
"""


def heed_interrupts():
    """A process whose parent runs in the background would ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_script(folder, kill_after=None, number=None):
    """Run SCRIPT; where ``kill_after`` is given, send it the signal ``number`` after so many new checkpoints."""
    environment = {**os.environ, "JOINT_OUTPUT": str(folder), "PYTHONPATH": str(params.ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    if kill_after is not None:
        seen, limit = set(), time.monotonic() + 120
        while len(seen) < kill_after and process.poll() is None and time.monotonic() < limit:
            for file in (folder / "work" / "checkpoints").glob("*"):
                with contextlib.suppress(FileNotFoundError):
                    seen.add((file.name, file.stat().st_mtime_ns))
            time.sleep(0.005)
        assert process.poll() is None, "the script ended before it could be killed"
        process.send_signal(number)
    _, errors = process.communicate()
    if number == signal.SIGINT:  # torch's optimisers import what hides from Python's exit status that it was a signal
        assert process.returncode in (-number, 1) and "\nKeyboardInterrupt\n" in errors
    else:
        assert process.returncode == (-number if kill_after is not None else 0), errors


def test_a_stopped_run_resumes_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    for name in ("whole", "killed"):
        monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path / name))
        made_up_cohort().save(cohort_file(params.load("strong")))
    run_script(tmp_path / "whole")
    kill = signal.SIGKILL
    for checkpoints, number in (2, kill), (5, signal.SIGTERM), (3, signal.SIGINT), (4, kill), (5, kill):
        run_script(tmp_path / "killed", checkpoints, number)
    run_script(tmp_path / "killed")
    models = [sorted((tmp_path / name / "work" / "models").rglob("*.pt")) for name in ("whole", "killed")]
    assert len(models[0]) == 9 and [f.name for f in models[0]] == [f.name for f in models[1]]
    assert [f.read_bytes() for f in models[0]] == [f.read_bytes() for f in models[1]]


def test_a_checkpoint_of_other_work_is_not_resumed(tmp_path):
    save_atomically({"fingerprint": "a", "step": 3}, tmp_path / "c.pt")
    cpu = torch.device("cpu")
    assert Checkpoint(tmp_path / "c.pt", "a", cpu).load()["step"] == 3
    assert Checkpoint(tmp_path / "c.pt", "b", cpu).load() is None
    whole = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(whole[: len(whole) // 2])
    assert Checkpoint(tmp_path / "c.pt", "a", cpu).load() is None
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_saved(tmp_path / "c.pt", cpu)
    with pytest.raises(FileNotFoundError, match="run the notebook"):
        load_saved(tmp_path / "gone.pt", cpu)


def test_settings_data_and_seed_are_in_the_fingerprint(trial):
    settings = params.load("paper")
    settings["seed"] += 1
    assert experiment.Experiment(settings).origin != trial.origin
    assert experiment.Experiment(params.load("strong")).origin != trial.origin
    cohort = made_up_cohort()
    cohort.images[0, 0, 0] += 0.1
    cohort.save(cohort_file(settings))
    assert experiment.Experiment(trial.settings).origin != trial.origin


def test_a_loss_that_is_not_finite_stops_with_a_message(trial):
    network = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        training.fit(
            network,
            lambda generator, step: {"loss": network.weight.sum() * math.nan},
            steps=20,
            peak=0.1,
            schedule="constant",
            weight_decay=0,
            generator=torch.Generator(),
            label="made up",
        )


def test_every_part_of_a_network_is_kept_where_it_was_best_by_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    network = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1) for name in ("first", "second")})
    scores, seen = iter([[0.1, 0.9], [0.5, 0.2], [0.3, 0.4]]), []

    def validate(trained):
        seen.append({name: value.clone() for name, value in trained.state_dict().items()})
        return next(scores)

    found = training.fit(
        network,
        lambda generator, step: {"loss": sum(value.sum() for value in network.parameters())},
        steps=30,
        peak=0.1,
        schedule="constant",
        weight_decay=0,
        generator=torch.Generator(),
        label="made up",
        validate=validate,
        checks=3,
        parts=("first", "second"),
    )
    assert all(
        torch.equal(value, seen[1 if name.startswith("first") else 0][name])
        for name, value in network.state_dict().items()
    )
    assert found.history["validation second"].dropna().tolist() == [0.9, 0.2, 0.4]


def test_the_one_cycle_schedule_rises_and_falls():
    rates = [training.learning_rate("one_cycle", 1.0, step, 100) for step in range(100)]
    assert np.argmax(rates) in (9, 10) and max(rates) == pytest.approx(1)
    assert rates[0] < 0.05 and rates[-1] < 0.01
    assert training.learning_rate("constant", 0.3, 50, 100) == 0.3
    with pytest.raises(ValueError, match="constant, one_cycle"):
        training.learning_rate("steps", 1.0, 0, 10)


def test_batches_repeat_no_image_while_there_are_enough():
    generator = torch.Generator().manual_seed(0)
    assert len(set(training.draw_indices(9, 5, generator).tolist())) == 5
    assert sorted(training.draw_indices(3, 5, generator).tolist())[0] == 0
    assert len(training.draw_indices(3, 5, generator)) == 5


def test_the_best_round_is_the_best_on_validation_images_alone():
    columns = ["round", "split", "dsc_segmentation", "dsc_registration", "dsc_pseudo_masks"]
    measured = pd.DataFrame(
        [
            (0, "validation", 0.9, 0.5, 0.7),
            (0, "unlabelled", 0.1, 0.1, 0.1),
            (1, "validation", 0.8, 0.6, 0.7),
            (1, "unlabelled", 0.99, 0.99, 0.99),
        ],
        columns=columns,
    )
    assert experiment.best_rounds(measured) == {"joint": 0, "registration": 1, "combined": 0}


def test_the_clock_does_not_count_what_a_process_waits():
    work, wait = training.Clock(torch.device("cpu")), training.Clock(torch.device("cuda"))
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    assert work.read() == pytest.approx(0.1, rel=0.1)
    time.sleep(0.2)  # as paused
    assert work.read() < 0.15 and wait.read() > 0.3  # a GPU is at work while its process waits
