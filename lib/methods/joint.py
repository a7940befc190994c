"""Joint rounds (P1, sections 2.1 and 2.2): both networks teach each other through soft pseudo-masks."""

from typing import NamedTuple

import pandas as pd
import torch

from lib.losses import gncc
from lib.methods.experiment import load_pretrained, predict_rounds, rounds_of
from lib.methods.pretraining import train_registration, train_segmentation
from lib.metrics import dice
from lib.pseudo_masks import mean_confidence
from lib.training import steps_of, weights_digest
from lib.warping import inverse_consistency_error, warp


class Rounds(NamedTuple):
    """What rounds of joint training give."""

    measured: pd.DataFrame  # one row per round and split
    history: pd.DataFrame  # one row per optimiser step


@torch.no_grad()
def registration_quality(experiment, network, index, *names):
    """How well one random labelled image is registered to each image; draws are seeded by ``names``.

    Returns:
        Dictionary of means: dsc_unregistered and dsc_single of the source's mask before and after warping,
        gncc_before and gncc_after, and inverse_consistency in pixels.
    """
    network.eval()
    data, numerics = experiment.data, experiment.numerics
    generator = numerics.generator(experiment.settings.seed, "quality", *names)
    sources = data.labelled[experiment.draw_sources(index, 1, generator)[:, 0]]
    parts = []
    for targets, chosen in zip(index.split(numerics.batch(data.images)), sources.split(numerics.batch(data.images))):
        source, target, truth = data.images[chosen], data.images[targets], data.masks[targets]
        with numerics.autocast():
            there, back = network.register(source, target), network.register(target, source)
        parts.append(
            torch.stack(
                [
                    dice(data.masks[chosen], truth).mean(1),
                    dice(warp(data.masks[chosen], there), truth).mean(1),
                    gncc(source, target),
                    gncc(warp(source, there), target),
                    inverse_consistency_error(there, back),
                ]
            )
        )
    names = ("dsc_unregistered", "dsc_single", "gncc_before", "gncc_after", "inverse_consistency")
    values = torch.cat(parts, dim=1)
    values[:2, ~data.known(index)] = torch.nan  # there is no true mask to compare with
    return dict(zip(names, [*values[:2].nanmean(dim=1).tolist(), *values[2:].mean(dim=1).tolist()]))


def measure(experiment, networks, masks, split, number):
    """A row of rounds.csv and registration.csv: what both networks are worth after round ``number``.

    Args:
        masks: PseudoMasks of the images of ``split`` (validation or unlabelled).
    """
    index = getattr(experiment.data, split)
    known = experiment.data.known(index)
    truth = experiment.data.masks[index[known]]
    return {
        "round": number,
        "split": split,
        "n": len(index),
        "dsc_segmentation": float(dice(masks.plain[known], truth).mean()),
        "dsc_registration": float(dice(masks.registration[known], truth).mean()),
        "dsc_pseudo_masks": float(dice(masks.soft[known], truth).mean()),
        "mean_confidence": float(mean_confidence(masks.soft).mean()),
        "folding": float(masks.folding.mean()),
        **registration_quality(experiment, networks[1], index, split),
    }


def save_round(experiment, number, networks, measured):
    """Save both networks after a round, with what was measured of them."""
    weights = {name: network.state_dict() for name, network in zip(("segmentation", "registration"), networks)}
    experiment.cabinet.save({**weights, "measured": measured}, "joint", number)


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
    everything = torch.cat((data.labelled, data.unlabelled))
    images = data.images[everything]
    rows, histories, seconds = [], [], 0.0
    for number in range(options.rounds + 1):
        masks = {
            split: experiment.generate(
                networks, getattr(data, split), f"round {number}: {split} images", "joint", split, number
            )
            for split in ("validation", "unlabelled")
        }
        measured = [measure(experiment, networks, masks[split], split, number) for split in masks]
        rows += measured
        save_round(experiment, number, networks, measured)
        if number == options.rounds:
            break
        targets = torch.cat((data.masks[data.labelled], masks["unlabelled"].soft))
        after = number + 1
        depends = [data.labelled.tolist(), *map(weights_digest, networks)]
        for train, network, epochs, peak, more in (
            (train_segmentation, networks[0], options.segmentation_epochs, options.segmentation_learning_rate, {}),
            (
                train_registration,
                networks[1],
                options.registration_epochs,
                options.registration_learning_rate,
                {"positions": data.positions(everything)},
            ),
        ):
            name = train.__name__.removeprefix("train_")
            steps = steps_of(epochs, len(images), settings[name].batch)
            found = train(
                experiment,
                network,
                images,
                targets,
                steps=steps,
                peak=peak,
                label=f"round {after}: {name}",
                names=("joint", name, after),
                depends=depends,
                **more,
            )
            seconds += found.seconds
            histories.append(found.history.assign(round=after, network=name))
    experiment.note_cost("joint", seconds)
    return Rounds(pd.DataFrame(rows), pd.concat(histories, ignore_index=True))


def predict(experiment, index):
    """Masks of ``joint``, ``registration`` and ``combined``. See methods.table."""
    return predict_rounds(experiment, index)


def rounds(experiment):
    """Rows of rounds.csv. See methods.table."""
    return rounds_of(experiment)
