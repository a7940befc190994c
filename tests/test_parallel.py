"""Two processes train what one trains: the same losses, up to rounding. They meet by gloo on this machine's cores."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_training import made_up_cohort

from lib import parallel
from lib.methods.experiment import Experiment
from lib.methods.pretraining import pretrain_registration
from lib.runs import params

CHANGES = "scale=smoke,device=cpu,precision=float32,scales.smoke.strong.training.steps=12"
STAGES = ["elastic", "bcp", "consistency", "unimatch", "joint_plus", "rounds"]


def train(folder):
    """Train the registration and every stage, and write the losses to ``folder``."""
    experiment = Experiment(params.load("strong"))
    _, found = pretrain_registration(experiment)
    found.history.to_csv(folder / "registration.csv")
    for stage in STAGES:
        found = import_module(f"lib.methods.peers.{stage}").train(experiment)[-1]
        found.history.to_csv(folder / f"{stage}.csv")


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Dictionary of the number of processes to one of stage to losses; and that to the files that were left."""
    found, files = {}, {}
    for number in (1, 2):
        folder = tmp_path_factory.mktemp(f"of_{number}")
        environment = {**os.environ, "JOINT_OUTPUT": str(folder), "JOINT_SET": CHANGES, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(params.ROOT)
        before, os.environ["JOINT_OUTPUT"] = os.environ["JOINT_OUTPUT"], str(folder)
        made_up_cohort().save(params.cohort_file(params.load("strong")))
        os.environ["JOINT_OUTPUT"] = before
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
        done = subprocess.run([*start, __file__, folder], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        read = lambda file: pd.read_csv(file).filter(regex="loss|dice|smoothness").to_numpy()
        found[number] = {stage: read(folder / f"{stage}.csv") for stage in ["registration", *STAGES]}
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        # Checkpoints have the names of their causes, networks among them.
        files[number] = sorted("checkpoint" if "checkpoints" in name else name for name in names)
    return found, files


@pytest.mark.parametrize("stage", ["registration", *STAGES])
def test_two_processes_have_the_losses_of_one(losses, stage):
    one, two = (losses[0][number][stage] for number in (1, 2))
    assert len(one) >= 4 and np.ptp(one[:, 0]) > 0.01  # something was learnt
    np.testing.assert_allclose(two, one, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(two[:2], one[:2], rtol=2e-5, atol=2e-6)  # before rounding has grown


def test_the_first_process_alone_writes_files(losses):
    assert losses[1][1] == losses[1][2]


def test_one_process_meets_nobody():
    network = torch.nn.Linear(2, 2)
    with parallel.spread(network):
        assert not network._forward_hooks
    assert parallel.count() == 1 and parallel.is_first()


def test_student_and_teacher_are_called_and_their_pair_is_not():
    pair = torch.nn.Module()
    pair.student, pair.teacher = torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert parallel.called(pair) == [pair.student, pair.teacher]


if __name__ == "__main__":
    train(Path(sys.argv[1]))
