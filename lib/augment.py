"""Batched augmentation: affine maps with exact inverses, and intensity changes."""

import math
from typing import NamedTuple

import torch

from lib.warping import pixel_grid, sample


class Affine(NamedTuple):
    """One affine map per image, about the image's centre c: y = c + matrix (x - c) + shift, in pixels.

    The transformed image shows at x what the original shows at y.
    """

    matrix: torch.Tensor  # (batch, axes, axes)
    shift: torch.Tensor  # (batch, axes)

    def inverse(self):
        """The map that undoes this one."""
        matrix = torch.linalg.inv_ex(self.matrix).inverse  # without waiting for the GPU to say whether it exists
        return Affine(matrix, -(matrix @ self.shift[..., None])[..., 0])

    def __getitem__(self, index):
        """The maps of some images of the batch, where ``index`` is a slice or index tensor."""
        return Affine(self.matrix[index], self.shift[index])

    def apply(self, images, padding="border"):
        """Images or masks ``(batch, channels, *space)``, transformed; outside, see ``warping.sample``."""
        space = images.shape[2:]
        grid = pixel_grid(space, images.device).flatten(2)
        centre = grid[..., -1:] / 2  # made on the device: a tensor from numbers would wait for the GPU
        moved = self.matrix @ (grid - centre) + centre + self.shift[..., None]
        return sample(images, moved.unflatten(2, space), padding)


def uniform(shape, half_width, generator):
    """Draws from U(-half_width, half_width) on the generator's device."""
    return (2 * torch.rand(shape, generator=generator, device=generator.device) - 1) * half_width


def draw_affine(n, side, generator, *, rotation=0.0, scaling=0.0, shift=0.0, flip=False):
    """``n`` random affine maps of images with two axes.

    Args:
        side: the longer side of the images, pixels.
        rotation: degrees, half-width of a uniform range.
        scaling: factors are exp(U(-scaling, scaling)), one per axis.
        shift: fraction of the side.
        flip: mirror left and right in half of the maps.
    """
    angle = uniform(n, math.radians(rotation), generator)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack((cos, -sin, sin, cos), -1).reshape(n, 2, 2)
    scale = uniform((n, 2), scaling, generator).exp()
    if flip:
        mirror = torch.rand(n, generator=generator, device=generator.device) < 0.5
        scale[:, 1] = torch.where(mirror, -scale[:, 1], scale[:, 1])
    return Affine(turn * scale[:, None], uniform((n, 2), shift * side, generator))


def change_contrast(images, factors):
    """Each image's deviation from its mean times its factor ``(batch,)``, clipped to [0, 1]."""
    mean = images.mean(dim=tuple(range(1, images.ndim)), keepdim=True)
    return (mean + (images - mean) * per_image(factors, images)).clamp(0, 1)


def per_image(values, images):
    """Values ``(batch,)``, one for every image, in a shape that is broadcast over ``(batch, channels, *space)``."""
    return values.reshape(-1, *[1] * (images.ndim - 1))


def augment(images, masks, generator, settings, flip, maps=None):
    """The strong recipe's augmentation of a training batch: one affine map for image and mask, then intensity.

    Args:
        images: ``(batch, 1, height, width)`` in [0, 1]; with ``maps``, any number of axes.
        masks: ``(batch, classes, height, width)``, moved with exactly the map of their image.
        settings: half-widths of uniform ranges: rotation (degrees), scaling, shift (of the side), gamma, contrast,
            brightness; and noise_std.
        flip: whether the anatomy is symmetric.
        maps: Affine, one per image; None draws them.

    Returns:
        Augmented (images, masks), same shapes and ranges.
    """
    n, side = len(images), max(images.shape[-2:])
    maps = maps or draw_affine(
        n, side, generator, rotation=settings.rotation, scaling=settings.scaling, shift=settings.shift, flip=flip
    )
    images, masks = maps.apply(images), maps.apply(masks, padding="zeros")
    gamma = per_image(uniform(n, settings.gamma, generator).exp(), images)
    images = images.clamp(0, 1).pow(gamma)
    images = change_contrast(images, 1 + uniform(n, settings.contrast, generator))
    images = images + per_image(uniform(n, settings.brightness, generator), images)
    noise = torch.randn(images.shape, generator=generator, device=generator.device)
    return (images + settings.noise_std * noise).clamp(0, 1), masks
