"""Training: one resumable loop, the two pre-trainings and the joint rounds (P1, sections 2.1, 2.3 and 3.2)."""

import copy
import hashlib
import math
import time
from typing import NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from lib.augment import augment
from lib.evaluation import dice
from lib.experiment import load_pretrained, resume, save_atomically
from lib.losses import registration_loss, soft_dice_loss
from lib.models import pad_to_multiple
from lib.params import fingerprint, work_folder
from lib.pseudo_masks import mean_confidence

CHECKPOINT_SECONDS = 20
HOST_STEPS = 10  # steps between two looks at the loss, each of which waits for the GPU


def learning_rate(schedule, peak, step, steps):
    """``constant``, or ``one_cycle``: cosine warm-up over the first tenth, then cosine decay towards zero."""
    if schedule == "constant":
        return peak
    if schedule != "one_cycle":
        raise ValueError(f"schedule '{schedule}' in params.yaml is not one of constant, one_cycle")
    warm = max(1, steps // 10)
    if step < warm:
        return peak * (1 - math.cos(math.pi * (step + 1) / warm)) / 2
    return peak * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def fit(network, batch_loss, *, steps, peak, schedule, weight_decay, generator, key, label, validate=None, checks=20):
    """Train ``network`` by Adam; a killed run started again ends with the same weights, bit for bit.

    Args:
        network: on its device; trained in place.
        batch_loss: function of the generator that gives named losses, ``loss`` (minimised) first.
        steps: optimiser steps.
        peak, schedule, weight_decay: learning rate and its course (see learning_rate); decoupled weight decay.
        generator: for all draws; its state is part of the checkpoint.
        key: fingerprint of settings, data and initial weights. Names the checkpoint under work/checkpoints.
        label: of the progress bar.
        validate: function of the network that gives a score; the weights of the best score are kept.
        checks: how many times it is called, evenly spaced.

    Returns:
        pandas.DataFrame, one row per step: step, learning_rate, the losses, and validation where it was measured.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    device = next(network.parameters()).device
    optimiser = torch.optim.AdamW(network.parameters(), lr=peak, weight_decay=weight_decay, fused=True)
    file = work_folder("checkpoints", f"{key}.pt")
    history, best, best_score, start = [], None, -math.inf, 0
    saved = resume(file, key, device)
    if saved:
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        generator.set_state(saved["generator"].cpu())
        history, best, best_score, start = saved["history"], saved["best"], saved["best_score"], saved["step"]

    def checkpoint(step):
        save_atomically(
            {
                "fingerprint": key, "step": step, "network": network.state_dict(), "history": history,
                "optimiser": optimiser.state_dict(), "generator": generator.get_state(),
                "best": best, "best_score": best_score,
            },
            file,
        )

    pending, saved_at = [], time.monotonic()
    bar = tqdm(total=steps, initial=start, desc=label, unit="step", mininterval=1)
    for step in range(start, steps):
        network.train()
        rate = learning_rate(schedule, peak, step, steps)
        optimiser.param_groups[0]["lr"] = rate
        losses = batch_loss(generator)
        optimiser.zero_grad(set_to_none=True)
        next(iter(losses.values())).backward()
        optimiser.step()
        pending.append((step + 1, rate, torch.stack([value.detach() for value in losses.values()])))
        last = step + 1 == steps
        if (step + 1) % HOST_STEPS == 0 or last:
            values = torch.stack([parts for *_, parts in pending]).tolist()
            for (number, at_rate, _), row in zip(pending, values):
                if not all(map(math.isfinite, row)):
                    raise FloatingPointError(
                        f"{label}: the loss is not finite at step {number}; lower the learning rate in params.yaml"
                    )
                history.append({"step": number, "learning_rate": at_rate, **dict(zip(losses, row))})
            pending = []
            bar.set_postfix({name: f"{value:.3f}" for name, value in zip(losses, values[-1])}, refresh=False)
            if validate and (last or (step + 1) * checks // steps > (step + 1 - HOST_STEPS) * checks // steps):
                score = validate(network)
                history[-1]["validation"] = score
                if score >= best_score:
                    best, best_score = copy.deepcopy(network.state_dict()), score
            if last or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                checkpoint(step + 1)
                saved_at = time.monotonic()
        bar.update()
    bar.close()
    if best is not None:
        network.load_state_dict(best)
    return pd.DataFrame(history)


def draw_indices(count, batch, generator):
    """``(batch,)`` random indices below ``count``, all different where there are enough."""
    order = [
        torch.randperm(count, generator=generator, device=generator.device) for _ in range(-(-batch // count))
    ]
    return torch.cat(order)[:batch]


def steps_of(epochs, images, batch):
    """Optimiser steps of so many passes over so many images."""
    return max(1, round(epochs * images / batch))


def weights_digest(network):
    """A hash of a network's weights, so that a checkpoint is not resumed from other ones."""
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train_segmentation(experiment, network, images, masks, *, epochs, peak, label, names):
    """Minimise the soft Dice loss, eq. (1), of ``network`` on images and (soft) masks.

    Args:
        experiment: Experiment.
        network: ResidualUNet, trained in place.
        images, masks: ``(n, 1, height, width)`` and ``(n, classes, height, width)`` on the device.
        epochs: passes over the images.
        peak: learning rate.
        label: of the progress bar.
        names: words and numbers that seed the draws and name the work.

    Returns:
        History, see fit. The network ends with the weights that were best on the validation images.
    """
    settings, numerics, data = experiment.settings, experiment.numerics, experiment.data
    options = settings.segmentation

    def batch_loss(generator):
        index = draw_indices(len(images), options.batch, generator)
        batch, target = images[index], masks[index]
        if options.augmentation == "strong":
            batch, target = augment(batch, target, generator, settings.augmentation, data.symmetric)
        with numerics.autocast():
            prediction = network.segment(batch)
        return {"loss": soft_dice_loss(prediction, target)}

    steps = steps_of(epochs, len(images), options.batch)
    key = fingerprint(experiment.origin, "segmentation", options, names, steps, peak, weights_digest(network),
                      float(masks.double().sum()))
    return fit(
        network, batch_loss, steps=steps, peak=peak, schedule=options.schedule, weight_decay=options.weight_decay,
        generator=numerics.generator(settings.seed, *names), key=key, label=label,
        validate=lambda trained: validation_dice(experiment, trained),
    )


def train_registration(experiment, network, images, masks, *, epochs, peak, label, names):
    """Minimise the registration objective, eq. (3), of ``network`` on random pairs of images.

    Args:
        masks: ``(n, classes, height, width)`` that guide the registration, or None in pre-training.
        The other arguments are those of train_segmentation.

    Returns:
        History, see fit. The network ends with the weights of the last step.
    """
    settings, numerics, data = experiment.settings, experiment.numerics, experiment.data
    options = settings.registration

    def batch_loss(generator):
        index = draw_indices(len(images), 2 * options.batch, generator)
        batch = images[index]
        guides = masks[index] if masks is not None else images[index, :0]
        if options.augmentation == "strong":
            batch, guides = augment(batch, guides, generator, settings.augmentation, data.symmetric)
        (both,) = pad_to_multiple(torch.cat((batch, guides), 1))
        batch, guides = both[:, :1], both[:, 1:]
        half = options.batch
        with numerics.autocast():
            levels = network(batch[:half], batch[half:])
        pair = (guides[:half], guides[half:]) if masks is not None else (None, None)
        losses = registration_loss(levels, batch[:half], batch[half:], options.smoothness, *pair)
        named = {"loss": losses.total, "similarity": losses.similarity, "smoothness": losses.smoothness}
        return named if masks is None else {**named, "dice": losses.dice}

    steps = steps_of(epochs, len(images), options.batch)
    key = fingerprint(experiment.origin, "registration", options, names, steps, peak, weights_digest(network),
                      None if masks is None else float(masks.double().sum()))
    return fit(
        network, batch_loss, steps=steps, peak=peak, schedule=options.schedule, weight_decay=options.weight_decay,
        generator=numerics.generator(settings.seed, *names), key=key, label=label,
    )


@torch.no_grad()
def validation_dice(experiment, network):
    """Mean DSC of the segmentation network on the validation images."""
    network.eval()
    data, masks = experiment.data, []
    images = data.images[data.validation]
    for batch in images.split(experiment.numerics.batch(images)):
        with experiment.numerics.autocast():
            masks.append(network.segment(batch))
    return float(dice(torch.cat(masks), data.masks[data.validation]).mean())


def pretrain_segmentation(experiment):
    """Iteration 0 of the segmentation network: the labelled images alone (P1, section 2.1). Also the FS baseline.

    Returns:
        (ResidualUNet, history). The weights are saved under work/models.
    """
    options, data = experiment.settings.segmentation, experiment.data
    network = experiment.segmentation_network()
    history = train_segmentation(
        experiment, network, data.images[data.labelled], data.masks[data.labelled], epochs=options.epochs,
        peak=options.learning_rate, label="segmentation", names=("segmentation", "pretraining"),
    )
    save_atomically({"network": network.state_dict()}, experiment.model_file("segmentation"))
    return network, history


def pretrain_registration(experiment):
    """Iteration 0 of the registration network: random pairs of all training images, no masks (P1, section 2.1).

    Returns:
        (MrRegNet, history). The weights are saved under work/models.
    """
    options, data = experiment.settings.registration, experiment.data
    network = experiment.registration_network()
    history = train_registration(
        experiment, network, data.images[data.train], None, epochs=options.epochs, peak=options.learning_rate,
        label="registration", names=("registration", "pretraining"),
    )
    save_atomically({"network": network.state_dict()}, experiment.model_file("registration"))
    return network, history


class Rounds(NamedTuple):
    """What joint training gives."""

    measured: pd.DataFrame  # one row per round and split
    history: pd.DataFrame  # one row per optimiser step


def measure(masks, truth, split, number):
    """A row of rounds.csv: DSC of both networks and of the soft pseudo-masks, confidence and folding."""
    return {
        "round": number,
        "split": split,
        "n": len(truth),
        "dsc_segmentation": float(dice(masks.plain, truth).mean()),
        "dsc_registration": float(dice(masks.registration, truth).mean()),
        "dsc_pseudo_masks": float(dice(masks.soft, truth).mean()),
        "mean_confidence": float(mean_confidence(masks.soft).mean()),
        "folding": float(masks.folding.mean()),
    }


def joint_rounds(experiment):
    """The joint rounds (P1, section 2.1): soft pseudo-masks, then both networks continue on them, again and again.

    In every round both networks give soft pseudo-masks to the unlabelled images; the segmentation network
    continues on labelled and pseudo-labelled images, the registration network on random pairs of them, guided
    by the masks. All rounds are saved under work/models; none is discarded, so that the best one on the
    validation images can be tested.

    Returns:
        Rounds. True masks of unlabelled images are used for its columns alone, never for training or choosing.
    """
    settings, data = experiment.settings, experiment.data
    options = settings.joint
    networks = load_pretrained(experiment)
    images = torch.cat((data.images[data.labelled], data.images[data.unlabelled]))
    truth = {"validation": data.masks[data.validation], "unlabelled": data.masks[data.unlabelled]}
    rows, histories = [], []
    for number in range(options.rounds + 1):
        soft = experiment.generate(networks, data.images[data.unlabelled], f"round {number}: pseudo-masks",
                              "joint", "unlabelled", number)
        seen = experiment.generate(networks, data.images[data.validation], f"round {number}: validation",
                              "joint", "validation", number)
        measured = [measure(masks, truth[split], split, number)
                    for split, masks in (("validation", seen), ("unlabelled", soft))]
        rows += measured
        segmentation, registration = networks
        save_atomically(
            {"segmentation": segmentation.state_dict(), "registration": registration.state_dict(),
             "measured": measured},
            experiment.model_file("joint", number),
        )
        if number == options.rounds:
            break
        masks = torch.cat((data.masks[data.labelled], soft.soft))
        after = number + 1
        for train, network, epochs, peak in (
            (train_segmentation, segmentation, options.segmentation_epochs, options.segmentation_learning_rate),
            (train_registration, registration, options.registration_epochs, options.registration_learning_rate),
        ):
            name = train.__name__.removeprefix("train_")
            history = train(experiment, network, images, masks, epochs=epochs, peak=peak,
                            label=f"round {after}: {name}", names=("joint", name, after))
            histories.append(history.assign(round=after, network=name))
    return Rounds(pd.DataFrame(rows), pd.concat(histories, ignore_index=True))
