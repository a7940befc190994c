"""Alignment of volumes before they are registered: organs lie differently in every scan, turned, larger or smaller.

A registration network follows motion of some pixels; organs may lie further apart. A similarity transform of the slice
plane, the same for all slices of a volume, therefore comes first. It is found by search: every start is tried on small
images, and the best ones are improved by gradient descent. Similarity counts only where the source is labelled. No mask
of the target is used. P2 leaves open how its volumes are registered: this is ours.
"""

import itertools
import math

import torch
import torch.nn.functional as F

from lib.losses import weighted_gncc
from lib.warping import pixel_grid, sample

SIDE = 32  # of the images that are compared, in pixels
MARGIN = 0.1  # around the labels, of the side
ANGLES = [math.radians(angle) for angle in (-40, -20, 0, 20, 40)]
SCALES = [math.log(scale) for scale in (0.8, 1, 1.25)]
SHIFTS = (-0.15, -0.075, 0, 0.075, 0.15)  # of the side
STARTS, STEPS, RATE = 3, 40, 0.01  # of the descent
STIFFNESS = 0.05  # weight of log(scale)²: a small piece of the target easily looks similar


def region(masks, groups):
    """Where a volume is labelled in any of its slices, with a margin.

    Args:
        masks: ``(n, classes, height, width)`` in [0, 1].
        groups: ``(n,)`` number of the volume that each slice is of.

    Returns:
        ``(n, 1, height, width)`` in [0, 1], the same for all slices of a volume.
    """
    any_class = masks.amax(dim=1, keepdim=True)
    labelled = torch.stack([any_class[groups == group].amax(dim=0) for group in groups.unique()])
    margin = max(1, round(MARGIN * max(masks.shape[-2:])))
    wide = F.max_pool2d(labelled, 2 * margin + 1, 1, margin)
    soft = F.avg_pool2d(wide, 2 * (margin // 2) + 1, 1, margin // 2, count_include_pad=False)
    return soft[groups.unique(return_inverse=True)[1]]


def mean_of(values, groups):
    """Mean of ``(n,)`` values per group: ``(groups,)``."""
    count = int(groups.max()) + 1
    return values.new_zeros(count).index_add(0, groups, values) / torch.bincount(groups, minlength=count)


def middle_of(shape, device):
    """Pixel coordinates of the middle of an image, ``(1, 2, 1, 1)``."""
    return torch.tensor([(length - 1) / 2 for length in shape], device=device).reshape(1, 2, 1, 1)


def displacement(motion, centre, shape):
    """Displacement fields of similarity transforms.

    Args:
        motion: ``(n, 4)``: angle in radians, log of the scale, and shift of rows and columns in units of the longer
            side; what lies at ``centre + shift`` of the target comes from ``centre`` of the source.
        centre: ``(n, 2)`` in units of the longer side, from the middle of the image.
        shape: (height, width).

    Returns:
        ``(n, 2, height, width)`` in pixels.
    """
    side = max(shape)
    grid, middle = pixel_grid(tuple(shape), motion.device), middle_of(shape, motion.device)
    angle, scale = motion[:, 0, None, None], motion[:, 1, None, None].exp()
    rows, columns = ((grid - middle) / side - (centre + motion[:, 2:])[:, :, None, None]).unbind(1)
    turned = torch.stack((angle.cos() * rows - angle.sin() * columns, angle.sin() * rows + angle.cos() * columns), 1)
    return (scale[:, None] * turned + centre[:, :, None, None]) * side + middle - grid


def align(source, target, weight, groups):
    """Similarity transforms that take sources onto targets, one for every group of images.

    Args:
        source, target: ``(n, 1, height, width)``.
        weight: as source, in [0, 1]: where similarity counts, in the source.
        groups: ``(n,)`` number of the target's volume, from 0.

    Returns:
        ``(n, 2, height, width)`` displacement fields in pixels.
    """
    shape = source.shape[-2:]
    small = [max(4, round(length * SIDE / max(shape))) for length in shape]
    source, target, weight = (F.interpolate(one.float(), small, mode="area") for one in (source, target, weight))
    place = pixel_grid(tuple(small), source.device) - middle_of(small, source.device)
    centre = (weight * place).sum(dim=(2, 3)) / weight.sum(dim=(2, 3)).clamp_min(1e-6) / max(small)

    def similarity(motion):
        coordinates = pixel_grid(tuple(small), motion.device) + displacement(motion[groups], centre, small)
        moved = sample(torch.cat((source, weight), dim=1), coordinates)
        return mean_of(weighted_gncc(moved[:, :1], target, moved[:, 1:]), groups)

    count = int(groups.max()) + 1
    starts = torch.tensor(list(itertools.product(ANGLES, SCALES, SHIFTS, SHIFTS)), device=source.device)
    with torch.no_grad():
        tried = torch.stack([similarity(start.expand(count, -1)) for start in starts])
    ends, reached = [], []
    for chosen in tried.topk(STARTS, dim=0).indices:
        motion = starts[chosen].clone().requires_grad_()
        optimiser = torch.optim.AdamW([motion], RATE, weight_decay=0, foreach=False)
        for _ in range(STEPS):
            with torch.enable_grad():
                loss = (STIFFNESS * motion[:, 1].square() - similarity(motion)).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        ends.append(motion.detach())
        with torch.no_grad():
            reached.append(similarity(motion))
    best = torch.stack(reached).argmax(dim=0)
    motion = torch.stack(ends)[best, torch.arange(count, device=best.device)]
    return displacement(motion[groups], centre, shape)
