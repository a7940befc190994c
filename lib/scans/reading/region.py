"""The part of a scan that is seen, where the structure is small in it: a box around what a coarse view has found."""

from typing import NamedTuple

import numpy as np

from lib import DataError
from lib.cohorts.reading import Grid, read_volume, upright, upright_slices

MARGIN = 0.25  # of a side of what was found, left on both sides of it
STRAY = 0.005  # of the voxels that a coarse view marks: a few far off would make the region the whole scan


class Seen(NamedTuple):
    """A Grid of which a region is seen. Results go back onto the whole of it."""

    grid: Grid
    region: tuple = ()  # (first, one after the last) for every axis of the canonical array; () for all of it

    @property
    def axis(self):
        """Of the canonical array along which slices are taken."""
        return self.grid.axis

    @property
    def spacing(self):
        """mm between (slices, rows, columns)."""
        return self.grid.spacing

    @property
    def slices(self):
        """Shape (slices, rows, columns) of the region."""
        sides = [last - first for first, last in self.region]
        return tuple(sides[axis] for axis in upright(self.axis)) if sides else self.grid.slices

    def along(self, axis):
        """The same region, slices along another axis."""
        return self._replace(grid=self.grid.along(axis))

    def image(self, slices):
        """Slices of the region as an image of the whole scan, see reading.Grid. It is 0 outside the region."""
        if self.region:
            order = upright(self.axis)
            canonical = np.zeros([self.grid.slices[order.index(axis)] for axis in range(3)], slices.dtype)
            part_of(canonical, self.region)[...] = np.transpose(slices[:, ::-1], np.argsort(order))
            slices = upright_slices(canonical, self.axis)
        return self.grid.image(slices)


def part_of(volume, region):
    """What a region holds of a canonical volume; a view. See Seen."""
    return volume[tuple(slice(*ends) for ends in region)]


def region_around(marked, spacing, least, strays=0.0):
    """The region around what is marked, with a margin.

    Args:
        marked: boolean canonical volume.
        spacing: mm between its voxels, one for every axis.
        least: mm of margin on every side.
        strays: share of the voxels that may lie beyond either end.

    Returns:
        A region, see Seen; () where nothing is marked.
    """
    if not marked.any():
        return ()
    region = []
    for axis, mm in enumerate(spacing):
        count = marked.sum(axis=tuple(other for other in range(3) if other != axis)).cumsum()
        first = np.searchsorted(count, strays * count[-1], side="right")
        last = np.searchsorted(count, (1 - strays) * count[-1])
        margin = np.ceil(max(MARGIN * (last + 1 - first), least / mm))
        region.append((int(max(0, first - margin)), int(min(len(count), last + 1 + margin))))
    return tuple(region)


def joined(*regions):
    """The smallest region that holds all of these; those that are () do not count."""
    ends = [np.array(region) for region in regions if region]
    if not ends:
        return ()
    low, high = np.min(ends, axis=0)[:, 0], np.max(ends, axis=0)[:, 1]
    return tuple((int(first), int(last)) for first, last in zip(low, high))


def region_of(file, least, undrawn=None, strays=0.0):
    """``region_around`` what a mask marks, all labels together.

    Args:
        file: of the mask; None, and a file that cannot be read, give ().
        least: mm of margin.
        undrawn: label value that marks nothing.
        strays: of every label by itself, see ``region_around``.
    """
    if file is None:
        return ()
    try:
        labels, grid = read_volume(file)
    except (DataError, MemoryError):  # is reported when the case is read
        return ()
    order = upright(grid.axis)
    spacing = [grid.spacing[order.index(axis)] for axis in range(3)]
    values = np.setdiff1d(np.unique(labels), [0, *[undrawn] * (undrawn is not None)])
    return joined(*(region_around(labels == value, spacing, least, strays) for value in values))
