"""Which cases to draw next: those that the network is least sure of, and that are unlike what is drawn already."""

import numpy as np
import torch
import torch.nn.functional as F

MOST = 50  # cases that are ranked
SIDES = (8, 8, 8)  # of the thumbnails that are compared: slices, rows, columns


def thumbnail(images):
    """A coarse view of a case: a vector with mean 0 and norm 1, so that a product of two is their GNCC.

    Args:
        images: ``(n, channels, *space)`` of its slices, or of the volume; the first channel counts.
    """
    first = torch.as_tensor(np.asarray(images[:, 0], np.float32))
    first = first if first.ndim == 3 else first[0]
    pixels = F.interpolate(first[None, None], size=SIDES, mode="area").flatten()
    pixels = pixels - pixels.mean()
    return F.normalize(pixels, dim=0).numpy()


def ranked(views, drawn, confidence, most=MOST):
    """Positions of undrawn cases in the order in which to draw them.

    Candidates are the less confident half of the undrawn cases. The first is the candidate that is least like any drawn
    one; every next one is the least like what is drawn and what is ranked before it (farthest-point sampling, as
    the core-set selection of Sener and Savarese, ICLR 2018).

    Args:
        views: ``(cases, features)``, of ``thumbnail``.
        drawn: ``(cases,)`` boolean.
        confidence: ``(cases,)``; NaN for a case that was not segmented: it is no candidate.
        most: cases that are ranked at most.
    """
    free = np.flatnonzero(~drawn & np.isfinite(confidence))
    half = -(-len(free) // 2)
    candidates = free[np.argsort(confidence[free], kind="stable")[:half]]
    if not len(candidates):
        return []
    seen = views[candidates]
    # The GNCC with the most similar drawn case. Without any, the least confident case comes first.
    nearest = (seen @ views[drawn].T).max(axis=1) if drawn.any() else np.arange(len(candidates)) - 2.0 * len(candidates)
    order = []
    for _ in range(min(most, len(candidates))):
        best = int(nearest.argmin())
        order.append(int(candidates[best]))
        nearest = np.maximum(nearest, seen @ seen[best])
        nearest[best] = np.inf
    return order


def draw_next(rows, images):
    """Give rows of cases.csv their rank as ``draw_next``, 1 for the case to draw first; see ``ranked``.

    Args:
        rows: dictionaries with case, labelled, and confidence where it was segmented.
        images: function of a case's name that gives what ``thumbnail`` wants.
    """
    rows = [row for row in rows if "labelled" in row]  # the others could not be read
    if rows:
        confidence = np.array([row.get("confidence", np.nan) for row in rows], float)
        views = np.stack([thumbnail(images(row["case"])) for row in rows])
        for rank, k in enumerate(ranked(views, np.array([row["labelled"] for row in rows]), confidence), start=1):
            rows[k]["draw_next"] = rank
