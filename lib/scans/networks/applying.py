"""Applying a model to one scan: labels and confidence on the scan's own grid."""

import math

import numpy as np
import torch

from lib.metrics import to_labels
from lib.pseudo_masks import mean_confidence, segmentation_masks
from lib.results.calibration import predict_dsc
from lib.runs.params import section
from lib.scans.networks.memory import with_less_memory
from lib.scans.reading.folder import write_scan

WHOLE = 4  # canvases; larger images are seen through windows
FEW = 16  # slices that become labels at a time: a large volume has many


def confidence_of(soft):
    """Mean confidence of a case from its masks ``(n, classes, *space)``: in [0.5, 1]."""
    return float(mean_confidence(soft.movedim(0, 1).flatten(1)[None, :, :, None]))


@torch.no_grad()
def soft_masks(model, images, numerics):
    """Probabilities of a case's slices, or of the volume: the mean over networks and over N augmented views.

    Images of more than WHOLE canvases, fewer where memory is short, are seen through overlapping windows of a canvas
    each, blended by a Gaussian.

    Args:
        model: Model on the device.
        images: ``(n, channels, *space)`` in [0, 1].

    Yields:
        Batches ``(n, classes, *space)``. The draws depend on nothing but the case's own images.
    """
    about, plan = model.about, model.plan
    options = section(about["pseudo_masks"])
    large = math.prod(images.shape[2:]) > WHOLE * numerics.share * math.prod(plan.canvas)
    size = 1 if large else numerics.batch(images)
    for start in range(0, len(images), size):
        seen = numerics.tensor(images[start : start + size])
        generator = numerics.generator("own", start)
        views = options.n, generator, options, about["symmetric"], numerics, plan.spacing
        look = lambda part: torch.stack(
            [segmentation_masks(network, part, *views).mean(dim=0) for network in model.networks]
        ).mean(dim=0)
        yield through_windows(look, seen, plan.canvas) if large else look(seen)


def through_windows(look, images, canvas):
    """What ``look`` makes of images ``(n, channels, *space)``, window by window."""
    from monai.inferers import sliding_window_inference  # takes seconds to import: only large images wait

    return sliding_window_inference(images, canvas, 1, look, overlap=0.5, mode="gaussian")


def segment(model, images, positions, grid, numerics):
    """Labels and confidence of one case, on its own grid.

    Args:
        model: Model on the device.
        images: all of the case, as the store has them.
        positions: those that are segmented.
        grid: folder.Grid of the image.

    Returns:
        (labels uint8, confidence float32 of every pixel's label, both ``(slices, rows, columns)`` and 0 in slices that
        are not segmented; mean confidence in [0.5, 1], see pseudo_masks.mean_confidence).
    """
    shape = grid.slices
    labels, confidence = np.zeros(shape, np.uint8), np.zeros(shape, np.float32)
    values = np.array([0, *model.about["values"]], np.uint8)
    seen, start = [], 0
    plan = model.plan
    for soft in soft_masks(model, images[positions], numerics):
        at = plan.planes(positions[start : start + len(soft)], grid)
        start += len(soft)
        for planes, masks in zip(np.split(at, range(FEW, len(at), FEW)), plan.restored(soft, grid, FEW)):
            labels[planes] = values[to_labels(masks).cpu().numpy()]
            every = torch.cat((1 - masks.sum(dim=1, keepdim=True), masks), dim=1)
            confidence[planes] = every.amax(dim=1).clamp(0, 1).cpu().numpy().round(3)
        seen.append(soft)
    return labels, confidence, confidence_of(torch.cat(seen))


def apply(model, name, images, positions, grid, folder, numerics):
    """Segment one case, write its mask and confidence map, and return its row of cases.csv.

    Args:
        model, images, positions, grid, numerics: see ``segment``.
        name: of the case.
        folder: where ``<name>_mask.nii.gz`` and ``<name>_confidence.nii.gz`` go.

    Returns:
        Dictionary. Volumes, of what was segmented, are in mm³, areas, of single slices, in mm².
    """
    labels, confidence, mean = with_less_memory(
        lambda divisor: segment(model, images, positions, grid, numerics.sharing(1 / divisor)), name
    )
    write_scan(labels, grid, folder / f"{name}_mask.nii.gz")
    write_scan(confidence, grid, folder / f"{name}_confidence.nii.gz")
    count = len(model.plan.planes(positions, grid))
    flat = count == 1
    voxel = np.prod(grid.spacing[1:] if flat else grid.spacing)
    dsc, low, high = predict_dsc(model.about["calibration"], mean)
    return {
        "case": name,
        "slices": count,
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
