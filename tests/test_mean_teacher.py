import pytest
import torch
from test_training import made_up_cohort
from torch import nn

from lib.methods import mean_teacher, pretraining
from lib.methods.experiment import Experiment
from lib.methods.mean_teacher import MeanTeacher, ramp_up
from lib.runs import params


def test_the_teacher_is_the_exponential_moving_average_of_the_student():
    networks = MeanTeacher(nn.Linear(2, 1, bias=False), decay=0.9)
    expected = networks.teacher.weight.clone()
    for number in range(30):
        with torch.no_grad():
            networks.student.weight.fill_(number)
        networks.update()
        decay = min(0.9, 1 - 1 / (number + 2))
        expected = decay * expected + (1 - decay) * number
        assert torch.allclose(networks.teacher.weight, expected, atol=1e-5)


def test_only_the_student_is_trained():
    networks = MeanTeacher(nn.Linear(2, 1), decay=0.9)
    assert all(p.requires_grad for p in networks.student.parameters())
    assert not any(p.requires_grad for p in networks.teacher.parameters())
    before = [p.clone() for p in networks.teacher.parameters()]
    networks.student(torch.ones(1, 2)).sum().backward()
    assert all(p.grad is None for p in networks.teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, networks.teacher.parameters()))


def test_a_teacher_with_decay_zero_is_the_student():
    networks = MeanTeacher(nn.Linear(2, 1), decay=0.0)
    with torch.no_grad():
        networks.student.weight.fill_(3)
    networks.updates += 10
    networks.update()
    assert torch.allclose(networks.teacher.weight, networks.student.weight)


def test_consistency_sets_in_late_and_grows_to_one():
    weights = [ramp_up(step, 100, 300) for step in range(0, 500, 20)]
    assert weights[:5] == [0] * 5 and weights == sorted(weights) and weights[-1] == 1
    assert ramp_up(200, 100, 300) == pytest.approx(0.2865, abs=1e-4)  # exp(-5 / 4)


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """An experiment on ellipses in which all draws of one kind of work are those of any other."""
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    settings = params.load("paper")
    settings |= {"device": "cpu", "precision": "float32"}
    settings.segmentation |= {"epochs": 30, "max_steps": 30}
    made_up_cohort().save(params.cohort_file(settings))
    trial = Experiment(settings)
    monkeypatch.setattr(trial.numerics, "generator", lambda *names: torch.Generator().manual_seed(5))
    return trial


def weights_of(network):
    return [value.detach().clone() for value in network.parameters()]


def test_without_consistency_mean_teacher_is_the_baseline_with_averaged_weights(trial, monkeypatch):
    """The student is fs step by step, bit by bit, and the teacher the moving average of fs."""
    trial.settings.mean_teacher |= {"consistency": 0.0, "decay": 0.7}
    baseline, students, teachers, made = [], [], [], []

    def watching(module, look):
        loss = module.soft_dice_loss
        monkeypatch.setattr(module, "soft_dice_loss", lambda *given: (look(), loss(*given))[1])

    network = trial.segmentation_network
    monkeypatch.setattr(trial, "segmentation_network", lambda: made.append(network()) or made[-1])
    watching(pretraining, lambda: baseline.append(weights_of(made[-1])))
    _, fs = pretraining.pretrain_segmentation(trial)
    update = MeanTeacher.update

    def updated(networks):
        update(networks)
        students.append(weights_of(networks.student))
        teachers.append(weights_of(networks.teacher))

    monkeypatch.setattr(MeanTeacher, "update", updated)
    _, mt = mean_teacher.train_mean_teacher(trial)
    assert fs.history["loss"].tolist() == mt.history["loss"].tolist() and len(mt.history) == 30
    assert (mt.history["consistency"] == 0).all()
    mean = baseline[0]
    for number, (weights, student, teacher) in enumerate(zip(baseline[1:], students, teachers), 1):
        mean = [old.lerp(new, max(1 / (number + 1), 1 - 0.7)) for old, new in zip(mean, weights)]
        assert all(torch.equal(*pair) for pair in zip(weights, student, strict=True))
        assert all(torch.allclose(*pair, atol=1e-7) for pair in zip(mean, teacher, strict=True))
    assert not all(torch.allclose(*pair, atol=1e-4) for pair in zip(mean, students[-2]))


def losses_of(trial, monkeypatch, step, **changes):
    """The losses of one batch of Mean Teacher, before any training."""
    caught = {}

    class Caught(Exception):
        pass

    def fit(networks, batch_loss, **more):
        caught.update(networks=networks, batch_loss=batch_loss)
        raise Caught

    trial.settings.mean_teacher |= changes
    with monkeypatch.context() as patch, pytest.raises(Caught):
        patch.setattr(mean_teacher, "fit", fit)
        mean_teacher.train_mean_teacher(trial)
    with torch.no_grad():  # a teacher of its own, with which there is something to agree
        for value in caught["networks"].teacher.parameters():
            value.mul_(1.5)
    return caught["networks"].student, caught["batch_loss"](torch.Generator().manual_seed(3), step)


def test_consistency_is_with_unlabelled_images_alone(trial, monkeypatch):
    """Labelled images have the loss and the gradient that they have without it, and it has none of them."""
    trial.data.images.requires_grad_()
    gradients = []
    for consistency in (0.0, 1.0):
        student, losses = losses_of(trial, monkeypatch, 29, consistency=consistency, noise_std=0.0)
        slopes = torch.autograd.grad(losses["dice"], [*student.parameters(), trial.data.images], retain_graph=True)
        gradients.append([losses["dice"], *slopes])
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*gradients, strict=True))
    assert float(losses["consistency"].detach()) > 1e-4
    assert losses["loss"].item() == pytest.approx((losses["dice"] + losses["consistency"]).item())

    def touched(loss):
        (slope,) = torch.autograd.grad(loss, trial.data.images, retain_graph=True)
        return slope.abs().flatten(1).sum(1).nonzero()[:, 0].tolist()

    supervised, consistent = touched(losses["dice"]), touched(losses["consistency"])
    assert supervised and set(supervised) <= set(trial.data.labelled.tolist())
    assert consistent and set(consistent) <= set(trial.data.unlabelled.tolist())


def test_before_it_sets_in_there_is_no_consistency(trial, monkeypatch):
    _, losses = losses_of(trial, monkeypatch, 5, start=0.2)  # of 30 steps
    assert losses["consistency"] == 0 and torch.equal(losses["loss"], losses["dice"])
    _, losses = losses_of(trial, monkeypatch, 7, start=0.2)
    assert 0 < losses["loss"] - losses["dice"] < losses["consistency"]
