import pytest
import torch
from torch import nn

from lib.methods.mean_teacher import MeanTeacher, ramp_up


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
