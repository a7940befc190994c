"""Soft pseudo-masks (P1, section 2.2): the mean of N test-time-augmented and N warped masks."""

from typing import NamedTuple

import torch
from tqdm import tqdm

from lib.augment import change_contrast, draw_affine, uniform
from lib.losses import gncc
from lib.warping import folding, warp


class PseudoMasks(NamedTuple):
    """What both networks say about a set of images; masks are ``(images, classes, *space)`` in [0, 1]."""

    plain: torch.Tensor  # the segmentation network's mask of the image as it is ("Joint" at test time)
    segmentation: torch.Tensor  # mean of the N segmentation masks
    registration: torch.Tensor  # mean of the N warped masks
    soft: torch.Tensor  # mean of all 2N: the soft pseudo-mask, and "Combined" at test time
    folding: torch.Tensor  # (images,) share of pixels with a non-positive Jacobian determinant, over the N fields


def segmentation_masks(network, images, n, generator, settings, flip, numerics, spacing=None):
    """N probabilistic masks of every image: the plain one and N - 1 under augmentation, mapped back.

    Args:
        network: ResidualUNet.
        images: ``(batch, 1, *space)``.
        n: N.
        generator: for the draws.
        settings: rotation (degrees), shift (of the side) and contrast, half-widths of uniform ranges.
        flip: whether the anatomy is symmetric, so that mirrored images are valid ones.
        spacing: see augment.draw_affine.

    Returns:
        ``(n, batch, classes, *space)`` in [0, 1].
    """
    batch, space = len(images), images.shape[2:]
    masks = []
    for k in range(n):
        if k == 0:
            with numerics.autocast():
                masks.append(network.segment(images))
            continue
        sizes = {"rotation": settings.rotation, "shift": settings.shift}
        maps = draw_affine(batch, space, generator, flip=flip, spacing=spacing, **sizes)
        seen = change_contrast(maps.apply(images), 1 + uniform(batch, settings.contrast, generator))
        with numerics.autocast():
            masks.append(network.segment(seen))
        masks[-1] = maps.inverse().apply(masks[-1], padding="zeros")
    return torch.stack(masks)


def registration_masks(network, images, sources, source_masks, choice, numerics):
    """N warped masks of every image: N labelled images are registered to it and their masks warped.

    Args:
        network: MrRegNet.
        images: targets ``(batch, 1, *space)``.
        sources, source_masks: labelled images and their masks.
        choice: ``(batch, n)`` indices of the sources of each target.

    Returns:
        Masks ``(n, batch, classes, *space)``, warped sources ``(n, batch, 1, *space)`` and
        displacements ``(n, batch, axes, *space)``.
    """
    masks, warped, displacements = [], [], []
    for index in choice.T:
        with numerics.autocast():
            displacement = network.register(sources[index], images)
        both = warp(torch.cat((sources[index], source_masks[index]), 1), displacement)
        warped.append(both[:, :1])
        masks.append(both[:, 1:])
        displacements.append(displacement)
    return torch.stack(masks), torch.stack(warped), torch.stack(displacements)


def draw_sources(images, sources, n, generator, matches=None):
    """``(images, n)`` random source indices: all different where there are enough, else repeated.

    Args:
        matches: ``(images, k)`` indices of the sources that may be drawn for each image; None for all.
    """
    count = sources if matches is None else matches.shape[1]
    order = torch.rand((images, count), generator=generator, device=generator.device).argsort(dim=1)
    drawn = order.repeat(1, -(-n // count))[:, :n]
    return drawn if matches is None else matches.gather(1, drawn)


def best_sources(network, images, sources, source_masks, n, candidates, generator, numerics, matches=None):
    """``(batch, n)`` indices of the sources most similar to each target after registration, by GNCC."""
    count = len(sources) if matches is None else matches.shape[1]
    drawn = draw_sources(len(images), len(sources), min(candidates, count), generator, matches)
    _, warped, _ = registration_masks(network, images, sources, source_masks, drawn, numerics)
    similarity = torch.stack([gncc(w, images) for w in warped], dim=1)
    ranked = drawn.gather(1, similarity.argsort(dim=1, descending=True))
    return ranked.repeat(1, -(-n // ranked.shape[1]))[:, :n]


@torch.no_grad()
def every_mask(networks, images, sources, source_masks, settings, flip, generator, numerics, matches=None):
    """The 2N masks of a batch of images: N by the segmentation network, N warped from sources.

    Args:
        as ``generate``.

    Returns:
        Masks of the segmentation ``(n, batch, classes, *space)``, the plain image's first, warped masks of the
        same shape, and their displacements ``(n, batch, axes, *space)``.

    Raises:
        ValueError: there is no labelled image, or ``settings.sources`` is not random or best.
    """
    if len(sources) == 0:
        raise ValueError("soft pseudo-masks need at least one labelled image: raise the rate")
    if settings.sources not in ("random", "best"):
        raise ValueError(f"pseudo_masks.sources '{settings.sources}' is not one of random, best")
    segmentation, registration = (network.eval() for network in networks)
    seen = segmentation_masks(segmentation, images, settings.n, generator, settings, flip, numerics)
    if settings.sources == "best":
        choice = best_sources(
            registration, images, sources, source_masks, settings.n, settings.candidates, generator, numerics, matches
        )
    else:
        choice = draw_sources(len(images), len(sources), settings.n, generator, matches)
    warped, _, displacements = registration_masks(registration, images, sources, source_masks, choice, numerics)
    return seen, warped, displacements


@torch.no_grad()
def generate(
    networks, images, sources, source_masks, settings, flip, generator, numerics, label="pseudo-masks", matches=None
):
    """Soft pseudo-masks of ``images``, computed in batches.

    Args:
        networks: (ResidualUNet, MrRegNet).
        images: ``(images, 1, *space)`` on the device.
        sources, source_masks: the labelled images and their masks.
        settings: n (N), sources (random or best), candidates that ``best`` chooses from, and the rotation, shift and
            contrast of ``segmentation_masks``.
        flip: whether the anatomy is symmetric.
        generator: for all draws.
        label: of the progress bar.
        matches: ``(images, k)`` indices of the sources that may be drawn for each image; None for all.

    Returns:
        PseudoMasks.

    Raises:
        ValueError: see ``every_mask``.
    """
    parts, size = [], numerics.batch(images)
    for start in tqdm(range(0, len(images), size), desc=label, unit="batch", leave=False):
        allowed = None if matches is None else matches[start : start + size]
        seen, warped, displacements = every_mask(
            networks, images[start : start + size], sources, source_masks, settings, flip, generator, numerics, allowed
        )
        folds = torch.stack([folding(d) for d in displacements]).mean(0)
        # Only means are kept: all 2N masks of many images would not fit into memory. seen[0] is of the plain image.
        parts.append(PseudoMasks(seen[0], seen.mean(0), warped.mean(0), torch.cat((seen, warped)).mean(0), folds))
    return PseudoMasks(*(torch.cat(part) for part in zip(*parts)))


def mean_confidence(soft, case=None):
    """Mean confidence of each soft mask, in [0.5, 1].

    The confidence of a pixel is max(p, 1 - p); it is averaged over the pixels that any mask marks at all
    (p > 0.05), so that the empty background does not count. 1 where no pixel is marked.

    Args:
        soft: ``(images, classes, *space)``.
        case: ``(images,)`` number, below ``images``, of the volume that each is a slice of. Slices of one volume are
            averaged together: those in which little is marked weigh little. None: every image is a case.

    Returns:
        ``(images,)``, the same for all slices of a volume.
    """
    marked, every = (soft > 0.05).float(), tuple(range(1, soft.ndim))
    total, count = (torch.maximum(soft, 1 - soft) * marked).sum(dim=every), marked.sum(dim=every)
    if case is not None:
        total, count = (torch.zeros_like(part).index_add(0, case, part)[case] for part in (total, count))
    return torch.where(count > 0, total / count.clamp_min(1), torch.ones_like(count))
