"""Masks compared with true masks: DSC, HD and HD95, the paper's measures (P1, section 3.2)."""

import math

import torch


def to_labels(masks):
    """The most probable label of every pixel.

    Args:
        masks: ``(n, classes, ...)`` in [0, 1]. The rest to 1 is the probability of the background, so a single class
            is thresholded at 0.5.

    Returns:
        ``(n, ...)`` integer, 0 for the background.
    """
    background = (1 - masks.sum(dim=1, keepdim=True)).clamp_min(0)
    return torch.cat((background, masks), dim=1).argmax(dim=1)


def harden(masks):
    """Masks in [0, 1] as disjoint binary ones: a pixel belongs to what is most probable there, see to_labels.

    Args:
        masks: ``(batch, classes, ...)`` in [0, 1]; those of type bool are disjoint already and returned as they are.

    Returns:
        As ``masks``, bool.
    """
    if masks.dtype == torch.bool:
        return masks
    labels = to_labels(masks)
    return torch.stack([labels == value for value in range(1, masks.shape[1] + 1)], dim=1)


def dice(prediction, truth):
    """DSC per image and class, of hardened masks.

    Args:
        prediction, truth: ``(batch, classes, *space)`` in [0, 1].

    Returns:
        ``(batch, classes)`` in [0, 1]; 1 where both masks are empty, 0 where one is.
    """
    prediction, truth = harden(prediction), harden(truth)
    both, sizes = (prediction & truth).flatten(2).sum(2), prediction.flatten(2).sum(2) + truth.flatten(2).sum(2)
    return torch.where(sizes > 0, 2 * both / sizes.clamp(min=1), 1.0)


def dice_of_groups(prediction, truth, groups):
    """DSC of groups of images, such as the slices of a volume, ``(groups, classes)``; otherwise as ``dice``.

    Args:
        groups: ``(batch,)`` number of the group that each image is of, from 0.
    """
    prediction, truth = harden(prediction), harden(truth)
    pixels = torch.stack((prediction & truth, prediction)).flatten(3).sum(3), truth.flatten(2).sum(2)[None]
    counted = torch.cat(pixels).float()
    both, found, true = counted.new_zeros(3, int(groups.max()) + 1, truth.shape[1]).index_add(1, groups, counted)
    return torch.where(found + true > 0, 2 * both / (found + true).clamp(min=1), 1.0)


def hausdorff(prediction, truth, spacing=None):
    """HD and HD95 per image and class, of hardened masks, in pixels or in the units of ``spacing``.

    Args:
        prediction, truth: ``(batch, classes, *space)`` in [0, 1].
        spacing: between pixels along every axis; None for 1.

    Returns:
        Two tensors ``(batch, classes)``: the largest distance between both outlines, and the 95th percentile of the
        distances from one to the other, the larger of both ways. 0 where both masks are empty, the image's diagonal
        where one is.
    """
    from monai.metrics.utils import (  # takes seconds to import: only who scores waits
        get_mask_edges,
        get_surface_distance,
    )

    prediction, truth = harden(prediction).cpu(), harden(truth).cpu()
    filled = prediction.flatten(2).any(2), truth.flatten(2).any(2)
    hd, hd95 = torch.zeros(2, *filled[0].shape, dtype=torch.float64)
    sides = zip(truth.shape[2:], spacing or [1] * (truth.ndim - 2))
    hd[filled[0] != filled[1]] = math.hypot(*((side - 1) * unit for side, unit in sides))
    hd95.copy_(hd)
    for image, label in (filled[0] & filled[1]).nonzero().tolist():
        first, second = get_mask_edges(prediction[image, label], truth[image, label])
        distances = [get_surface_distance(*pair, spacing=spacing) for pair in ((first, second), (second, first))]
        hd[image, label] = max(float(found.max()) for found in distances)
        hd95[image, label] = max(float(found.quantile(0.95)) for found in distances)
    return hd, hd95
