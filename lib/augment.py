"""Batched augmentation: affine maps with exact inverses, and intensity changes."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lib.warping import interpolate, pixel_grid, sample, warp


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


def elastic(n, space, generator, points, std):
    """``n`` smooth random displacement fields ``(n, axes, *space)`` in pixels, of images with two axes.

    Args:
        points: control points along every axis; cubic in between.
        std: of the displacement of a control point, in pixels.
    """
    shape = n, len(space), *[points] * len(space)
    control = std * torch.randn(shape, generator=generator, device=generator.device)
    return F.interpolate(control, size=tuple(space), mode="bicubic", align_corners=True)


def blur(images, sigma):
    """Images ``(n, 1, height, width)``, each under a Gaussian of its own standard deviation ``(n,)`` in pixels."""
    reach = 3  # pixels: three standard deviations of the strongest blur that is drawn
    offset = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-offset.square() / (2 * sigma.clamp_min(1e-2)[:, None].square()))
    kernel = (kernel / kernel.sum(dim=1, keepdim=True))[:, None, None]
    wide = F.pad(images, [reach] * 4, mode="replicate").movedim(0, 1)
    down = F.conv2d(wide, kernel.movedim(3, 2), groups=len(images))
    return F.conv2d(down, kernel, groups=len(images)).movedim(0, 1)


def lower_resolution(images, factor):
    """Images ``(n, 1, height, width)`` shrunk to ``factor`` of their sides and enlarged again, as a coarser scan."""
    space = images.shape[2:]
    return interpolate(F.interpolate(images, size=[max(2, round(factor * side)) for side in space], mode="area"), space)


def place(images, masks, generator, settings, flip, bend=True):
    """Geometric augmentation of recipe `strong`: an affine map and an elastic deformation, alike for image and mask.

    Args:
        images: ``(n, 1, height, width)`` in [0, 1].
        masks: ``(n, classes, height, width)``, moved with exactly the map of their image.
        flip: whether the anatomy is symmetric.
        settings: rotation (degrees), scaling, shift (of the side), half-widths of uniform ranges; and elastic: points,
            std (of the side), see ``elastic``.
        bend: whether there is an elastic deformation at all.

    Returns:
        (images, masks), moved.
    """
    n, space = len(images), images.shape[2:]
    maps = draw_affine(
        n, max(space), generator, rotation=settings.rotation, scaling=settings.scaling, shift=settings.shift, flip=flip
    )
    if bend:
        field = elastic(n, space, generator, settings.elastic.points, settings.elastic.std * max(space))
        images, masks = warp(images, field), warp(masks, field)
    return maps.apply(images), maps.apply(masks, padding="zeros")


def light(images, generator, settings):
    """Augmentation of intensities of recipe `strong`; nothing moves.

    Gamma, contrast and brightness change in every image; blur, low resolution and noise come with the probabilities of
    nnU-Net (Isensee et al., Nature Methods 2021).

    Args:
        images: ``(n, 1, height, width)`` in [0, 1].
        settings: gamma, contrast, brightness, half-widths of uniform ranges; and for blur (pixels), low_resolution (the
            smallest factor) and noise (standard deviation) the strongest, each with its probability in ``chance``.

    Returns:
        Images in [0, 1].
    """
    n = len(images)
    share = lambda: torch.rand(n, generator=generator, device=generator.device)
    chosen = lambda name: per_image((share() < settings.chance[name]).float(), images)
    images = images.clamp(0, 1).pow(per_image(uniform(n, settings.gamma, generator).exp(), images))
    images = change_contrast(images, 1 + uniform(n, settings.contrast, generator))
    images = images + per_image(uniform(n, settings.brightness, generator), images)
    images = torch.lerp(images, blur(images, settings.blur * share()), chosen("blur"))
    factor = float(1 - (1 - settings.low_resolution) * share()[0])  # one for a batch, whose images are resized together
    images = torch.lerp(images, lower_resolution(images, factor), chosen("low_resolution"))
    noise = torch.randn(images.shape, generator=generator, device=generator.device)
    strength = per_image(settings.noise * share(), images) * chosen("noise")
    return (images + strength * noise).clamp(0, 1)
