"""joint+: joint training in which one network may be much better than the other.

P1 averages all masks with equal weight and trains on the average. If one network is much better, the average is worse
than that one and drags it down. Here instead

- every displacement field is *refined* for its own pair of images (lib.refinement);
- registration makes *training pairs*: a labelled image and its mask, warped by the same field onto the anatomy of an
  unlabelled image. The mask fits its image whatever the field, since both are warped alike. Closest relatives: Zhao et
  al., "Data augmentation using learned transformations for one-shot medical image segmentation", CVPR 2019; Xu and
  Niethammer, "DeepAtlas", MICCAI 2019;
- soft pseudo-masks are *fused by reliability*: the weight of each network is chosen on the validation images;
- labelled images keep a fixed share of every batch, all images are augmented in all rounds, and the average of the
  weights over the steps is what is validated and tested.
"""

from typing import NamedTuple

import pandas as pd
import torch

from lib.augment import augment
from lib.losses import soft_dice_loss
from lib.methods.experiment import load_pretrained, predict_rounds, rounds_of
from lib.methods.joint import Rounds, measure, save_round
from lib.methods.mean_teacher import MeanTeacher
from lib.methods.pretraining import train_registration, validation_dice
from lib.metrics import dice
from lib.pseudo_masks import fuse
from lib.refinement import refined
from lib.runs.versions import JOINT_PLUS, fingerprint
from lib.training import draw_indices, fit, steps_of, sums_of, weights_digest
from lib.warping import warp

WEIGHTS = torch.linspace(0, 1, 21)
STAGE = "joint_plus"
METHODS = "registration+", "joint+", "combined+"


def fusion_weight(masks, truth):
    """The weight of the segmentation masks at which fused masks have the highest mean DSC.

    Args:
        masks: PseudoMasks of the validation images; truth: their true masks.

    Returns:
        Float in [0, 1]; of equally good weights the one nearest to one half, P1's plain mean.
    """
    scores = torch.tensor([float(dice(fuse(masks, weight).soft, truth).mean()) for weight in WEIGHTS.tolist()])
    good = WEIGHTS[scores >= scores.max() - 1e-6]
    return float(good[(good - 0.5).abs().argmin()])


class Pairs(NamedTuple):
    """Fields that take labelled images to unlabelled anatomy."""

    sources: torch.Tensor  # (n,) positions among the labelled images
    targets: torch.Tensor  # (n,) positions among the unlabelled images
    fields: torch.Tensor  # (n, 2, height, width)

    def draw(self, images, masks, unlabelled, count, style, generator):
        """``count`` of the labelled images and masks, each warped by a field that was made for it.

        Args:
            images, masks: the labelled ones; unlabelled: the images that the fields lead to.
            style: share of the warped images that take on the grey values of the image that they are warped onto.
        """
        index = draw_indices(len(self.sources), count, generator)
        chosen = self.sources[index]
        warped, warped_masks = warp_pairs(images[chosen], masks[chosen], self.fields[index])
        if style:
            styled = match_histogram(warped, unlabelled[self.targets[index]])
            taken = torch.rand(count, generator=generator, device=generator.device) < style
            warped = torch.where(taken[:, None, None, None], styled, warped)
        return warped, warped_masks


def match_histogram(images, references):
    """Images ``(n, 1, height, width)`` with the grey values of ``references``: the k-th darkest pixel gets the k-th."""
    order = images.flatten(1).argsort(dim=1, stable=True)
    values = references.flatten(1).sort(dim=1).values
    return torch.empty_like(values).scatter_(1, order, values).reshape(images.shape)


def warp_pairs(images, masks, fields):
    """Images and their masks, both warped by the same fields: (images, masks)."""
    both = warp(torch.cat((images, masks), 1), fields)
    return both[:, :1], both[:, 1:]


@torch.no_grad()
def make_pairs(experiment, network, per_image, number):
    """Pairs: ``per_image`` random labelled images registered to every unlabelled one by MrRegNet, or by Refined."""
    network.eval()
    data, numerics = experiment.data, experiment.numerics
    generator = numerics.generator(experiment.settings.seed, "pairs", number)
    per_image = min(per_image, len(data.labelled))
    sources = experiment.draw_sources(data.unlabelled, per_image, generator).T.flatten()
    targets = data.unlabelled.repeat(per_image)
    fields = []
    for chosen, index in zip(sources.split(numerics.batch(data.images)), targets.split(numerics.batch(data.images))):
        with numerics.autocast():
            fields.append(network.register(data.images[data.labelled[chosen]], data.images[index]))
    unlabelled = torch.arange(len(data.unlabelled), device=sources.device)
    return Pairs(sources, unlabelled.repeat(per_image), torch.cat(fields))


def train_on_mixture(experiment, network, pairs, soft, number):
    """Continue the segmentation network on batches of labelled images, warped pairs and pseudo-labelled images.

    Args:
        network: ResidualUNet, trained in place.
        pairs: Pairs, or None.
        soft: soft masks of the unlabelled images, or None.
        number: of the round.

    Returns:
        Fit. The network ends with the (averaged) weights that were best on the validation images.
    """
    settings, numerics, data = experiment.settings, experiment.numerics, experiment.data
    options, recipe = settings.joint_plus, settings.segmentation
    labelled, masks, unlabelled = data.images[data.labelled], data.masks[data.labelled], data.images[data.unlabelled]
    free = [part for part in ("pairs", "pseudo") if (pairs if part == "pairs" else soft) is not None]
    # Labelled images keep a fixed share, however many others there are. Pairs and pseudo-labels share the rest.
    fixed = max(1, round(options.labelled * options.batch)) if free else options.batch
    counts = {part: (options.batch - fixed + k) // len(free) for k, part in enumerate(free)}
    counts = {part: count for part, count in counts.items() if count}  # a batch of one holds a labelled image alone
    # The teacher teaches nothing here: it is the average of the weights.
    networks = numerics.place(MeanTeacher(network, options.decay))
    tested = networks.teacher if options.decay else networks.student

    def batch_loss(generator, step):
        index = draw_indices(len(labelled), fixed, generator)
        images, targets = [labelled[index]], [masks[index]]
        if "pairs" in counts:
            warped = pairs.draw(labelled, masks, unlabelled, counts["pairs"], options.style, generator)
            images.append(warped[0])
            targets.append(warped[1])
        if "pseudo" in counts:
            index = draw_indices(len(unlabelled), counts["pseudo"], generator)
            images.append(unlabelled[index])
            targets.append(soft[index])
        images, targets = torch.cat(images), torch.cat(targets)
        if recipe.augmentation == "strong":
            images, targets = augment(images, targets, generator, settings.augmentation, data.symmetric)
        with numerics.autocast():
            prediction = networks.student.segment(images)
        return {"loss": soft_dice_loss(prediction, targets, experiment.pooled)}

    key = fingerprint(
        experiment.origin,
        JOINT_PLUS,
        {name: value for name, value in options.items() if name != "rounds"},  # more rounds leave the first as they are
        recipe,
        number,
        weights_digest(network),
        sums_of(labelled, masks, soft, pairs and pairs.fields.square()),
    )
    found = fit(
        networks,
        batch_loss,
        steps=steps_of(options.segmentation_epochs, len(data.train), options.batch),
        peak=options.learning_rate,
        schedule=recipe.schedule,
        weight_decay=recipe.weight_decay,
        generator=numerics.generator(settings.seed, "joint+", number),
        label=f"round {number}: segmentation",
        checkpoint=experiment.cabinet.checkpoint(key),
        validate=lambda trained: validation_dice(experiment, tested),
        after_step=networks.update,
    )
    network.load_state_dict(tested.state_dict())  # the next round goes on from the average
    return found


def joint_plus_rounds(experiment):
    """Rounds of joint+, from the two pre-trained networks.

    Returns:
        Rounds. All of them are saved under work/models; the best on the validation images is tested.
    """
    settings, data = experiment.settings, experiment.data
    options = settings.joint_plus
    networks = load_pretrained(experiment)
    everything = torch.cat((data.labelled, data.unlabelled))
    images = data.images[everything]
    truth = data.masks[data.validation]
    rows, histories, seconds = [], [], 0.0
    seen = seeing(experiment, networks)
    for number in range(options.rounds + 1):
        masks = {
            split: experiment.generate(
                seen, getattr(data, split), f"round {number}: {split} images", "joint+", split, number
            )
            for split in ("validation", "unlabelled")
        }
        weight = fusion_weight(masks["validation"], truth) if options.fusion == "validation" else 0.5
        masks = {split: fuse(found, weight) for split, found in masks.items()}
        measured = [{**measure(experiment, seen, masks[split], split, number), "weight": weight} for split in masks]
        rows += measured
        save_round(experiment, "joint_plus", number, networks, measured, weight=weight)
        if number == options.rounds:
            break
        soft, after = masks["unlabelled"].soft, number + 1
        segmentation, registration = networks
        if options.guidance:
            guides = torch.cat((data.masks[data.labelled], soft))
            steps = steps_of(options.registration_epochs, len(images), settings.registration.batch)
            found = train_registration(
                experiment,
                registration,
                images,
                guides,
                steps=steps,
                peak=options.registration_learning_rate,
                label=f"round {after}: registration",
                names=("joint+", "registration", after),
                smoothness=[options.smoothness * value for value in settings.registration.smoothness],
                positions=data.positions(everything),
            )
            seconds += found.seconds
            histories.append(found.history.assign(round=after, network="registration"))
        pairs = make_pairs(experiment, seen[1], options.pairs_per_image, after) if options.pairs else None
        found = train_on_mixture(experiment, segmentation, pairs, soft if options.pseudo_labels else None, after)
        seconds += found.seconds
        histories.append(found.history.assign(round=after, network="segmentation"))
    experiment.note_cost("joint_plus", seconds)
    return Rounds(pd.DataFrame(rows), pd.concat(histories, ignore_index=True))


def seeing(experiment, networks):
    """The two networks as they make masks: every displacement field is refined."""
    return refined(networks, experiment.settings.joint_plus)


def predict(experiment, index):
    """Masks of ``joint+``, ``registration+`` and ``combined+``, every field refined. See methods.table."""
    return predict_rounds(experiment, index, STAGE, METHODS, lambda networks: seeing(experiment, networks))


def rounds(experiment):
    """Rows of rounds.csv. See methods.table."""
    return rounds_of(experiment, STAGE, "joint+", METHODS)
