"""Mean Teacher (Tarvainen and Valpola, 2017) by the rules of recipe `strong`: agreement with the averaged network."""

import torch

from lib.methods.mean_teacher import ramp_up
from lib.methods.peers.learning import prediction, teach


def batch_loss(lesson, generator, step):
    """See learning.learn."""
    options, half, steps = lesson.options.mean_teacher, lesson.training.batch // 2, lesson.training.steps
    known, masks = lesson.known(half, generator)
    free = lesson.free(half, generator)
    said = lesson.teacher(lesson.light(free, generator))
    logits = lesson.student(torch.cat((known, lesson.light(free, generator))))
    supervised = lesson.loss(logits[:half], masks)
    agreement = (torch.sigmoid(logits[half:]) - said).square().mean()
    weight = options.weight * ramp_up(step, options.start * steps, options.full * steps)
    return {"loss": supervised + weight * agreement, "supervised": supervised, "agreement": agreement}


def train(experiment):
    """(ResidualUNet, Fit)."""
    return teach(experiment, "mean_teacher", batch_loss)


def predict(experiment, index):
    """See methods.table."""
    return prediction(experiment, index, "mean_teacher", "mt")
