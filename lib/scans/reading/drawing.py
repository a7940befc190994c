"""What of a mask was drawn: all of it, or some slices only. What is not drawn trains nothing and is scored nowhere."""

import numpy as np

from lib import DataError
from lib.cohorts.reading import VIEWS, upright

THIN = 2  # slices; where no more of them in a row are marked, and are large, they were drawn one by one
LARGE = 8  # times as long and as wide as the longest row of marked slices


def drawn_part(labels, how, axis):
    """Which voxels of a mask are drawn, and the mask without what stands for undrawn.

    Args:
        labels: ``(slices, rows, columns)`` uint8, slices along ``axis``.
        how: folder.drawn: ``whole``; ``slices``, those along ``axis`` on which anything is marked; a label value, which
            says of a voxel that it is undrawn; ``auto``, ``slices`` of any direction where the mask looks like it.
        axis: of the canonical array.

    Returns:
        (labels, boolean array of the same shape or None where all is drawn, what was taken for drawn in words or "").

    Raises:
        DataError: ``how`` is none of these.
    """
    if isinstance(how, int) and not isinstance(how, bool) and 0 < how <= 255:
        drawn = labels != how
        return np.where(drawn, labels, 0).astype(np.uint8), None if drawn.all() else drawn, ""
    if how not in ("auto", "whole", "slices"):
        raise DataError(f"folder.drawn is '{how}', not auto, whole, slices or a label value from 1 to 255")
    if how == "whole" or not labels.any():
        return labels, None, ""
    along = 0 if how == "slices" else direction_of(labels)
    if along is None:
        return labels, None, ""
    marked = labels.any(axis=tuple(other for other in range(3) if other != along))
    if marked.all():
        return labels, None, ""
    shape = [-1 if other == along else 1 for other in range(3)]
    names = [VIEWS[one] for one in upright(axis)]
    note = f"{marked.sum()} of {len(marked)} {names[along]} slices are taken for drawn (folder.drawn)"
    return labels, np.broadcast_to(marked.reshape(shape), labels.shape), note


def direction_of(labels):
    """The axis of the array along which a mask was drawn on single slices; None where it looks whole.

    Such a mask is at most THIN slices thick wherever anything is marked, and LARGE times as wide in both other
    directions. A structure that is flat by nature looks alike: for it there is ``whole``.
    """
    found = np.nonzero(labels)
    for along in range(3):
        marked = np.unique(found[along])
        if labels.shape[along] < 2:
            continue
        thick = max(map(len, np.split(marked, np.flatnonzero(np.diff(marked) > 1) + 1)))
        wide = min(np.ptp(found[other]) + 1 for other in range(3) if other != along)
        if thick <= THIN and wide >= LARGE * thick:
            return along
    return None
