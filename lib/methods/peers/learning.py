"""How every method of recipe `strong` is trained: as many images seen, one augmentation, one loss, averaged weights.

A method says what its batches hold and what loss they give. By default no validation image is looked at: what is tested
is the average of the weights after the last step.
"""

import torch

from lib.augment import light, place
from lib.losses import segmentation_loss
from lib.methods.experiment import Prediction
from lib.methods.mean_teacher import MeanTeacher
from lib.methods.pretraining import save_network, segment, validation_dice
from lib.runs.versions import STRONG, fingerprint
from lib.training import draw_indices, fit, weights_digest

CHECKS = 20  # looks at the network in a whole training, see training.fit
SEEDS = ("fair",)  # the word that seeds all draws of the recipe


def labelled_images(experiment):
    """Indices of the images whose masks train: with ``selection: training`` also those that validate elsewhere."""
    data = experiment.data
    return torch.cat((data.labelled, data.validation)) if experiment.settings.selection == "training" else data.labelled


class Lesson:
    """What a method makes its batches of, and the networks that it may ask.

    Args:
        experiment: Experiment.
        networks: MeanTeacher on the device.
    """

    def __init__(self, experiment, networks):
        self.experiment, self.data, self.numerics = experiment, experiment.data, experiment.numerics
        self.options = experiment.settings.strong
        self.training = self.options.training
        self.networks = networks
        known = labelled_images(experiment)
        self.labelled, self.masks = self.data.images[known], self.data.masks[known]
        self.partly = self.data.drawn is not None  # masks then have a last channel that says where they are drawn
        if self.partly:
            drawn = self.data.drawn[
                known
            ]  # masks are moved as products with it: between two slices the drawn one counts
            self.masks = torch.cat((self.masks * drawn, drawn), 1)
        self.unlabelled = self.data.images[self.data.unlabelled]

    def move(self, images, masks, generator, bend=True):
        """Images and masks, moved alike: see augment.place."""
        spacing = self.experiment.cohort.spacing
        return place(images, masks, generator, self.options.augmentation, self.data.symmetric, bend, spacing)

    def light(self, images, generator):
        """Images with other intensities, every channel by itself: see augment.light."""
        return light(images.flatten(0, 1)[:, None], generator, self.options.augmentation).view_as(images)

    def known(self, count, generator, bend=True):
        """``count`` labelled images and their masks, augmented."""
        index = draw_indices(len(self.labelled), count, generator)
        images, masks = self.move(self.labelled[index], self.masks[index], generator, bend)
        return self.light(images, generator), masks

    def free(self, count, generator):
        """``count`` unlabelled images, moved but not lit anew."""
        images = self.unlabelled[draw_indices(len(self.unlabelled), count, generator)]
        return self.move(images, images[:, :0], generator)[0]

    def student(self, images):
        """Logits of the network that is trained."""
        with self.numerics.autocast():
            return self.networks.student(images)

    @torch.no_grad()
    def teacher(self, images):
        """Probabilities by the averaged weights; no gradient reaches them."""
        with self.numerics.autocast():
            return self.networks.teacher.segment(images)

    def guessed(self, masks):
        """Masks by a network, as those that were drawn: everywhere."""
        return torch.cat((masks, torch.ones_like(masks[:, :1])), 1) if self.partly else masks

    def loss(self, logits, target, weight=None):
        """losses.segmentation_loss, pooled where images are slices of volumes; what is not drawn does not count."""
        if self.partly:
            target, drawn = target[:, :-1], target[:, -1:]
            target = (target / drawn.clamp_min(1e-3)).clamp(0, 1)
            weight = drawn if weight is None else weight * drawn
        return segmentation_loss(logits, target, self.experiment.pooled, weight)


def labelled_loss(lesson, generator, step):
    """A batch_loss of ``learn``: labelled images alone."""
    images, masks = lesson.known(lesson.training.batch, generator)
    return {"loss": lesson.loss(lesson.student(images), masks)}


def taught_loss(lesson, taught, generator):
    """The loss of a batch that is half labelled and half unlabelled, the latter with the masks that it was taught.

    Args:
        taught: masks ``(unlabelled, classes, height, width)`` in [0, 1] of all unlabelled images.
    """
    half = lesson.training.batch // 2
    known, masks = lesson.known(half, generator)
    index = draw_indices(len(taught), half, generator)
    free, target = lesson.move(lesson.unlabelled[index], taught[index], generator)
    images = torch.cat((known, lesson.light(free, generator)))
    return {"loss": lesson.loss(lesson.student(images), torch.cat((masks, target)))}


def learn(experiment, stage, batch_loss, depends=(), part=1.0, label=None, start=None):
    """Train a network by the rules of recipe `strong`.

    Args:
        stage: name of the method's stage; seeds the draws.
        batch_loss: function of Lesson, generator and step that gives named losses, ``loss`` first.
        depends: plain values that say what else the batches are made of: causes, such as the digest of a network, and
            no sums of what it gave, which may differ in their last bits on a GPU.
        part: of the steps.
        label: of the progress bar; None for the stage's name.
        start: the network to go on from; None for a fresh one.

    Returns:
        (ResidualUNet with the averaged weights, Fit). With ``selection: validation`` they are the best ones on the
        validation images, else those after the last step.
    """
    settings, numerics = experiment.settings, experiment.numerics
    options = settings.strong.training
    network = experiment.segmentation_network()
    if start is not None:
        network.load_state_dict(start.state_dict())
    networks = numerics.place(MeanTeacher(network, options.decay))
    lesson = Lesson(experiment, networks)
    steps = round(part * options.steps)
    chosen = settings.selection == "validation"
    key = fingerprint(
        experiment.origin,
        STRONG,
        stage,
        options,
        settings.strong.augmentation,
        settings.strong.get(stage),
        steps,
        weights_digest(networks),
        experiment.data.labelled.tolist(),
        list(depends),
        settings.selection,
        *["watched"] * bool(experiment.watch),  # what was begun without it would lack the first looks
    )

    def after_step():
        networks.update()
        experiment.after_step()

    found = fit(
        networks,
        lambda generator, step: batch_loss(lesson, generator, step),
        steps=steps,
        peak=options.learning_rate,
        schedule="one_cycle",
        weight_decay=options.weight_decay,
        generator=numerics.generator(settings.seed, *SEEDS, stage),
        label=label or stage,
        checkpoint=experiment.cabinet.checkpoint(key),
        validate=(lambda trained: validation_dice(experiment, trained.teacher)) if chosen else None,
        after_step=after_step,
        watch=(lambda trained: experiment.watch(trained.teacher)) if experiment.watch else None,
        checks=CHECKS if chosen else max(1, round(CHECKS * part)),
    )
    return networks.teacher, found


def teach(experiment, stage, batch_loss, **options):
    """``learn``, with its options, and save the network: (ResidualUNet, Fit)."""
    network, found = learn(experiment, stage, batch_loss, **options)
    save_network(experiment, stage, network, found)
    return network, found


def prediction(experiment, index, stage, method):
    """Masks of one method of recipe `strong`, as methods.table has them."""
    network = experiment.segmentation_network()
    network.load_state_dict(experiment.cabinet.load(stage)["network"])
    return {method: Prediction(0, segment(experiment, network, index))}
