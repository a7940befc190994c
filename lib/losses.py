"""The losses of P1, section 2.3, and the similarity of images that they are made of."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from lib.warping import warp

SMOOTH = 1e-5  # keeps the Dice of two empty masks at 1 and its gradient finite


def space_of(images):
    """The dimensions of ``(batch, channels, *space)`` that are space."""
    return tuple(range(2, images.ndim))


def soft_dice_loss(prediction, target, pooled=False):
    """Soft Dice loss with squared denominator, eq. (1): 1 - 2 sum(y' y) / (sum(y'^2) + sum(y^2)).

    Args:
        prediction, target: ``(batch, classes, *space)`` in [0, 1]; targets may be soft.
        pooled: sum over the pixels of the whole batch, as if it were one volume, instead of image by image. Slices of
            volumes often lack a class. The loss of such a slice alone is 1 whatever is wrongly marked, and has hardly
            any gradient.

    Returns:
        Scalar in [0, 1], the mean over images (unless pooled) and classes. Two empty masks count as 0.
    """
    prediction, target = prediction.float(), target.float()
    space = space_of(prediction)
    over = (0, *space) if pooled else space
    overlap = (prediction * target).sum(dim=over)
    size = prediction.square().sum(dim=over) + target.square().sum(dim=over)
    return (1 - (2 * overlap + SMOOTH) / (size + SMOOTH)).mean()


def segmentation_loss(logits, target, pooled=False, weight=None):
    """Binary cross-entropy of every class plus soft Dice, half and half: the loss of recipe `strong`.

    Args:
        logits: ``(batch, classes, *space)``.
        target: as logits, in [0, 1], soft or not.
        pooled: see ``soft_dice_loss``.
        weight: ``(batch, 1, *space)`` of every pixel, not negative; None counts all alike.

    Returns:
        Scalar, 0 where all pixels that count are predicted as they are, with certainty.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = torch.sigmoid(logits)
    if weight is None:
        return (entropy.mean() + soft_dice_loss(probability, target, pooled)) / 2
    mean = (entropy * weight).sum() / (weight.sum() * logits.shape[1]).clamp_min(1)
    root = weight.sqrt()  # soft Dice sums products of two masks: each has half of the weight
    return (mean + soft_dice_loss(root * probability, root * target, pooled)) / 2


def gncc(first, second):
    """Global normalised cross-correlation per image, in [-1, 1], the fraction of eq. (2).

    The paper prints variances under the fraction; a correlation has standard deviations there.
    Invariant to gain and offset of either image. 0 where an image is constant.

    Args:
        first, second: ``(batch, 1, *space)``.

    Returns:
        ``(batch,)``.
    """
    every = tuple(range(1, first.ndim))
    first = first.float() - first.float().mean(dim=every, keepdim=True)
    second = second.float() - second.float().mean(dim=every, keepdim=True)
    covariance = (first * second).sum(dim=every)
    power = first.square().sum(dim=every) * second.square().sum(dim=every)
    return covariance / power.clamp_min(1e-10).sqrt()


def weighted_gncc(first, second, weight):
    """``gncc`` where every pixel counts by its weight; ours, for the alignment and choice of volumes in CCT-R.

    Args:
        first, second, weight: ``(batch, 1, *space)``; weights are not negative, and need not add up to 1.

    Returns:
        ``(batch,)`` in [-1, 1]; 0 where an image is constant.
    """
    first, second, weight = first.float(), second.float(), weight.float()
    every = tuple(range(1, first.ndim))
    weight = weight / weight.sum(dim=every, keepdim=True).clamp_min(1e-6)
    over = lambda values: (weight * values).sum(dim=every, keepdim=True)
    first, second = first - over(first), second - over(second)
    variances = over(first.square()) * over(second.square())
    return (over(first * second) / (variances + 1e-12).sqrt()).flatten()


def gncc_loss(first, second):
    """1 - GNCC, eq. (2), averaged over the batch: 0 for images equal up to gain and offset, at most 2."""
    return 1 - gncc(first, second).mean()


def smoothness_loss(residual):
    """Mean squared forward difference of a field ``(batch, axes, *space)``, the L2 regularisation of eq. (3).

    Along an axis that is one voxel long nothing differs: it does not count.
    """
    long = [axis for axis in space_of(residual) if residual.shape[axis] > 1]
    change = [
        (residual.narrow(axis, 1, residual.shape[axis] - 1) - residual.narrow(axis, 0, residual.shape[axis] - 1))
        for axis in long
    ]
    return sum(one.float().square().mean() for one in change) / max(1, len(change))


POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}  # by the number of axes


class RegistrationLoss(NamedTuple):
    """Parts of eq. (3), each the mean over levels; ``total`` is what is minimised."""

    total: torch.Tensor
    similarity: torch.Tensor
    dice: torch.Tensor
    smoothness: torch.Tensor


def registration_loss(levels, source, target, weights, source_mask=None, target_mask=None):
    """The registration objective, eq. (3), with deep supervision at every resolution.

    Args:
        levels: from coarsest to finest, pairs (displacement D_i, residual field R_i), as MrRegNet gives them.
        source, target: ``(batch, 1, *space)`` at the finest level's size.
        weights: smoothness weight lambda_i per level, coarsest first.
        source_mask, target_mask: ``(batch, classes, *space)``, for the joint phase; None in pre-training.

    Returns:
        RegistrationLoss of scalars; ``smoothness`` is already weighted.
    """
    guided = source_mask is not None
    moving = torch.cat((source, source_mask), 1) if guided else source
    fixed = torch.cat((target, target_mask), 1) if guided else target
    similarity = dice = smoothness = torch.zeros((), device=source.device)
    for (displacement, residual), weight in zip(reversed(levels), reversed(list(weights)), strict=True):
        if fixed.shape[2:] != displacement.shape[2:]:
            by = tuple(fine // coarse for fine, coarse in zip(fixed.shape[2:], displacement.shape[2:]))
            moving, fixed = (POOL[len(by)](image, by) for image in (moving, fixed))
        warped = warp(moving, displacement)
        similarity = similarity + gncc_loss(warped[:, :1], fixed[:, :1])
        if guided:
            dice = dice + soft_dice_loss(warped[:, 1:], fixed[:, 1:])
        smoothness = smoothness + weight * smoothness_loss(residual)
    k = len(levels)
    return RegistrationLoss((similarity + dice + smoothness) / k, similarity / k, dice / k, smoothness / k)
