"""What the networks see of a folder of scans: slices or whole volumes, at which spacing, on a canvas of which size.

All of it follows from the scans, as nnU-Net does it (Isensee et al., Nature Methods 2021): the median spacing of the
labelled ones, and a canvas that holds the others too. No scan is squashed: its proportions stay as they are.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lib import DataError
from lib.cohorts.reading import VIEWS, on_canvas
from lib.models import LEVELS, strides_of

KINDS = "volumes", "slices"  # what a network sees; the settings are in params.SPACES
STEP = 2 ** (LEVELS - 1)  # sides of a canvas of slices are multiples of it
SHALLOW = 12  # slices; a volume of fewer is better taken slice by slice
LONG = 3.0  # times the pixels' side; where slices lie further apart they have little to say of one another (nnU-Net's)
COARSER = 1.25  # times the median spacing: volumes that would have to be made coarser than this are taken by slices
SEVERAL = 3  # drawn cases, from which slices of all directions are seen: see docs/own-scans.md
ENOUGH = 0.3  # of a pixel; a drawn slice may lie between two of the plan's
HELD = 95  # per cent of the scans that the canvas holds whole; of larger ones the middle trains, and all is segmented


class Plan(NamedTuple):
    """See above. In every array, also in volumes, slices along ``axis`` come first."""

    space: str  # of KINDS
    axis: int  # of the canonical array
    spacing: tuple  # mm between the pixels of (rows, columns), or the voxels of (slices, rows, columns)
    canvas: tuple  # sides in pixels or voxels

    @property
    def view(self):
        """What is seen, in a word: volumes, or the direction of the slices."""
        return "volumes" if self.space == "volumes" else VIEWS[self.axis]

    @property
    def in_words(self):
        """The same as the display says it."""
        return self.view if self.space == "volumes" else f"{self.view} slices"

    def mirrored(self, symmetric):
        """Whether the columns of its images may be flipped, of an anatomy that is symmetric or not.

        They run from left to right unless slices are sagittal.
        """
        return symmetric and self.axis != 0

    @property
    def strides(self):
        """Of the networks, see models.strides_of."""
        return strides_of(self.spacing, self.canvas) if self.space == "volumes" else strides_of((1, 1))

    def sides(self, grid):
        """Sides of a scan's images at the plan's spacing, tuple of 2 or 3."""
        own = list(zip(grid.slices, grid.spacing))[-len(self.spacing) :]
        return tuple(max(1, round(side * mm / to)) for (side, mm), to in zip(own, self.spacing))

    def images(self, stack, grid):
        """A scan ``(slices, rows, columns)`` as images ``(n, *space)`` float32 of the plan's spacing, on its canvas."""
        sides = self.sides(grid)
        whole = stack[None] if self.space == "volumes" else stack
        return placed(resized(whole, sides), [max(pair) for pair in zip(sides, self.canvas)])

    def labels(self, stack, grid, drawn=None):
        """Labels as ``images``, uint8: every pixel gets the label with the largest share of it, of what is drawn."""
        largest = self.images((stack == 0) if drawn is None else (stack == 0) & drawn, grid)
        found = np.zeros(largest.shape, np.uint8)
        for value in np.unique(stack[stack > 0]):
            share = self.images(stack == value, grid)
            found[share > largest] = value
            np.maximum(largest, share, out=largest)
        return found

    def drawn(self, stack, grid):
        """Which pixels of ``images`` were drawn at all, for boolean ``stack``; None for None, where all are."""
        return None if stack is None else self.images(stack, grid) > ENOUGH

    def restored(self, masks, grid, few):
        """Masks ``(n, classes, *space)`` of ``images``, on the scan's own slices.

        Yields:
            Tensors ``(few, classes, rows, columns)`` of slices one after another: all at once may not fit into memory.
        """
        sides = self.sides(grid)
        middle = tuple(
            slice((room - side) // 2, (room - side) // 2 + side) for room, side in zip(masks.shape[2:], sides)
        )
        masks = masks[(..., *middle)]
        if self.space == "volumes":  # trilinear: along the slices here, within them below
            count, coarse = grid.slices[0], masks[0].movedim(1, 0)
            at = ((torch.arange(count, device=masks.device) + 0.5) * len(coarse) / count - 0.5).clamp_min(0)
            below = at.floor().long().clamp_max(len(coarse) - 1)
            above, share = (below + 1).clamp_max(len(coarse) - 1), (at - below)[:, None, None, None]
            parts = (
                coarse[below[k : k + few]].lerp(coarse[above[k : k + few]], share[k : k + few].to(coarse.dtype))
                for k in range(0, count, few)
            )
        else:
            parts = masks.split(few)
        for part in parts:
            yield F.interpolate(part, size=grid.slices[1:], mode="bilinear", align_corners=False)

    def planes(self, positions, grid):
        """Which slices of a scan its images ``positions`` show: themselves, or all where the image is the volume."""
        return np.arange(grid.slices[0]) if self.space == "volumes" else positions

    @property
    def title(self):
        """The plan in words."""
        mm, sides = " x ".join(f"{side:.3g}" for side in self.spacing), " x ".join(map(str, self.canvas))
        kind, of = ("whole ", "voxels") if self.space == "volumes" else ("", "pixels")
        return f"{kind}{self.in_words} of {sides} {of} of {mm} mm"


def seen_whole(plans):
    """Whether scans are seen whole, not just some slices of theirs: as volumes, or from all directions."""
    return len(plans) > 1 or plans[0].space == "volumes"


def resized(images, sides):
    """Images or volumes ``(n, *space)`` at other sides, float32; averaged where they become smaller."""
    images = torch.as_tensor(np.ascontiguousarray(images), dtype=torch.float32)
    for axis, side in enumerate(sides, start=1):
        if images.shape[axis] != side:
            lines = images.movedim(axis, -1)
            flat = lines.reshape(1, 1, -1, lines.shape[-1])
            fine = F.interpolate(flat, size=(flat.shape[2], side), mode="bilinear", align_corners=False, antialias=True)
            images = fine.reshape(*lines.shape[:-1], side).movedim(-1, axis)
    return images.numpy()


def placed(images, sides):
    """Images ``(n, *space)`` in the middle of a canvas of zeros; of larger ones the middle."""
    return on_canvas(images, (len(images), *sides))


def plans_of(settings, cases):
    """The Plans for a folder of scans.

    Args:
        settings: section ``folder`` of params.yaml.
        cases: list of folder.Case.

    Returns:
        List of one Plan, or of three where slices of all directions are seen, those along folder.axis first.

    Raises:
        DataError: no case can be read, or scans are to be seen whole and are single slices.
    """
    grids = grids_of(cases, settings.axis)
    if part := [seen for seen in grids if seen[0].region]:  # scans in which nothing was found are seen through windows
        grids = part
    if not grids:
        raise DataError(f"no image in {settings.images} can be read: export them again as NIfTI")
    axis = majority([grid.axis for grid, _ in grids])
    if settings.space in ("volumes", "views") and all(grid.slices[0] == 1 for grid, _ in grids):
        raise DataError(f"{settings.images} holds single slices: set folder.space to slices or auto")
    volumes, slices = (plan_along(axis, kind, grids, settings) for kind in KINDS)
    space = settings.space
    if space == "auto":
        space = "views" if sum(drawn for _, drawn in grids) >= SEVERAL else "volumes"
        space = space if worth(volumes, grids, settings) else "slices"
    if space == "views":
        turned = lambda to: [(grid.along(to), drawn) for grid, drawn in grids]
        return [slices, *(plan_along(to, "slices", turned(to), settings) for to in range(3) if to != axis)]
    return [volumes if space == "volumes" else slices]


def grids_of(cases, axis):
    """Pairs of the region.Seen of every case, slices along ``axis``, and whether it has a mask."""
    grids = []
    for case in cases:
        try:
            grids.append((case.grid(axis), case.mask is not None))
        except DataError:  # is reported when its voxels are read
            continue
    return grids


def plan_along(axis, kind, grids, settings):
    """The Plan of a kind for scans whose slices are taken along ``axis``.

    Args:
        grids: pairs of every scan's Grid and whether it has a mask. Slices of theirs lie along the same axis, but for
            single slices, which keep their own.
    """
    spacing = np.median([grid.spacing for grid in labelled_of(grids)], axis=0)
    extents = np.array([np.multiply(grid.slices, grid.spacing) for grid, _ in grids])
    held = np.percentile(extents, HELD, axis=0, method="higher")  # mm
    if kind == "volumes":
        return plan_volumes(spacing, held, axis, settings.voxels)
    return plan_slices(spacing, held, axis, settings.size)


def labelled_of(grids):
    """The Grids of scans with masks, or of all where there is none."""
    return [grid for grid, drawn in grids if drawn] or [grid for grid, _ in grids]


def majority(values):
    """The most frequent value; of equally frequent ones the smallest."""
    values, counts = np.unique(values, return_counts=True)
    return int(values[counts.argmax()])


def worth(volumes, grids, settings):
    """Whether scans are seen whole: they are deep, slices lie close to one another, and a network can see it all."""
    labelled = labelled_of(grids)
    spacing = np.median([grid.spacing for grid in labelled], axis=0)
    deep = np.median([grid.slices[0] for grid in labelled]) >= SHALLOW
    close = max(spacing) <= LONG * min(spacing)
    fine = max(now / before for now, before in zip(volumes.spacing, spacing)) <= COARSER
    return settings.slices == "all" and deep and close and fine


def plan_slices(spacing, held, axis, longest):
    """Square pixels of the smaller of both spacings, or larger ones where the canvas would have a longer side."""
    pixel = max(min(spacing[1:]), max(held[1:]) / longest)
    canvas = [STEP * math.ceil(round(side / pixel) / STEP) for side in held[1:]]
    if max(canvas) == STEP:  # instance normalisation takes more than one pixel at the coarsest level
        canvas[1] += STEP
    return Plan("slices", axis, (float(pixel),) * 2, tuple(canvas))


def plan_volumes(spacing, held, axis, most):
    """Voxels of the median spacing, or larger ones where the canvas would hold more than ``most`` of them."""
    factor = 1.0
    while True:
        voxel = tuple(float(factor * side) for side in spacing)
        sides = [max(1, round(side / mm)) for side, mm in zip(held, voxel)]
        steps = [math.prod(along) for along in zip(*strides_of(voxel, sides))]
        canvas = tuple(step * math.ceil(side / step) for side, step in zip(sides, steps))
        if math.prod(canvas) <= most:
            return Plan("volumes", axis, voxel, canvas)
        factor *= 1.02
