"""Applying a model to one scan: labels and confidence on the scan's own grid."""

import numpy as np
import torch
import torch.nn.functional as F

from lib.metrics import to_labels
from lib.pseudo_masks import mean_confidence, segmentation_masks
from lib.results.calibration import predict_dsc
from lib.runs.params import section
from lib.scans.folder import write_scan
from lib.scans.memory import with_less_memory


def confidence_of(soft):
    """Mean confidence of a case from the masks of its slices, ``(slices, classes, size, size)``: in [0.5, 1]."""
    return float(mean_confidence(soft.movedim(0, 1).flatten(1)[None, :, :, None]))


@torch.no_grad()
def soft_masks(model, slices, numerics):
    """Probabilities of a case's slices: the mean over networks and over N augmented views.

    Args:
        model: Model on the device.
        slices: ``(slices, size, size)`` in [0, 1].

    Yields:
        Batches ``(slices, classes, size, size)``. The draws depend on nothing but the case's own slices.
    """
    options = section(model.about["pseudo_masks"])
    size = numerics.batch(slices[:, None])
    for start in range(0, len(slices), size):
        images = numerics.tensor(slices[start : start + size])[:, None]
        generator = numerics.generator("own", start)
        parts = [
            segmentation_masks(network, images, options.n, generator, options, model.about["symmetric"], numerics).mean(
                dim=0
            )
            for network in model.networks
        ]
        yield torch.stack(parts).mean(dim=0)


def segment(model, slices, positions, grid, numerics):
    """Labels and confidence of one case, on its own grid.

    Args:
        model: Model on the device.
        slices: all of the case, as the store has them.
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
    for soft in soft_masks(model, slices[positions], numerics):
        at = positions[start : start + len(soft)]
        start += len(soft)
        masks = F.interpolate(soft, size=shape[1:], mode="bilinear", align_corners=False)
        labels[at] = values[to_labels(masks).cpu().numpy()]
        every = torch.cat((1 - masks.sum(dim=1, keepdim=True), masks), dim=1)
        confidence[at] = every.amax(dim=1).clamp(0, 1).cpu().numpy().round(3)
        seen.append(soft)
    return labels, confidence, confidence_of(torch.cat(seen))


def apply(model, name, slices, positions, grid, folder, numerics):
    """Segment one case, write its mask and confidence map, and return its row of cases.csv.

    Args:
        model, slices, positions, grid, numerics: see ``segment``.
        name: of the case.
        folder: where ``<name>_mask.nii.gz`` and ``<name>_confidence.nii.gz`` go.

    Returns:
        Dictionary. Volumes, of what was segmented, are in mm³, areas, of single slices, in mm².
    """
    labels, confidence, mean = with_less_memory(
        lambda divisor: segment(model, slices, positions, grid, numerics.sharing(1 / divisor)), name
    )
    write_scan(labels, grid, folder / f"{name}_mask.nii.gz")
    write_scan(confidence, grid, folder / f"{name}_confidence.nii.gz")
    flat = len(positions) == 1
    voxel = np.prod(grid.spacing[1:] if flat else grid.spacing)
    dsc, low, high = predict_dsc(model.about["calibration"], mean)
    return {
        "case": name,
        "slices": len(positions),
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
