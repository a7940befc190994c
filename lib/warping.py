"""Displacement fields: warping, resizing, composing and measuring them.

A displacement ``D`` maps target coordinates to source coordinates: the warped source at pixel ``x`` is the
source sampled at ``x + D(x)`` (P1, section 2.3, the function f_D). Contract: ``warp(source, D)`` lies on the
target's grid and looks like the target.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}  # torch's names, by the number of axes


@lru_cache(maxsize=32)
def pixel_grid(space, device):
    """Coordinates of every pixel, one channel an axis: ``(1, axes, *space)`` float32."""
    axes = [torch.arange(side, device=device, dtype=torch.float32) for side in space]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def sample(image, coordinates, padding="border"):
    """``image`` at ``coordinates``, linear between pixels.

    Args:
        image: ``(batch, channels, *space)``.
        coordinates: ``(batch, axes, *grid)`` in pixels of ``image``, axes in the order of ``space``.
        padding: ``border`` repeats the edge, ``zeros`` is 0 outside.

    Returns:
        ``(batch, channels, *grid)`` in the type of ``image``, computed in float32.
    """
    # grid_sample takes coordinates in [-1, 1], last axis first
    scaled = [coordinates[:, axis] * (2 / max(side - 1, 1)) - 1 for axis, side in enumerate(image.shape[2:])]
    grid = torch.stack(scaled[::-1], dim=-1)
    return F.grid_sample(image.float(), grid, padding_mode=padding, align_corners=True).to(image.dtype)


def warp(image, displacement):
    """f_D of P1: ``image`` sampled at ``x + displacement(x)``, border padding.

    Args:
        image: ``(batch, channels, *space)``, images and masks alike.
        displacement: ``(batch, axes, *space)`` in pixels.
    """
    return sample(image, pixel_grid(displacement.shape[2:], displacement.device) + displacement)


def upsample_displacement(displacement, strides):
    """The same motion on a finer grid: values grow as pixels become smaller.

    Args:
        displacement: ``(batch, axes, *space)`` in pixels.
        strides: by how much every axis grows, 1 or 2.
    """
    finer = interpolate(displacement, [side * by for side, by in zip(displacement.shape[2:], strides)])
    return torch.stack([by * finer[:, axis] for axis, by in enumerate(strides)], dim=1)


def interpolate(values, space):
    """Values ``(batch, channels, *any)`` on a grid of the size ``space``, linear between the old grid's points."""
    return F.interpolate(values, size=tuple(space), mode=LINEAR[len(space)], align_corners=False)


def compose(first, second):
    """The displacement of warping by ``first`` and then by ``second``: x + second(x) + first(x + second(x))."""
    return second + warp(first, second)


def jacobian_determinant(displacement):
    """Determinant of the Jacobian of ``x + displacement(x)``, by central differences.

    Args:
        displacement: ``(batch, axes, *space)`` in pixels, of two or three axes.

    Returns:
        ``(batch, *space)``; 1 where nothing moves, non-positive where the map folds.
    """
    axes = displacement.shape[1]
    change = torch.gradient(displacement.float(), dim=list(range(2, 2 + axes)))
    # row k: how the map's component k changes along every axis
    rows = [[change[along][:, k] + (k == along) for along in range(axes)] for k in range(axes)]
    return determinant(rows)


def determinant(rows):
    """Determinant of square matrices, by expansion along the first row; entries are tensors of one shape."""
    if len(rows) == 1:
        return rows[0][0]
    minor = lambda k: determinant([row[:k] + row[k + 1 :] for row in rows[1:]])
    return sum((-1) ** k * rows[0][k] * minor(k) for k in range(len(rows)))


def folding(displacement):
    """Share of pixels with a non-positive Jacobian determinant, per field: ``(batch,)`` in [0, 1]."""
    space = tuple(range(1, displacement.ndim - 1))
    return (jacobian_determinant(displacement) <= 0).float().mean(dim=space)


def inverse_consistency_error(there, back):
    """Mean distance in pixels by which there and back again misses the start, per pair of fields: ``(batch,)``."""
    space = tuple(range(1, there.ndim - 1))
    return compose(there, back).square().sum(dim=1).sqrt().mean(dim=space)
