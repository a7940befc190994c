"""CCT-R (P2): two networks of different kind teach each other, helped by registration.

Network A is the residual U-Net, network B a Swin-transformer U-Net. On unlabelled images each is taught by the other's
most probable classes (*cross teaching*), and both by the labels of the best registered labelled volume (*registration
supervision*, RSL). Features of both, projected to one space, are drawn to those of their class (*pixel contrast*) and
to those of the anatomically corresponding pixel of the registered volume (*registration-enhanced positives*, REPS).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from monai.networks.nets import SwinUNETR
from torch import nn

from lib.augment import Affine, augment, draw_affine
from lib.data import to_labels
from lib.losses import gncc, soft_dice_loss
from lib.mean_teacher import ramp_up
from lib.models import ResidualUNet
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
        padding = (0, -width % SWIN_MULTIPLE, 0, -height % SWIN_MULTIPLE)
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
    similarity: torch.Tensor  # (n,) GNCC after registration

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
    """Up to ``count`` random positions where ``allowed`` ``(n,)``, without waiting for the device: (positions, valid)."""
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
    negatives are confident pixels of other classes. With counterparts, those are second positives.

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
        others, counted = draw(confident & (labels != value), options.negatives, generator)
        anchors, negatives = features[index], features[others].detach()
        key = F.normalize(weighted_mean(anchors, valid).detach(), dim=0)
        exists = valid.any() & counted.any()
        losses.append(weighted_mean(info_nce(anchors, key.expand_as(anchors), negatives, options.temperature, counted), valid))
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
