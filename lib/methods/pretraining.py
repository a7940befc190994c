"""Pre-training of both networks: iteration 0 of P1, and the training that joint rounds continue (section 2.1)."""

import torch

from lib.losses import registration_loss, soft_dice_loss
from lib.methods.experiment import Prediction
from lib.metrics import dice
from lib.models import pad_to_multiple
from lib.runs.versions import fingerprint
from lib.training import draw_indices, fit, steps_of, weights_digest

NEAREST_OF = 8  # slices of volumes are paired with the nearest along the axis of so many


def train_segmentation(experiment, network, images, masks, *, steps, peak, label, names, depends):
    """Minimise the soft Dice loss, eq. (1), of ``network`` on images and (soft) masks.

    Args:
        experiment: Experiment.
        network: ResidualUNet, trained in place.
        images, masks: ``(n, 1, *space)`` and ``(n, classes, *space)`` on the device.
        steps: of the optimiser.
        peak: learning rate.
        label: of the progress bar.
        names: words and numbers that seed the draws and name the work.
        depends: plain values that say what the images and masks are: causes, such as the indices of labelled images and
            digests of networks, and no sums, which may differ in their last bits on a GPU.

    Returns:
        Fit. The network ends with the weights that were best on the validation images.
    """
    settings, numerics = experiment.settings, experiment.numerics
    options = settings.segmentation

    def batch_loss(generator, step):
        index = draw_indices(len(images), options.batch, generator)
        batch, target = images[index], masks[index]
        with numerics.autocast():
            prediction = network.segment(batch)
        return {"loss": soft_dice_loss(prediction, target, experiment.pooled)}

    key = fingerprint(
        experiment.origin, "segmentation", options, names, steps, peak, weights_digest(network), list(depends)
    )
    return fit(
        network,
        batch_loss,
        steps=steps,
        peak=peak,
        schedule=options.schedule,
        weight_decay=options.weight_decay,
        generator=numerics.generator(settings.seed, *names),
        label=label,
        checkpoint=experiment.cabinet.checkpoint(key),
        validate=lambda trained: validation_dice(experiment, trained),
    )


def train_registration(experiment, network, images, masks, *, steps, peak, label, names, depends, positions=None):
    """Minimise the registration objective, eq. (3), of ``network`` on random pairs of images.

    Args:
        masks: ``(n, classes, *space)`` that guide the registration, or None in pre-training.
        steps: of the optimiser.
        positions: ``(n,)`` of the images along the axis of their volumes: each is then paired with the nearest of
            NEAREST_OF drawn ones; None pairs at random.
        The other arguments are those of train_segmentation.

    Returns:
        Fit. The network ends with the weights of the last step.
    """
    settings, numerics = experiment.settings, experiment.numerics
    options = settings.registration

    def batch_loss(generator, step):
        index = draw_indices(len(images), 2 * options.batch, generator)
        if positions is not None:
            drawn = torch.randint(len(images), (options.batch, NEAREST_OF), generator=generator, device=index.device)
            distance = (positions[drawn] - positions[index[: options.batch], None]).abs()
            index[options.batch :] = drawn.gather(1, distance.argmin(1, keepdim=True))[:, 0]
        batch = images[index]
        guides = masks[index] if masks is not None else images[index, :0]
        (both,) = pad_to_multiple(network.strides, torch.cat((batch, guides), 1))
        batch, guides = both[:, :1], both[:, 1:]
        half = options.batch
        with numerics.autocast():
            levels = network(batch[:half], batch[half:])
        pair = (guides[:half], guides[half:]) if masks is not None else (None, None)
        losses = registration_loss(levels, batch[:half], batch[half:], options.smoothness, *pair)
        named = {"loss": losses.total, "similarity": losses.similarity, "smoothness": losses.smoothness}
        return named if masks is None else {**named, "dice": losses.dice}

    key = fingerprint(
        experiment.origin,
        "registration",
        options,
        names,
        steps,
        peak,
        weights_digest(network),
        list(depends),
    )
    return fit(
        network,
        batch_loss,
        steps=steps,
        peak=peak,
        schedule=options.schedule,
        weight_decay=options.weight_decay,
        generator=numerics.generator(settings.seed, *names),
        label=label,
        checkpoint=experiment.cabinet.checkpoint(key),
    )


@torch.no_grad()
def mean_dice(experiment, network, index):
    """Mean DSC, a float, of a segmentation network on the images ``index``."""
    return float(dice(segment(experiment, network, index), experiment.data.masks[index]).mean())


def validation_dice(experiment, network):
    """Mean DSC of a segmentation network on the validation images."""
    return mean_dice(experiment, network, experiment.data.validation)


def pretrain_segmentation(experiment):
    """Iteration 0 of the segmentation network: the labelled images alone (P1, section 2.1). Also the FS baseline.

    Returns:
        (ResidualUNet, Fit). The weights are saved under work/models.
    """
    options, data = experiment.settings.segmentation, experiment.data
    network = experiment.segmentation_network()
    found = train_segmentation(
        experiment,
        network,
        data.images[data.labelled],
        data.masks[data.labelled],
        steps=steps_of(options.epochs, len(data.labelled), options.batch, options.max_steps),
        peak=options.learning_rate,
        label="segmentation",
        names=("segmentation", "pretraining"),
        depends=data.labelled.tolist(),
    )
    save_network(experiment, "segmentation", network, found)
    return network, found


def pretrain_registration(experiment):
    """Iteration 0 of the registration network: random pairs of all training images, no masks (P1, section 2.1).

    Returns:
        (MrRegNet, Fit). The weights are saved under work/models.
    """
    options, data = experiment.settings.registration, experiment.data
    network = experiment.registration_network()
    found = train_registration(
        experiment,
        network,
        data.guides[data.train],
        None,
        steps=steps_of(options.epochs, len(data.train), options.batch, options.max_steps),
        peak=options.learning_rate,
        label="registration",
        names=("registration", "pretraining"),
        depends=(),
        positions=data.positions(data.train),
    )
    save_network(experiment, "registration", network, found)
    return network, found


def save_network(experiment, stage, network, found):
    """Save what a stage has trained, what was watched, and what it cost."""
    experiment.cabinet.save({"network": network.state_dict(), "watched": found.watched}, stage)
    experiment.note_cost(stage, found.seconds)


def segment(experiment, network, index):
    """Masks of the images ``index`` by a segmentation network: ``(n, classes, *space)`` in [0, 1]."""
    images, numerics = experiment.data.images[index], experiment.numerics
    with numerics.autocast():
        return torch.cat([network.eval().segment(batch) for batch in images.split(numerics.batch(images))])


def predict(experiment, index):
    """Masks of ``fs``: the segmentation network pre-trained on the labelled images. See methods.table."""
    network = experiment.segmentation_network()
    network.load_state_dict(experiment.cabinet.load("segmentation")["network"])
    return {"fs": Prediction(0, segment(experiment, network, index))}
