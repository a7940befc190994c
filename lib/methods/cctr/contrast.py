"""Pixel contrast (P2): features are drawn to those of their class and of corresponding pixels, away from all others."""

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from lib.augment import Affine
from lib.metrics import to_labels
from lib.warping import sample

NEVER = -1e9  # the similarity of what does not count: finite, so that gradients are


def info_nce(anchors, positives, negatives, temperature, valid=None):
    """InfoNCE, -log(e^(a.p/t) / (e^(a.p/t) + sum over n of e^(a.n/t))), of every anchor and positive.

    Args:
        anchors: ``(n, dimension)``, of unit length.
        positives: ``(..., n, dimension)``, one or several per anchor; each is compared with the negatives by itself.
        negatives: ``(m, dimension)``.
        valid: ``(m,)`` which of the negatives count; None for all.

    Returns:
        ``(..., n)``.
    """
    positive = (anchors * positives).sum(dim=-1) / temperature
    negative = anchors @ negatives.T / temperature
    if valid is not None:
        negative = negative.masked_fill(~valid, NEVER)
    return torch.logaddexp(positive, negative.logsumexp(dim=1)) - positive


def draw(allowed, count, generator):
    """Up to ``count`` random positions where ``allowed`` ``(n,)``, without waiting for the GPU: (positions, valid)."""
    # [1, 2) where allowed, else [0, 1): the largest are allowed ones at random, then, marked invalid, others.
    score = torch.rand(len(allowed), generator=generator, device=generator.device) + allowed
    index = score.topk(min(count, len(allowed))).indices
    return index, allowed[index]


def weighted_mean(values, weights):
    """Mean of ``values`` by ``weights`` over the first dimension, 0 where all weights are."""
    weights = weights.float().reshape(-1, *[1] * (values.ndim - 1))
    return (values * weights).sum(0) / weights.sum().clamp_min(1e-6)


def pixel_contrast(features, labels, confidence, classes, options, generator, counterparts=None):
    """The contrastive loss over the pixels of a batch.

    Anchors of a class are pixels that have its label with high confidence. Their positive is their mean. Their
    negatives are confident pixels of the other classes, at most the same number of each. Counterparts are further
    positives.

    Args:
        features: ``(pixels, dimension)`` of unit length.
        labels, confidence: ``(pixels,)`` class (0 is background), and its probability.
        classes: how many, background included.
        options: section ``cctr``: threshold, anchors, negatives, temperature.
        counterparts: corresponding pixels in other volumes, (``(volumes, pixels, dimension)``, ``(volumes, pixels)``
            where there is one), or None.

    Returns:
        Scalars (contrast, reps): means over the classes that have anchors. Within a class, reps is the mean over all
        pairs of anchor and counterpart. 0 if there are none.
    """
    confident = confidence > options.threshold
    losses, reps, present, matched = [], [], [], []
    for value in range(classes):
        index, valid = draw(confident & (labels == value), options.anchors, generator)
        # The same number of every other class: background would crowd out small structures.
        drawn = [
            draw(confident & (labels == other), options.negatives // (classes - 1), generator)
            for other in range(classes)
            if other != value
        ]
        others, counted = (torch.cat(parts) for parts in zip(*drawn))
        # Gradients move anchors alone; what they are drawn to, and away from, stands still.
        anchors, negatives = features[index], features[others].detach()
        positives = F.normalize(weighted_mean(anchors, valid).detach(), dim=0).expand(1, *anchors.shape)
        if counterparts is not None:
            positives = torch.cat((positives, counterparts[0][:, index]))
        loss = info_nce(anchors, positives, negatives, options.temperature, counted)
        losses.append(weighted_mean(loss[0], valid))
        present.append(valid.any() & counted.any())  # weights 0 and 1, since an `if` would wait for the GPU
        if counterparts is not None:
            found = valid & counterparts[1][:, index]
            reps.append(weighted_mean(loss[1:].flatten(), found.flatten()))
            matched.append(found.any() & counted.any())
    contrast = weighted_mean(torch.stack(losses), torch.stack(present))
    return contrast, weighted_mean(torch.stack(reps), torch.stack(matched)) if reps else torch.zeros_like(contrast)


def pixels(features):
    """Features ``(batch, dimension, h, w)`` as ``(batch * h * w, dimension)``."""
    return features.movedim(1, -1).flatten(0, 2)


@torch.no_grad()
def describe(logits, masks, half, stride):
    """Label and confidence of every pixel that has a feature: by the true masks of labelled images, else the network's.

    Args:
        logits, masks: of all images, and the true ones of the labelled images, which come first.
        half: how many are labelled.
        stride: pixels per feature.

    Returns:
        ``(batch * h * w,)`` each.
    """
    probability = F.avg_pool2d(logits.softmax(1), stride)
    confidence, labels = probability.max(dim=1)
    true = F.avg_pool2d(masks, stride)
    labels[:half] = to_labels(true)
    # How many of a feature's pixels are of its most frequent class: at an outline it is not certain.
    certain = torch.maximum(true.amax(1), 1 - true.sum(1))
    confidence[:half] = certain
    return labels.flatten(), confidence.flatten()


def eligible(masks, classes, options):
    """How many features of labelled images are confident enough for anchors and negatives.

    Args:
        masks: ``(images, classes, height, width)``, the true ones.
        classes: names, background first.
        options: section ``cctr``: stride, threshold.

    Returns:
        pandas.DataFrame, one row per class: ``features`` that are given to it, the ``share`` that is confident, and how
        many of those an image has (``per_image``).
    """
    unused = masks.new_zeros(len(masks), len(classes), *masks.shape[2:])  # logits: no image is unlabelled
    labels, confidence = describe(unused, masks, len(masks), options.stride)
    counts = [
        ((labels == value).sum(), ((labels == value) & (confidence > options.threshold)).sum())
        for value in range(len(classes))
    ]
    return pd.DataFrame(
        [
            {
                "class": name,
                "features": int(all_of),
                "share": float(sure / all_of.clamp(min=1)),
                "per_image": float(sure / len(masks)),
            }
            for name, (all_of, sure) in zip(classes, counts)
        ]
    )


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

    def on_grid(self, maps):
        """Affine maps of images as maps of their features."""
        return Affine(maps.matrix, maps.shift / self.stride)

    @torch.no_grad()
    def store(self, index, features, maps):
        """Keep features of the labelled images ``index`` that were seen transformed by ``maps`` (Affine)."""
        back = self.on_grid(maps).inverse()
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
        at = (coordinates - (self.stride - 1) / 2) / self.stride  # a feature lies in the middle of its pixels
        found = sample(torch.cat((self.features[index], self.seen[index]), 1), at, padding="zeros")
        return F.normalize(found[:, :-1], dim=1), found[:, -1] > 0.999

    def counterparts(self, partners, places, maps):
        """Registration-enhanced positives: what the bank knows of the pixels that correspond to those of images.

        Args:
            partners: ``(batch, volumes)`` the labelled image of every volume that corresponds to each image.
            places: ``(batch, volumes, 2, h, w)`` where in it every feature of the image lies, in pixels.
            maps: Affine, by which the images are seen transformed.

        Returns:
            (features of unit length ``(volumes, batch * h * w, dimension)``, ``(volumes, batch * h * w)`` whether they
            are known).
        """
        inside = torch.ones_like(places[:, :1, 0])
        moved = self.on_grid(maps).apply(torch.cat((places.flatten(1, 2), inside), 1), padding="zeros")
        coordinates, inside = moved[:, :-1].unflatten(1, (-1, 2)), moved[:, -1:] > 0.999
        found, known = self.look_up(partners.flatten(), coordinates.flatten(0, 1))
        known = known.unflatten(0, partners.shape) & inside
        return found.unflatten(0, partners.shape).permute(1, 0, 3, 4, 2).flatten(1, 3), known.transpose(0, 1).flatten(1)
