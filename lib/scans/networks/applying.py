"""Applying a model to one scan: labels and confidence on the scan's own grid."""

import math
from typing import NamedTuple

import numpy as np
import torch

from lib.metrics import to_labels
from lib.pseudo_masks import confidence_sums, segmentation_masks
from lib.results.calibration import predict_dsc
from lib.runs.params import section
from lib.scans.networks.memory import with_less_memory
from lib.scans.reading.folder import write_scan

WHOLE = 4  # canvases; larger images are seen through windows
FEW = 16  # slices that become labels at a time: a large volume has many


class Space(NamedTuple):
    """Shape and spacing of (slices, rows, columns): what a plan needs of a Grid."""

    slices: tuple
    spacing: tuple  # mm


class Confidence:
    """Mean confidence of a case, see pseudo_masks.mean_confidence, of masks that come piece by piece."""

    def __init__(self):
        self.total = self.count = 0.0

    def add(self, masks):
        """Count in masks ``(n, classes, *space)``."""
        total, count = confidence_sums(masks)
        self.total += float(total.sum())
        self.count += float(count.sum())

    @property
    def mean(self):
        """In [0.5, 1]; 1 where no pixel is marked."""
        return self.total / self.count if self.count else 1.0


@torch.no_grad()
def soft_masks(network, plan, about, images, numerics):
    """Probabilities of a case's slices, or of the volume, by one network: the mean over N augmented views.

    Images of more than WHOLE canvases, fewer where memory is short, are seen through overlapping windows of a canvas
    each, blended by a Gaussian.

    Args:
        network, plan, about: of a Model on the device.
        images: ``(n, channels, *space)`` in [0, 1].

    Yields:
        Batches ``(n, classes, *space)``. The draws depend on nothing but the case's own images.
    """
    options = section(about["pseudo_masks"])
    large = math.prod(images.shape[2:]) > WHOLE * numerics.share * math.prod(plan.canvas)
    size = 1 if large else numerics.batch(images)
    for start in range(0, len(images), size):
        seen = numerics.tensor(images[start : start + size])
        generator = numerics.generator("own", start)
        views = options.n, generator, options, about["symmetric"], numerics, plan.spacing
        look = lambda part: segmentation_masks(network, part, *views).mean(dim=0)
        yield through_windows(look, seen, plan.canvas) if large else look(seen)


def through_windows(look, images, canvas):
    """What ``look`` makes of images ``(n, channels, *space)``, window by window."""
    from monai.inferers import sliding_window_inference  # takes seconds to import: only large images wait

    return sliding_window_inference(images, canvas, 1, look, overlap=0.5, mode="gaussian")


def masks_of(model, images, grid, numerics, confidence):
    """Probabilities of a case on its own grid: the mean over the model's networks.

    Args:
        model: Model on the device.
        images: of every plan, those that are segmented: arrays ``(n, channels, *space)`` in [0, 1].
        grid: folder.Grid of the image, or a Space.
        numerics: compute.Numerics.
        confidence: Confidence, which is told of the masks: of one network's as it gives them, since on a finer grid
            their edges are smoother; of several networks' mean on the case's grid.

    Yields:
        Tensors ``(at most FEW, classes, rows, columns)``, slices one after another.
    """
    alone = len(model.networks) == 1

    def by(network, plan, seen):
        for soft in soft_masks(network, plan, model.about, seen, numerics):
            if alone:
                confidence.add(soft)
            yield from plan.restored(soft, grid, FEW)

    each = [few_at_a_time(by(*own)) for own in zip(model.networks, model.plans, images)]
    if alone:
        yield from each[0]
        return
    for masks in zip(*each, strict=True):
        mean = torch.stack(masks).mean(dim=0)
        confidence.add(mean)
        yield mean


def few_at_a_time(parts):
    """The slices of ``parts``, FEW at a time, however many lie in each part."""
    rest = None
    for part in parts:
        rest = part if rest is None else torch.cat((rest, part))
        while len(rest) >= FEW:
            yield rest[:FEW]
            rest = rest[FEW:]
    if rest is not None and len(rest):
        yield rest


def segment(model, images, planes, grid, numerics):
    """Labels and confidence of one case, on its own grid.

    Args:
        model, images, grid, numerics: see ``masks_of``.
        planes: positions in the grid of the slices that are segmented.

    Returns:
        (labels uint8, confidence float32 of every pixel's label, both ``(slices, rows, columns)`` and 0 in slices that
        are not segmented; mean confidence in [0.5, 1], see pseudo_masks.mean_confidence).
    """
    labels, confidence = np.zeros(grid.slices, np.uint8), np.zeros(grid.slices, np.float32)
    values = np.array([0, *model.about["values"]], np.uint8)
    mean = Confidence()
    for k, masks in enumerate(masks_of(model, images, grid, numerics, mean)):
        at = planes[k * FEW : (k + 1) * FEW]
        labels[at] = values[to_labels(masks).cpu().numpy()]
        every = torch.cat((1 - masks.sum(dim=1, keepdim=True), masks), dim=1)
        confidence[at] = every.amax(dim=1).clamp(0, 1).cpu().numpy().round(3)
    return labels, confidence, mean.mean


def apply(model, name, images, planes, grid, folder, numerics):
    """Segment one case, write its mask and confidence map, and return its row of cases.csv.

    Args:
        model, images, planes, grid, numerics: see ``segment``.
        name: of the case.
        folder: where ``<name>_mask.nii.gz`` and ``<name>_confidence.nii.gz`` go.

    Returns:
        Dictionary. Volumes, of what was segmented, are in mm³, areas, of single slices, in mm².
    """
    labels, confidence, mean = with_less_memory(
        lambda divisor: segment(model, images, planes, grid, numerics.sharing(1 / divisor)), name
    )
    write_scan(labels, grid, folder / f"{name}_mask.nii.gz")
    write_scan(confidence, grid, folder / f"{name}_confidence.nii.gz")
    flat = len(planes) == 1
    voxel = np.prod(grid.spacing[1:] if flat else grid.spacing)
    dsc, low, high = predict_dsc(model.about["calibration"], mean)
    return {
        "case": name,
        "slices": len(planes),
        "of_slices": len(labels),
        "unit": "mm2" if flat else "mm3",
        **{
            label: round(float((labels == value).sum() * voxel), 3)
            for label, value in zip(model.about["classes"], model.about["values"])
        },
        "confidence": mean,
        "predicted_dsc": dsc,
        "predicted_low": low,
        "predicted_high": high,
    }
