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


def rotation_matrices(angles):
    """Rotations ``(n, axes, axes)`` by angles in radians: ``(n, 1)`` in a plane, ``(n, 3)`` about each axis in turn."""
    n, count = angles.shape
    axes = 2 if count == 1 else 3
    whole = None
    for turn in range(count):
        first, second = [axis for axis in range(axes) if axes == 2 or axis != turn]
        cos, sin = angles[:, turn].cos(), angles[:, turn].sin()
        matrix = torch.eye(axes, device=angles.device).repeat(n, 1, 1)
        matrix[:, first, first] = matrix[:, second, second] = cos
        matrix[:, first, second], matrix[:, second, first] = -sin, sin
        whole = matrix if whole is None else whole @ matrix
    return whole


def draw_affine(n, space, generator, *, rotation=0.0, scaling=0.0, shift=0.0, flip=False, spacing=None):
    """``n`` random affine maps of images or volumes.

    Args:
        space: sides of the images, pixels.
        rotation: degrees, half-width of a uniform range; in volumes about every axis.
        scaling: factors are exp(U(-scaling, scaling)), one per axis.
        shift: fraction of the longest side.
        flip: mirror left and right, the last axis, in half of the maps.
        spacing: of the pixels along every axis, so that volumes with long voxels are turned as the body is; None: all
            alike.
    """
    axes = len(space)
    turn = rotation_matrices(uniform((n, 1 if axes == 2 else axes), math.radians(rotation), generator))
    scale = uniform((n, axes), scaling, generator).exp()
    if flip:
        mirror = torch.rand(n, generator=generator, device=generator.device) < 0.5
        scale[:, -1] = torch.where(mirror, -scale[:, -1], scale[:, -1])
    lengths = torch.tensor(spacing or [1.0] * axes)
    lengths = lengths / lengths.min()
    moved = uniform((n, axes), shift * max(side * length for side, length in zip(space, lengths.tolist())), generator)
    if spacing is None or len(set(spacing)) == 1:
        return Affine(turn * scale[:, None], moved)
    lengths = lengths.to(generator.device)
    return Affine(turn * scale[:, None] * lengths / lengths[:, None], moved / lengths)


def change_contrast(images, factors):
    """Each image's deviation from its mean times its factor ``(batch,)``, clipped to [0, 1]."""
    mean = images.mean(dim=tuple(range(1, images.ndim)), keepdim=True)
    return (mean + (images - mean) * per_image(factors, images)).clamp(0, 1)


def per_image(values, images):
    """Values ``(batch,)``, one for every image, in a shape that is broadcast over ``(batch, channels, *space)``."""
    return values.reshape(-1, *[1] * (images.ndim - 1))


def elastic(n, space, generator, points, std):
    """``n`` smooth random displacement fields ``(n, axes, *space)`` in pixels.

    Args:
        points: control points along every axis; cubic in between.
        std: of the displacement of a control point, in pixels; or one for every axis.
    """
    shape = n, len(space), *[points] * len(space)
    control = torch.randn(shape, generator=generator, device=generator.device)
    if isinstance(std, float):
        control = std * control
    else:
        control = torch.stack([one * control[:, axis] for axis, one in enumerate(std)], dim=1)
    if len(space) == 2:
        return F.interpolate(control, size=tuple(space), mode="bicubic", align_corners=True)
    for axis, side in enumerate(space, start=2):  # one axis after the other: torch has no cubic interpolation in 3D
        lines = control.movedim(axis, -1)
        finer = F.interpolate(
            lines.reshape(1, 1, -1, points), size=(lines[..., 0].numel(), side), mode="bicubic", align_corners=True
        )
        control = finer.reshape(*lines.shape[:-1], side).movedim(-1, axis)
    return control


def blur(images, sigma):
    """Images ``(n, 1, *space)``, each under a Gaussian of its own standard deviation ``(n,)`` in pixels."""
    reach, axes = 3, images.ndim - 2  # pixels: three standard deviations of the strongest blur that is drawn
    offset = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-offset.square() / (2 * sigma.clamp_min(1e-2)[:, None].square()))
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    blurred = F.pad(images, [reach] * 2 * axes, mode="replicate").movedim(0, 1)
    for axis in range(axes):
        line = kernel.reshape(len(images), 1, *(-1 if axis == other else 1 for other in range(axes)))
        blurred = FILTER[axes](blurred, line, groups=len(images))
    return blurred.movedim(0, 1)


FILTER = {2: F.conv2d, 3: F.conv3d}  # by the number of axes


def lower_resolution(images, factor):
    """Images ``(n, 1, *space)`` shrunk to ``factor`` of their sides and enlarged again, as a coarser scan."""
    space, images = images.shape[2:], images.contiguous()  # on a GPU pooling reads past the strides that blur leaves
    return interpolate(F.interpolate(images, size=[max(2, round(factor * side)) for side in space], mode="area"), space)


def place(images, masks, generator, settings, flip, bend=True, spacing=None):
    """Geometric augmentation of recipe `strong`: an affine map and an elastic deformation, alike for image and mask.

    Args:
        images: ``(n, 1, *space)`` in [0, 1].
        masks: ``(n, classes, *space)``, moved with exactly the map of their image.
        flip: whether the anatomy is symmetric.
        settings: rotation (degrees), scaling, shift (of the side), half-widths of uniform ranges; and elastic: points,
            std (of the side), see ``elastic``.
        bend: whether there is an elastic deformation at all.
        spacing: see ``draw_affine``.

    Returns:
        (images, masks), moved.
    """
    n, space = len(images), images.shape[2:]
    sizes = {"rotation": settings.rotation, "scaling": settings.scaling, "shift": settings.shift}
    maps = draw_affine(n, space, generator, flip=flip, spacing=spacing, **sizes)
    if bend:
        field = elastic(n, space, generator, settings.elastic.points, strength(settings.elastic.std, space, spacing))
        images, masks = warp(images, field), warp(masks, field)
    return maps.apply(images), maps.apply(masks, padding="zeros")


def strength(std, space, spacing):
    """A standard deviation that is given as a share of the longest side, in pixels: one for all axes, or for each."""
    if spacing is None or len(set(spacing)) == 1:
        return std * max(space)
    longest = max(side * length for side, length in zip(space, spacing))
    return [std * longest / length for length in spacing]


def light(images, generator, settings):
    """Augmentation of intensities of recipe `strong`; nothing moves.

    Gamma, contrast and brightness change in every image; blur, low resolution and noise come with the probabilities of
    nnU-Net (Isensee et al., Nature Methods 2021).

    Args:
        images: ``(n, 1, *space)`` in [0, 1].
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
