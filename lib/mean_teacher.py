"""Mean Teacher, the semi-supervised baseline of P1 (its reference 2, Tarvainen and Valpola 2017)."""

import copy
import math

import torch
from torch import nn


class MeanTeacher(nn.Module):
    """A student and its teacher, the exponential moving average of the student's weights.

    Args:
        student: the network that is trained.
        decay: of the average; smaller in the first updates, so that the teacher forgets the random start.
    """

    def __init__(self, student, decay):
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.decay = decay
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=next(student.parameters()).device))

    @torch.no_grad()
    def update(self):
        """teacher <- d teacher + (1 - d) student, with d = min(decay, 1 - 1 / (updates + 1))."""
        self.updates += 1
        weight = torch.clamp(1 / (self.updates + 1), min=1 - self.decay)
        for mean, value in zip(self.teacher.parameters(), self.student.parameters()):
            mean.lerp_(value, weight.to(mean))


def ramp_up(step, start, end):
    """Weight of the consistency: 0 before ``start``, then exp(-5 (1 - t)^2) up to 1 at ``end``."""
    if step < start:
        return 0.0
    return math.exp(-5 * (1 - min(1.0, (step - start) / max(1, end - start))) ** 2)
