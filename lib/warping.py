"""Displacement fields: warping, resizing, composing and measuring them.

A displacement ``D`` maps target coordinates to source coordinates: the warped source at pixel ``x`` is the
source sampled at ``x + D(x)`` (P1, section 2.3, the function f_D). Contract: ``warp(source, D)`` lies on the
target's grid and looks like the target.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F


@lru_cache(maxsize=32)
def pixel_grid(height, width, device):
    """Pixel coordinates, row then column, as ``(1, 2, height, width)`` float32."""
    rows = torch.arange(height, device=device, dtype=torch.float32)
    columns = torch.arange(width, device=device, dtype=torch.float32)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]


def sample(image, coordinates, padding="border"):
    """``image`` at ``coordinates``, bilinear.

    Args:
        image: ``(batch, channels, height, width)``.
        coordinates: ``(batch, 2, h, w)`` in pixels of ``image``, row then column.
        padding: ``border`` repeats the edge, ``zeros`` is 0 outside.

    Returns:
        ``(batch, channels, h, w)`` in the type of ``image``, computed in float32.
    """
    height, width = image.shape[-2:]
    rows = coordinates[:, 0] * (2 / max(height - 1, 1)) - 1
    columns = coordinates[:, 1] * (2 / max(width - 1, 1)) - 1
    grid = torch.stack((columns, rows), dim=-1)
    return F.grid_sample(image.float(), grid, padding_mode=padding, align_corners=True).to(image.dtype)


def warp(image, displacement):
    """f_D of P1: ``image`` sampled at ``x + displacement(x)``, border padding.

    Args:
        image: ``(batch, channels, height, width)``, images and masks alike.
        displacement: ``(batch, 2, height, width)`` in pixels.
    """
    height, width = displacement.shape[-2:]
    return sample(image, pixel_grid(height, width, displacement.device) + displacement)


def upsample_displacement(displacement):
    """The same motion on a grid of twice the size: values doubled, since pixels are half as large."""
    return 2 * F.interpolate(displacement, scale_factor=2, mode="bilinear", align_corners=False)


def compose(first, second):
    """The displacement of warping by ``first`` and then by ``second``: x + second(x) + first(x + second(x))."""
    return second + warp(first, second)


def jacobian_determinant(displacement):
    """Determinant of the Jacobian of ``x + displacement(x)``, by central differences.

    Returns:
        ``(batch, height, width)``; 1 where nothing moves, non-positive where the map folds.
    """
    d_rows, d_columns = torch.gradient(displacement.float(), dim=(2, 3))
    return (1 + d_rows[:, 0]) * (1 + d_columns[:, 1]) - d_rows[:, 1] * d_columns[:, 0]


def folding(displacement):
    """Share of pixels with a non-positive Jacobian determinant, per field: ``(batch,)`` in [0, 1]."""
    return (jacobian_determinant(displacement) <= 0).float().mean(dim=(1, 2))


def inverse_consistency_error(there, back):
    """Mean distance in pixels by which there and back again misses the start, per pair of fields: ``(batch,)``."""
    return compose(there, back).square().sum(dim=1).sqrt().mean(dim=(1, 2))
