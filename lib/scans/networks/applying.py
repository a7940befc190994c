"""Applying a model to one scan: labels and confidence on the scan's own grid."""

import math

import numpy as np
import torch

from lib.cohorts.reading import turned
from lib.metrics import harden, to_labels
from lib.pseudo_masks import segmentation_masks
from lib.results.calibration import predict_dsc
from lib.runs.params import section
from lib.scans.networks.memory import with_less_memory
from lib.scans.reading.folder import write_scan

WHOLE = 4  # canvases; larger images are seen through windows
FAINT = 0.05  # probability, as in pseudo_masks.mean_confidence
FEW = 16  # slices that become labels at a time: a large volume has many


class Confidence:
    """Which DSC the probabilities of a case lead to expect of its mask. They come piece by piece.

    Soft Dice confidence (Borges et al., arXiv 2402.10665, 2024): DSC of the mask and its probabilities, whose number of
    pixels is their sum. Mean over the classes that are marked. Probabilities below FAINT do not count: over the many
    pixels of a large image they would add up to more than the structure.
    """

    def __init__(self):
        self.common = self.either = 0.0

    def add(self, masks):
        """Count in masks ``(n, classes, *space)``."""
        seen, marked = masks * (masks > FAINT), harden(masks)
        of_classes = lambda part: part.sum(dim=[0, *range(2, part.ndim)], dtype=torch.float64).cpu()
        self.common += of_classes(seen * marked)
        self.either += torch.stack((of_classes(seen), of_classes(marked)))

    @property
    def value(self):
        """In [0, 1]; 0 where no pixel is marked."""
        pixels, marked = self.either
        found = (2 * self.common / (pixels + marked))[marked > 0]
        return float(found.mean()) if len(found) else 0.0


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
        views = options.n, generator, options, plan.mirrored(about["symmetric"]), numerics, plan.spacing
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
        grid: region.Seen of the image, or a Space.
        numerics: compute.Numerics.
        confidence: Confidence, which is told of the masks: of one network's as it gives them, since on a finer grid
            their edges are smoother; of several networks' mean on the case's grid.

    Yields:
        Tensors ``(at most FEW, classes, rows, columns)``, slices along the first plan's axis one after another.
    """
    if len(model.networks) > 1:
        yield from mean_of(model, images, grid, numerics, confidence)
        return
    for soft in soft_masks(model.networks[0], model.plans[0], model.about, images[0], numerics):
        confidence.add(soft)
        yield from model.plans[0].restored(soft, grid, FEW)


def mean_of(model, images, grid, numerics, confidence):
    """``masks_of`` where there are several networks. They may see slices of different directions.

    Their sum is held in memory: 4 bytes for every voxel and class.
    """
    first, classes = model.plans[0], range(len(model.about["classes"]))
    total = np.zeros((len(classes), *grid.slices), np.float32)
    for network, plan, seen in zip(model.networks, model.plans, images):
        along = [turned(total[k], first.axis, plan.axis) for k in classes]  # views
        start = 0
        for soft in soft_masks(network, plan, model.about, seen, numerics):
            for part in plan.restored(soft, grid.along(plan.axis), FEW):
                part = part.float().cpu().numpy()
                for k in classes:
                    along[k][start : start + len(part)] += part[:, k]
                start += len(part)
    for start in range(0, total.shape[1], FEW):
        mean = numerics.tensor(np.moveaxis(total[:, start : start + FEW], 1, 0) / len(model.networks))
        confidence.add(mean)
        yield mean


def segment(model, images, planes, grid, numerics):
    """Labels and confidence of one case, on its own grid.

    Args:
        model, images, grid, numerics: see ``masks_of``.
        planes: positions in the grid of the slices that are segmented.

    Returns:
        (labels uint8, confidence float32 of every pixel's label, both ``(slices, rows, columns)`` and 0 in slices that
        are not segmented; Confidence of the case).
    """
    labels, confidence = np.zeros(grid.slices, np.uint8), np.zeros(grid.slices, np.float32)
    values = np.array([0, *model.about["values"]], np.uint8)
    sure = Confidence()
    for masks in masks_of(model, images, grid, numerics, sure):
        at, planes = planes[: len(masks)], planes[len(masks) :]
        labels[at] = values[to_labels(masks).cpu().numpy()]
        every = torch.cat((1 - masks.sum(dim=1, keepdim=True), masks), dim=1)
        confidence[at] = every.amax(dim=1).clamp(0, 1).cpu().numpy().round(3)
    return labels, confidence, sure.value


def apply(model, name, images, planes, grid, folder, numerics):
    """Segment one case, write its mask and confidence map, and return its row of cases.csv.

    Args:
        model, images, planes, grid, numerics: see ``segment``.
        name: of the case.
        folder: where ``<name>_mask.nii.gz`` and ``<name>_confidence.nii.gz`` go.

    Returns:
        Dictionary. Volumes, of what was segmented, are in mm³, areas, of single slices, in mm².
    """
    labels, confidence, sure = with_less_memory(
        lambda divisor: segment(model, images, planes, grid, numerics.sharing(1 / divisor)), name
    )
    write_scan(labels, grid, folder / f"{name}_mask.nii.gz")
    write_scan(confidence, grid, folder / f"{name}_confidence.nii.gz")
    flat = len(planes) == 1
    voxel = np.prod(grid.spacing[1:] if flat else grid.spacing)
    dsc, low, high = predict_dsc(model.about["calibration"], sure)
    return {
        "case": name,
        "slices": len(planes),
        "of_slices": grid.grid.slices[0],
        "unit": "mm2" if flat else "mm3",
        **{
            label: round(float((labels == value).sum() * voxel), 3)
            for label, value in zip(model.about["classes"], model.about["values"])
        },
        "confidence": sure,
        "predicted_dsc": dsc,
        "predicted_low": low,
        "predicted_high": high,
    }
