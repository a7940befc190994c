"""CCT-R (P2): two networks of different kind teach each other, helped by registration.

Network A is the residual U-Net, network B a Swin-transformer U-Net. On unlabelled images each is taught by the other's
most probable classes (*cross teaching*), and both by the labels of the best registered labelled volume (*registration
supervision*, RSL). Features of both, projected to one space, are drawn to those of their class (*pixel contrast*) and
to those of the anatomically corresponding pixel in every registered volume (*registration-enhanced positives*, REPS):
here in all labelled volumes, for the pixels of unlabelled images.
"""

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from lib.augment import draw_affine, light
from lib.losses import soft_dice_loss
from lib.methods.cctr.contrast import Bank, describe, pixel_contrast, pixels
from lib.methods.cctr.learners import Learner, SwinUNet
from lib.methods.experiment import Prediction, load_pretrained_registration
from lib.methods.mean_teacher import ramp_up
from lib.methods.pretraining import mean_dice, save_network, segment, validation_dice
from lib.metrics import dice, to_labels
from lib.models import ResidualUNet
from lib.runs.params import Section
from lib.runs.versions import CCTR, fingerprint
from lib.training import draw_indices, fit, weights_digest


class CrossTeaching(nn.Module):
    """Both learners, and the bank; what is trained, saved and resumed as one."""

    def __init__(self, classes, labelled, size, options, normalisation):
        super().__init__()
        dimension, stride = options.dimension, options.stride
        self.first = Learner(ResidualUNet(classes + 1, normalisation), 16, classes, dimension, stride)
        self.second = Learner(SwinUNet(options.width), options.width, classes, dimension, stride)
        shape = (dimension, *(side // stride for side in size))
        self.bank = Bank(labelled, shape, stride) if options.reps else None


def foreground_dice(logits, masks, pooled):
    """Soft Dice loss of logits, background first, against foreground masks ``(batch, classes, height, width)``."""
    return soft_dice_loss(logits.softmax(1)[:, 1:], masks, pooled)


def supervised_loss(logits, masks, pooled):
    """Cross-entropy plus soft Dice against foreground masks."""
    return F.cross_entropy(logits, to_labels(masks)) + foreground_dice(logits, masks, pooled)


def taught_loss(logits, teacher, pooled):
    """Soft Dice against the teacher's most probable classes; no gradient reaches the teacher."""
    labels = F.one_hot(teacher.detach().argmax(1), teacher.shape[1]).movedim(-1, 1)
    return foreground_dice(logits, labels[:, 1:], pooled)


def cross_teaching_loss(first, second, pooled):
    """Each network taught by the other on the same unlabelled images; P2, cross teaching.

    Args:
        first, second: logits of the two, background first, ``(batch, classes + 1, height, width)``.
        pooled: see ``losses.soft_dice_loss``.

    Returns:
        Scalar: the sum of ``taught_loss`` both ways.
    """
    return taught_loss(first, second, pooled) + taught_loss(second, first, pooled)


def both_networks(experiment, **changes):
    """CrossTeaching with the seed's initial weights, on the device; ``changes`` of section ``cctr``."""
    settings, data = experiment.settings, experiment.data
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        networks = CrossTeaching(
            len(experiment.cohort.classes),
            len(data.labelled),
            data.images.shape[-2:],
            Section({**settings.cctr, **changes}),
            settings.segmentation.normalisation,
        )
    return networks.to(experiment.numerics.device)  # not channels last, from which every normalisation would copy


def load_cctr(experiment):
    """Both networks as ``train_cctr`` saved them."""
    networks = both_networks(experiment, reps=0)  # the bank is needed for training alone
    networks.load_state_dict(experiment.cabinet.load("cctr")["network"])
    return networks


def train_cctr(experiment, correspondence):
    """Train both networks (P2), by the budget and the augmentation of recipe `strong`.

    Each ends with the weights of the last step; with ``selection: validation`` with its own best ones on those images.

    Args:
        experiment: Experiment.
        correspondence: Correspondence.

    Returns:
        (CrossTeaching, Fit). Fit's ``watched`` have ``dsc`` ``(2,)``, of the pseudo-labels of A and B on the slices of
        ``watched_slices``, and ``masks``, theirs of ``data.example``. The weights are saved under work/models.

    Raises:
        ValueError: the recipe is not ``strong``; there is no other.
    """
    settings, numerics, data = experiment.settings, experiment.numerics, experiment.data
    options, pooled, training = settings.cctr, experiment.pooled, settings.strong.training
    augmentation = settings.strong.augmentation
    if settings.recipe != "strong":
        raise ValueError(f"CCT-R has no recipe '{settings.recipe}': see cctr.recipes in params.yaml")
    classes, size = len(experiment.cohort.classes), data.images.shape[-2:]
    networks = both_networks(experiment)
    labelled, masks = data.images[data.labelled], data.masks[data.labelled]
    unlabelled = data.images[data.unlabelled]
    warped = correspondence.masks(masks)
    half = training.batch // 2

    def batch_loss(generator, step):
        known = draw_indices(len(labelled), half, generator)
        free = draw_indices(len(unlabelled), training.batch - half, generator)
        images, targets = torch.cat((labelled[known], unlabelled[free])), torch.cat((masks[known], warped[free]))
        # Affine alone, not elastic as well: the bank has to know how each image was transformed.
        maps = draw_affine(
            len(images),
            size,
            generator,
            flip=data.symmetric,
            rotation=augmentation.rotation,
            scaling=augmentation.scaling,
            shift=augmentation.shift,
        )
        images, targets = light(maps.apply(images), generator, augmentation), maps.apply(targets, padding="zeros")
        with numerics.autocast():
            (first, seen_first), (second, seen_second) = networks.first(images), networks.second(images)
        ramp = ramp_up(step, 0, options.ramp * training.steps)
        by_first, by_second = first[half:], second[half:]  # what they say of unlabelled images
        losses = {
            "supervised": sum(supervised_loss(logits[:half], targets[:half], pooled) for logits in (first, second)),
            "cross": cross_teaching_loss(by_first, by_second, pooled),
        }
        weights = {"supervised": 1.0, "cross": options.cross_teaching * ramp}
        if options.rsl:
            losses["rsl"] = sum(foreground_dice(logits, targets[half:], pooled) for logits in (by_first, by_second))
            # Falls as cross teaching comes in: later in training the networks' own pseudo-labels should be better.
            weights["rsl"] = options.rsl * (1 - ramp * (1 - options.rsl_end))
        if options.contrast or options.reps:
            counterparts = None
            if options.reps:
                found, there = networks.bank.counterparts(
                    correspondence.partners[free], correspondence.places[free], maps[half:]
                )
                none = half * seen_first[0, 0].numel()  # zeros, as labelled images have none; A and B share them
                counterparts = F.pad(found, (0, 0, none, 0)).repeat(1, 2, 1), F.pad(there, (none, 0)).repeat(1, 2)
                once = slice(min(half, len(labelled)))  # later ones are repeats: which is stored would be undefined
                seen = F.normalize(seen_first[once] + seen_second[once], dim=1)
                networks.bank.store(known[once], seen, maps[once])
            described = [describe(logits, targets[:half], half, options.stride) for logits in (first, second)]
            features = torch.cat((pixels(seen_first), pixels(seen_second)))
            labels, confidence = (torch.cat(parts) for parts in zip(*described))
            losses["contrast"], reps = pixel_contrast(
                features, labels, confidence, classes + 1, options, generator, counterparts
            )
            weights["contrast"] = options.contrast * ramp
            if options.reps:
                losses["reps"], weights["reps"] = reps, options.reps * ramp
        return {"loss": sum(weights[name] * value for name, value in losses.items()), **losses}

    index = data.unlabelled[watched_slices(experiment)]

    @torch.no_grad()
    def watch(trained):
        trained.eval()
        learners = trained.first, trained.second
        with numerics.autocast():
            masks = [learner.segment(data.images[data.example]) for learner in learners]
        return {
            "dsc": torch.tensor([mean_dice(experiment, learner, index) for learner in learners]),
            "masks": torch.cat(masks).cpu(),
        }

    def validate(trained):
        return [validation_dice(experiment, learner) for learner in (trained.first, trained.second)]

    key = fingerprint(
        experiment.origin,
        CCTR,
        options,
        training,
        augmentation,
        settings.selection,
        settings.refinement,
        weights_digest(networks),
        weights_digest(load_pretrained_registration(experiment)),
        data.labelled.tolist(),
    )
    found = fit(
        networks,
        batch_loss,
        steps=training.steps,
        peak=training.learning_rate,
        schedule="one_cycle",
        weight_decay=training.weight_decay,
        generator=numerics.generator(settings.seed, "cctr"),
        label="cctr",
        checkpoint=experiment.cabinet.checkpoint(key),
        validate=validate if settings.selection == "validation" else None,
        watch=watch,
        parts=("first", "second"),
    )
    networks.bank = None  # needed for training alone
    save_network(experiment, "cctr", networks, found)
    return networks, found


def watched_slices(experiment):
    """Positions among the unlabelled images of those on which pseudo-labels are measured: all, or evenly spaced."""
    count = len(experiment.data.unlabelled)
    return torch.arange(0, count, max(1, count // experiment.settings.cctr.watched))


def course(experiment, correspondence, found):
    """How good pseudo-labels are while training (P2, Figure 4): a frame of step and mean DSC, one column per source.

    Args:
        found: Fit of ``train_cctr``.
    """
    data, chosen = experiment.data, watched_slices(experiment)
    warped = correspondence.masks(data.masks[data.labelled])[chosen]
    warped = float(dice(warped, data.masks[data.unlabelled[chosen]]).mean())
    rows = [
        {"step": step, "network A": float(seen["dsc"][0]), "network B": float(seen["dsc"][1]), "warped labels": warped}
        for step, seen in found.watched
    ]
    return pd.DataFrame(rows)


def predict(experiment, index):
    """Masks of ``cctr``, the U-Net, and ``cctr-b``, the transformer. See methods.table."""
    networks = load_cctr(experiment)
    return {
        "cctr": Prediction(0, segment(experiment, networks.first, index)),
        "cctr-b": Prediction(0, segment(experiment, networks.second, index)),
    }


def rounds(experiment):
    """Rows of rounds.csv: DSC of both networks' pseudo-labels, and on validation images where they choose.

    See methods.table.
    """
    watched = experiment.cabinet.load("cctr")["watched"]
    history = pd.read_csv(experiment.cabinet.folder("cctr") / "history.csv")
    rows = []
    for number, (stage, column) in enumerate((("cctr", "validation"), ("cctr-b", "validation second"))):
        validation = history[column].dropna().tolist() if column in history else []
        # fit keeps the later of equals
        best = max(range(len(watched)), key=lambda k: (validation[k] if validation else 0, k))
        for k, (step, seen) in enumerate(watched):
            row = {"round": step, "stage": stage, "best_for": stage if k == best else ""}
            on = {"unlabelled": (len(watched_slices(experiment)), float(seen["dsc"][number]))}
            if validation:
                on["validation"] = len(experiment.data.validation), validation[k]
            rows += [{**row, "split": split, "n": n, "dsc_segmentation": dsc} for split, (n, dsc) in on.items()]
    return pd.DataFrame(rows)
