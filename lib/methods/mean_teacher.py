"""Mean Teacher, the semi-supervised baseline of P1 (its reference 2, Tarvainen and Valpola 2017)."""

import copy
import math

import torch
from torch import nn

from lib.losses import soft_dice_loss
from lib.methods.experiment import Prediction
from lib.methods.pretraining import save_network, segment, validation_dice
from lib.runs.versions import MEAN_TEACHER, fingerprint
from lib.training import draw_indices, fit, steps_of, weights_digest


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


def train_mean_teacher(experiment):
    """Mean Teacher on the labelled and unlabelled images, with the steps and batches of FS (P1, section 3.2).

    From ``start`` on, the student is also to agree with its teacher on unlabelled images (mean squared difference).
    Each of the two sees its own noise. The teacher is validated, kept and tested.

    Returns:
        (ResidualUNet, the teacher; Fit, whose ``watched`` are the teacher's masks of ``data.example``).
        The teacher's weights are saved under work/models.
    """
    settings, numerics, data = experiment.settings, experiment.numerics, experiment.data
    options, recipe = settings.mean_teacher, settings.segmentation
    networks = numerics.place(MeanTeacher(experiment.segmentation_network(), options.decay))
    labelled, masks = data.images[data.labelled], data.masks[data.labelled]
    unlabelled = data.images[data.unlabelled]
    steps = steps_of(recipe.epochs, len(labelled), recipe.batch, recipe.max_steps)
    start, full = options.start * steps, (options.start + 0.4) * steps

    def noisy(images, generator):
        noise = torch.randn(images.shape, generator=generator, device=generator.device) * options.noise_std
        return images + noise.clamp(-2 * options.noise_std, 2 * options.noise_std)

    def batch_loss(generator, step):
        index = draw_indices(len(labelled), recipe.batch, generator)
        images, target = labelled[index], masks[index]
        weight = options.consistency * ramp_up(step, start, full)
        if weight:
            free = unlabelled[draw_indices(len(unlabelled), recipe.batch, generator)]
            images = torch.cat((images, free))
        with numerics.autocast():
            prediction = networks.student.segment(noisy(images, generator) if weight else images)
        count = recipe.batch
        supervised = soft_dice_loss(prediction[:count], target, experiment.pooled)
        consistency = torch.zeros_like(supervised)
        if weight:
            with torch.no_grad(), numerics.autocast():
                taught = networks.teacher.segment(noisy(images[count:], generator))
            consistency = (prediction[count:] - taught).square().mean()
        return {"loss": supervised + weight * consistency, "dice": supervised, "consistency": consistency}

    @torch.no_grad()
    def watch(trained):
        trained.eval()
        return trained.teacher.segment(data.images[data.example]).half().cpu()

    key = fingerprint(
        experiment.origin,
        MEAN_TEACHER,
        options,
        recipe,
        steps,
        weights_digest(networks),
        data.labelled.tolist(),
    )
    found = fit(
        networks,
        batch_loss,
        steps=steps,
        peak=recipe.learning_rate,
        schedule=recipe.schedule,
        weight_decay=recipe.weight_decay,
        generator=numerics.generator(settings.seed, "mean teacher"),
        label="mean teacher",
        checkpoint=experiment.cabinet.checkpoint(key),
        validate=lambda trained: validation_dice(experiment, trained.teacher),
        after_step=networks.update,
        watch=watch if len(unlabelled) else None,
    )
    save_network(experiment, "mean_teacher", networks.teacher, found)
    return networks.teacher, found


def predict(experiment, index):
    """Masks of ``mt``, the teacher. See methods.table."""
    network = experiment.segmentation_network()
    network.load_state_dict(experiment.cabinet.load("mean_teacher")["network"])
    return {"mt": Prediction(0, segment(experiment, network, index))}
