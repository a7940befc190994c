"""Which images to annotate: those whose registrations cover the cohort best, found without any mask."""

import numpy as np
import torch
from tqdm import tqdm

from lib.losses import gncc
from lib.warping import warp


@torch.no_grad()
def similarities(network, images, sources, targets, numerics):
    """GNCC of every source, registered to every target: ``(sources, targets)`` in [-1, 1].

    Args:
        network: a trained MrRegNet.
        images: ``(n, 1, height, width)`` on the device.
        sources, targets: indices of images.
    """
    network.eval()
    found = torch.empty(len(sources), len(targets))
    size = numerics.batch(images)
    for row, source in zip(found, tqdm(sources.tolist(), desc="coverage", unit="image", leave=False)):
        for part, index in zip(row.split(size), targets.split(size)):
            target = images[index]
            moving = images[source : source + 1].expand_as(target)
            with numerics.autocast():
                field = network.register(moving, target)
            part.copy_(gncc(warp(moving, field), target))
    return found


def cover(similarity, count):
    """Greedy facility location.

    A choice is worth the mean, over the targets, of the similarity to their best chosen source. Each next source is
    the one that raises this most.

    Args:
        similarity: ``(sources, targets)``.
        count: how many sources to choose, at most all.

    Returns:
        Positions of the chosen sources, in order.
    """
    similarity = np.asarray(similarity)
    covered, chosen = np.full(similarity.shape[1], -np.inf), []
    for _ in range(min(count, len(similarity))):
        gain = np.maximum(similarity, covered).mean(axis=1)
        gain[chosen] = -np.inf
        chosen.append(int(gain.argmax()))
        covered = np.maximum(covered, similarity[chosen[-1]])
    return chosen


def coverage_order(network, data, order, settings, numerics, generator):
    """Training images in the order in which they should be annotated.

    Args:
        network: MrRegNet, pre-trained without masks.
        data: Tensors.
        order: the random order of all training images; a subject's second slice comes after all first ones.
        settings: candidates to choose from, and how many targets to cover.
        generator: draws the targets.

    Returns:
        ``order``, with its first ``candidates`` images rearranged by ``cover``.
    """
    candidates, rest = order[: settings.candidates], order[settings.candidates :]
    drawn = torch.randperm(len(order), generator=generator, device=generator.device)[: settings.targets].cpu().numpy()
    as_index = lambda index: torch.as_tensor(index, device=data.images.device)
    similarity = similarities(network, data.images, as_index(candidates), as_index(order[drawn]), numerics)
    return np.concatenate((candidates[cover(similarity.cpu().numpy(), len(candidates))], rest))
