"""CCT-R (P2): two networks of different kind teach each other, helped by registration.

Network A is the residual U-Net, network B a Swin-transformer U-Net. On unlabelled images each is taught by the other's
most probable classes (*cross teaching*), and both by the labels of the best registered labelled volume (*registration
supervision*, RSL). Features of both, projected to one space, are drawn to those of their class (*pixel contrast*) and
to those of the anatomically corresponding pixel of the registered volume (*registration-enhanced positives*, REPS):
here that of the best registered labelled volume, for the pixels of unlabelled images.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from monai.networks.nets import SwinUNETR
from torch import nn
from tqdm import tqdm

from lib.augment import Affine, augment, draw_affine
from lib.data import to_labels
from lib.evaluation import dice
from lib.experiment import load_pretrained_registration, load_saved, resume, save_atomically
from lib.losses import gncc, soft_dice_loss
from lib.mean_teacher import ramp_up
from lib.models import ResidualUNet
from lib.params import Section, fingerprint, work_folder
from lib.refinement import Refined
from lib.training import draw_indices, fit, save_network, sums_of, validation_dice, weights_digest
from lib.versions import CCTR
from lib.warping import pixel_grid, sample, warp

SWIN_MULTIPLE = 32  # sides must divide by this


class SwinUNet(nn.Module):
    """MONAI's SwinUNETR in 2D as a network of features; not pre-trained, since no weights for it are to be had.

    Args:
        width: channels of the finest level, a multiple of 12.
    """

    def __init__(self, width):
        super().__init__()
        self.network = SwinUNETR(in_channels=1, out_channels=1, feature_size=width, spatial_dims=2)
        self.network.out = nn.Identity()

    def features(self, image):
        """Features ``(batch, width, height, width)`` of images ``(batch, 1, height, width)`` of any size."""
        height, width = image.shape[-2:]
        more = lambda side: max(2, -(-side // SWIN_MULTIPLE)) * SWIN_MULTIPLE - side  # normalisation needs two pixels
        padding = (0, more(width), 0, more(height))
        return self.network(F.pad(image, padding, mode="replicate"))[..., :height, :width]


class Learner(nn.Module):
    """A network that segments and describes every pixel.

    Args:
        body: has ``features``.
        channels: of those.
        classes: foreground classes.
        dimension: of the space that features are projected to.
        stride: pixels per projected feature.
    """

    def __init__(self, body, channels, classes, dimension, stride):
        super().__init__()
        self.body = body
        self.head = nn.Conv2d(channels, classes + 1, 1)
        self.project = nn.Conv2d(channels, dimension, 1)
        self.stride = stride

    def forward(self, images):
        """Logits ``(batch, 1 + classes, height, width)``, background first, and features of unit length
        ``(batch, dimension, height / stride, width / stride)``, both float32."""
        features = self.body.features(images)
        projected = self.project(F.avg_pool2d(features, self.stride)).float()
        return self.head(features).float(), F.normalize(projected, dim=1)

    def segment(self, images):
        """Probabilities of the foreground classes ``(batch, classes, height, width)``, float32."""
        return self.head(self.body.features(images)).float().softmax(dim=1)[:, 1:]


class Registered(NamedTuple):
    """Of every unlabelled image the labelled one that is best registered to it."""

    sources: torch.Tensor  # (n,) positions among the labelled images
    fields: torch.Tensor  # (n, 2, height, width) displacement fields

    def masks(self, masks):
        """Masks of the labelled images, warped onto the unlabelled ones."""
        return warp(masks[self.sources], self.fields)


def info_nce(anchors, positives, negatives, temperature, valid=None):
    """InfoNCE, -log(e^(a.p/t) / (e^(a.p/t) + sum over n of e^(a.n/t))), of every anchor.

    Args:
        anchors, positives: ``(n, dimension)``, of unit length.
        negatives: ``(m, dimension)``.
        valid: ``(m,)`` which of the negatives count; None for all.

    Returns:
        ``(n,)``.
    """
    positive = (anchors * positives).sum(dim=1, keepdim=True) / temperature
    negative = anchors @ negatives.T / temperature
    if valid is not None:
        negative = negative.masked_fill(~valid, -torch.inf)
    return torch.cat((positive, negative), dim=1).logsumexp(dim=1) - positive[:, 0]


def draw(allowed, count, generator):
    """Up to ``count`` random positions where ``allowed`` ``(n,)``, without waiting for the GPU: (positions, valid)."""
    score = torch.rand(len(allowed), generator=generator, device=generator.device) + allowed
    index = score.topk(min(count, len(allowed))).indices
    return index, allowed[index]


def weighted_mean(values, weights):
    """Mean of ``values`` by ``weights`` over the first dimension, 0 where all weights are."""
    weights = weights.float().reshape(-1, *[1] * (values.ndim - 1))
    return (values * weights).sum(0) / weights.sum().clamp_min(1e-6)


def pixel_contrast(features, labels, confidence, classes, options, generator, counterparts=None):
    """The contrastive loss over the pixels of a batch.

    Anchors of a class are pixels that are given to it with high confidence; their positive key is their mean, their
    negatives are confident pixels of the other classes, of each as many. With counterparts, those are second positives.

    Args:
        features: ``(pixels, dimension)`` of unit length.
        labels, confidence: ``(pixels,)`` class, background 0, and the probability that it is given with.
        classes: how many, background included.
        options: section ``cctr``: threshold, anchors, negatives, temperature.
        counterparts: (``(pixels, dimension)``, ``(pixels,)`` where there is one), or None.

    Returns:
        Scalars (contrast, reps): means over the classes that have anchors; reps is 0 without counterparts.
    """
    confident = confidence > options.threshold
    losses, reps, present, matched = [], [], [], []
    for value in range(classes):
        index, valid = draw(confident & (labels == value), options.anchors, generator)
        drawn = [draw(confident & (labels == other), options.negatives // (classes - 1), generator)
                 for other in range(classes) if other != value]
        others, counted = (torch.cat(parts) for parts in zip(*drawn))
        anchors, negatives = features[index], features[others].detach()
        key = F.normalize(weighted_mean(anchors, valid).detach(), dim=0)
        exists = valid.any() & counted.any()
        loss = info_nce(anchors, key.expand_as(anchors), negatives, options.temperature, counted)
        losses.append(weighted_mean(loss, valid))
        present.append(exists)
        if counterparts is not None:
            found = valid & counterparts[1][index]
            loss = info_nce(anchors, counterparts[0][index], negatives, options.temperature, counted)
            reps.append(weighted_mean(loss, found))
            matched.append(found.any() & counted.any())
    contrast = weighted_mean(torch.stack(losses), torch.stack(present))
    return contrast, weighted_mean(torch.stack(reps), torch.stack(matched)) if reps else torch.zeros_like(contrast)


class Bank(nn.Module):
    """Features of every labelled image as they were last seen, on the image's own grid.

    Args:
        count: labelled images; shape: (dimension, height, width) of the features.
        stride: pixels per feature.
    """

    def __init__(self, count, shape, stride):
        super().__init__()
        self.stride = stride
        self.register_buffer("features", torch.zeros(count, *shape))
        self.register_buffer("seen", torch.zeros(count, 1, *shape[1:]))

    @torch.no_grad()
    def store(self, index, features, maps):
        """Keep features of the labelled images ``index`` that were seen transformed by ``maps`` (Affine)."""
        back = Affine(maps.matrix, maps.shift / self.stride).inverse()
        there = back.apply(torch.cat((features, torch.ones_like(features[:, :1])), 1), padding="zeros")
        inside = there[:, -1:] > 0.999
        self.features[index] = torch.where(inside, F.normalize(there[:, :-1], dim=1), self.features[index])
        self.seen[index] = torch.where(inside, 1.0, self.seen[index])

    def look_up(self, index, coordinates):
        """Features at places in the images ``index``.

        Args:
            coordinates: ``(batch, 2, h, w)`` in pixels of the images.

        Returns:
            (features of unit length ``(batch, dimension, h, w)``, ``(batch, h, w)`` whether they are known).
        """
        at = (coordinates - (self.stride - 1) / 2) / self.stride
        found = sample(torch.cat((self.features[index], self.seen[index]), 1), at, padding="zeros")
        return F.normalize(found[:, :-1], dim=1), found[:, -1] > 0.999


@torch.no_grad()
def register_labelled(experiment, network):
    """Best registration selection: for every unlabelled volume the labelled one most similar to it after registration.

    Slices are registered one by one, each to the slice of the labelled volume that lies nearest along the axis; the
    similarity of two volumes is the mean GNCC over the slices. Where images are not from volumes each stands alone.

    Args:
        experiment: Experiment.
        network: MrRegNet, or refinement.Refined.

    Returns:
        Registered.
    """
    network.eval()
    data, numerics, cohort = experiment.data, experiment.numerics, experiment.cohort
    matches = experiment.matches(data.unlabelled)
    if matches is None:
        matches = torch.arange(len(data.labelled), device=data.labelled.device).expand(len(data.unlabelled), -1)
    volumes = getattr(cohort, "volumes", np.arange(len(cohort.images)))[data.unlabelled.cpu()]
    members = data.as_index(np.unique(volumes, return_inverse=True)[1])
    size = numerics.batch(data.images)
    best, chosen, fields = None, torch.zeros_like(members), None
    for candidate in tqdm(matches.T, desc="registering labelled images", unit="volume"):
        parts, similar = [], []
        for index, sources in zip(data.unlabelled.split(size), candidate.split(size)):
            source, target = data.images[data.labelled[sources]], data.images[index]
            with numerics.autocast():
                parts.append(network.register(source, target))
            similar.append(gncc(warp(source, parts[-1]), target))
        found, similar = torch.cat(parts), torch.cat(similar)
        total = torch.zeros(int(members.max()) + 1, device=similar.device).index_add(0, members, similar)
        mean = (total / torch.bincount(members))[members]
        if best is None:
            best, chosen, fields = mean, candidate.clone(), found
            continue
        better = mean > best
        best, chosen = torch.where(better, mean, best), torch.where(better, candidate, chosen)
        fields = torch.where(better[:, None, None, None], found, fields)
    return Registered(chosen, fields)


def stored_registration(experiment):
    """``register_labelled`` by the pre-trained network, computed once for all variants of CCT-R.

    The file under work/checkpoints is named by a fingerprint of what the fields depend on and holds a checksum of
    them; one that does not fit is made anew.
    """
    settings, data = experiment.settings, experiment.data
    network = load_pretrained_registration(experiment)
    if settings.cctr.refine:
        network = Refined(network, settings.joint_plus.refinement)
    key = fingerprint(experiment.origin, CCTR, "registered", weights_digest(network), data.labelled.tolist(),
                      settings.cctr.refine and settings.joint_plus.refinement)
    file = work_folder("checkpoints", f"{key}.pt")
    saved = resume(file, key, data.images.device)
    if saved and saved["checksums"] == sums_of(*saved["registered"]):
        return Registered(*saved["registered"])
    registered = register_labelled(experiment, network)
    save_atomically({"fingerprint": key, "registered": list(registered), "checksums": sums_of(*registered)}, file)
    return registered


def registration_scores(experiment, registered):
    """How good the warped labels of the unlabelled images are, as a frame: mean DSC per class, and how many slices.

    The true masks of unlabelled images are used for these figures alone.
    """
    data = experiment.data
    truth, masks = data.masks[data.unlabelled], data.masks[data.labelled]
    scores = {"before registration": dice(masks[registered.sources], truth),
              "warped labels": dice(registered.masks(masks), truth)}
    frame = pd.DataFrame({name: found.mean(0).tolist() for name, found in scores.items()},
                         index=list(experiment.cohort.classes)).T
    return frame.assign(mean=frame.mean(axis=1), slices=len(truth))


class CrossTeaching(nn.Module):
    """Both learners, and the bank; what is trained, saved and resumed as one."""

    def __init__(self, classes, labelled, size, options, normalisation):
        super().__init__()
        dimension, stride = options.dimension, options.stride
        self.first = Learner(ResidualUNet(classes + 1, normalisation), 16, classes, dimension, stride)
        self.second = Learner(SwinUNet(options.width), options.width, classes, dimension, stride)
        shape = (dimension, *(side // stride for side in size))
        self.bank = Bank(labelled, shape, stride) if options.reps else None

    def segment(self, images):
        """Network A alone is validated."""
        return self.first.segment(images)


def supervised_loss(logits, masks):
    """Cross-entropy plus soft Dice of foreground masks ``(batch, classes, height, width)``."""
    return F.cross_entropy(logits, to_labels(masks)) + soft_dice_loss(logits.softmax(1)[:, 1:], masks)


def taught_loss(logits, teacher):
    """Soft Dice against the teacher's most probable classes; no gradient reaches the teacher."""
    labels = F.one_hot(teacher.detach().argmax(1), teacher.shape[1]).movedim(-1, 1)
    return soft_dice_loss(logits.softmax(1)[:, 1:], labels[:, 1:])


def both_networks(experiment, **changes):
    """CrossTeaching with the seed's initial weights, on the device; ``changes`` of section ``cctr``."""
    settings, data = experiment.settings, experiment.data
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        networks = CrossTeaching(len(experiment.cohort.classes), len(data.labelled), data.images.shape[-2:],
                                 Section({**settings.cctr, **changes}), settings.segmentation.normalisation)
    return experiment.numerics.place(networks)


def load_cctr(experiment):
    """Both networks as ``train_cctr`` saved them."""
    networks = both_networks(experiment, reps=0)  # the bank is needed for training alone
    networks.load_state_dict(load_saved(experiment.model_file("cctr"), experiment.numerics.device)["network"])
    return networks


def train_cctr(experiment, registered):
    """Train both networks (P2, section 3).

    Args:
        experiment: Experiment.
        registered: Registered.

    Returns:
        (CrossTeaching, Fit, whose ``watched`` have ``dsc`` ``(2,)``, of the pseudo-labels of A and of B on the slices
        of ``watched_slices``, and ``masks``, those of ``data.example``). The weights are saved under work/models.
    """
    settings, numerics, data = experiment.settings, experiment.numerics, experiment.data
    options = settings.cctr
    classes, size = len(experiment.cohort.classes), data.images.shape[-2:]
    networks = both_networks(experiment)
    labelled, masks = data.images[data.labelled], data.masks[data.labelled]
    unlabelled = data.images[data.unlabelled]
    warped = registered.masks(masks)
    half = options.batch // 2
    grid = pixel_grid(*size, labelled.device)
    scale = max(size)

    def batch_loss(generator, step):
        known = draw_indices(len(labelled), half, generator)
        free = draw_indices(len(unlabelled), options.batch - half, generator)
        images = torch.cat((labelled[known], unlabelled[free]))
        sources = (grid + registered.fields[free]) / scale  # moved along with the image by the augmentation
        more = torch.cat((warped[free], sources, torch.ones_like(sources[:, :1])), 1)
        more = torch.cat((F.pad(masks[known], (0, 0, 0, 0, 0, 3)), more))
        maps = draw_affine(len(images), scale, generator, flip=data.symmetric, rotation=settings.augmentation.rotation,
                           scaling=settings.augmentation.scaling, shift=settings.augmentation.shift)
        images, more = augment(images, more, generator, settings.augmentation, data.symmetric, maps)
        targets, sources, inside = more[:, :classes], more[:, classes : classes + 2] * scale, more[:, -1] > 0.999
        with numerics.autocast():
            (first, seen_first), (second, seen_second) = networks.first(images), networks.second(images)
        ramp = ramp_up(step, 0, options.ramp * options.steps)
        losses = {
            "supervised": sum(supervised_loss(logits[:half], targets[:half]) for logits in (first, second)),
            "cross": taught_loss(first[half:], second[half:]) + taught_loss(second[half:], first[half:]),
        }
        weights = {"supervised": 1.0, "cross": options.cross_teaching * ramp}
        if options.rsl:
            losses["rsl"] = sum(soft_dice_loss(logits[half:].softmax(1)[:, 1:], targets[half:])
                                for logits in (first, second))
            weights["rsl"] = options.rsl * (1 - ramp * (1 - options.rsl_end))
        if options.contrast or options.reps:
            counterparts = None
            if options.reps:
                every = (slice(None), slice(None), slice(options.stride // 2, None, options.stride),
                         slice(options.stride // 2, None, options.stride))
                found, there = networks.bank.look_up(registered.sources[free], sources[half:][every])
                there = there & inside[half:, None][every][:, 0]
                there = F.pad(there, (0, 0, 0, 0, half, 0))  # labelled images have none
                found = F.pad(found, (0, 0, 0, 0, 0, 0, half, 0))
                counterparts = pixels(found).repeat(2, 1), there.flatten().repeat(2)
                once = slice(min(half, len(labelled)))  # then images repeat, and it would be undefined which one counts
                seen = F.normalize(seen_first[once] + seen_second[once], dim=1)
                networks.bank.store(known[once], seen, maps[once])
            described = [describe(logits, targets[:half], half, options.stride) for logits in (first, second)]
            features = torch.cat((pixels(seen_first), pixels(seen_second)))
            labels, confidence = (torch.cat(parts) for parts in zip(*described))
            losses["contrast"], reps = pixel_contrast(features, labels, confidence, classes + 1, options, generator,
                                                      counterparts)
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
        return {"dsc": torch.stack([slice_dice(experiment, learner, index) for learner in learners]).cpu(),
                "masks": torch.cat(masks).cpu()}

    key = fingerprint(experiment.origin, CCTR, options, settings.segmentation.normalisation, weights_digest(networks),
                      sums_of(labelled, masks, unlabelled, registered.fields.square()))
    found = fit(
        networks, batch_loss, steps=options.steps, peak=options.learning_rate, schedule="one_cycle",
        weight_decay=options.weight_decay, generator=numerics.generator(settings.seed, "cctr"), key=key, label="cctr",
        validate=lambda trained: validation_dice(experiment, trained), watch=watch,
    )
    networks.bank = None
    save_network(experiment, "cctr", networks, found)
    return networks, found


def watched_slices(experiment):
    """Positions among the unlabelled images of those on which pseudo-labels are measured: all, or evenly spaced."""
    count = len(experiment.data.unlabelled)
    return torch.arange(0, count, max(1, count // experiment.settings.cctr.watched))


def course(experiment, registered, found):
    """How good pseudo-labels are while training (P2, Figure 4): a frame of step and mean DSC, one column per source.

    Args:
        found: Fit of ``train_cctr``.
    """
    data, chosen = experiment.data, watched_slices(experiment)
    warped = registered.masks(data.masks[data.labelled])[chosen]
    warped = float(dice(warped, data.masks[data.unlabelled[chosen]]).mean())
    rows = [{"step": step, "network A": float(seen["dsc"][0]), "network B": float(seen["dsc"][1]),
             "warped labels": warped} for step, seen in found.watched]
    return pd.DataFrame(rows)


def pixels(features):
    """Features ``(batch, dimension, h, w)`` as ``(batch * h * w, dimension)``."""
    return features.movedim(1, -1).flatten(0, 2)


@torch.no_grad()
def describe(logits, masks, half, stride):
    """Label and confidence of every pixel that has a feature: the true ones of labelled images, else the network's.

    Returns:
        ``(batch * h * w,)`` each.
    """
    probability = F.avg_pool2d(logits.softmax(1), stride)
    confidence, labels = probability.max(dim=1)
    true = F.avg_pool2d(masks, stride)
    labels[:half] = to_labels(true)
    certain = torch.maximum(true.amax(1), 1 - true.sum(1))
    confidence[:half] = certain
    return labels.flatten(), confidence.flatten()


def slice_dice(experiment, network, index):
    """Mean DSC over classes of a network's masks of the images ``index``."""
    data, found = experiment.data, []
    for part in index.split(experiment.numerics.batch(data.images)):
        with experiment.numerics.autocast():
            found.append(dice(network.segment(data.images[part]), data.masks[part]))
    return torch.cat(found).mean()
