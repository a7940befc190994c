"""Correspondence in the whole pool: every unlabelled image with the images most like it registered to it.

The masks that a network gives to the neighbours are warped along the displacement fields and fused. Errors that the
network makes in one image and not in another are outvoted. It is the idea of multi-atlas segmentation with atlases
that nobody has drawn: LEAP (Wolz et al., NeuroImage 2010) hands masks on from image to image, MAGeT (Chakravarty et
al., Human Brain Mapping 2013) registers what a few atlases have segmented. Weights are those of joint label fusion
(Wang et al., TPAMI 2013), without its search of patches. No mask is looked at for neighbours, fields or weights.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib.methods.experiment import load_pretrained_registration
from lib.methods.peers.learning import SEEDS, labelled_images
from lib.refinement import Refined
from lib.runs.cabinet import NEIGHBOURS
from lib.runs.versions import fingerprint
from lib.training import Clock, weights_digest
from lib.warping import warp

REACH = 0.1  # of the axis: slices of volumes have neighbours at about their own height
RADIUS = {2: 2, 3: 1}  # of a patch, in pixels, by the number of axes: 25 pixels or 27


class Neighbours(NamedTuple):
    """For each of n unlabelled images, k images of the pool: the unlabelled images, then the labelled ones."""

    sources: torch.Tensor  # (n, k) positions in the pool, the most similar first
    fields: torch.Tensor  # (n, k, axes, *space), in pixels: each warps its source onto the image
    weights: torch.Tensor  # (n, k, *space) of every source at every pixel; they sum to 1
    residuals: torch.Tensor  # (n, *space) how unlike the image its warped sources are; see ``patch_errors``
    cause: str = ""  # fingerprint of what they were made from and how

    def fuse(self, masks):
        """Masks of the unlabelled images from those of their neighbours.

        Args:
            masks: ``(pool, classes, *space)`` in [0, 1].

        Returns:
            ``(n, classes, *space)`` in [0, 1].
        """
        fused = torch.zeros_like(masks[: len(self.sources)])
        for k in range(self.sources.shape[1]):
            fused += self.weights[:, k, None] * warp(masks[self.sources[:, k]], self.fields[:, k].float())
        return fused.clamp(0, 1)  # joint label fusion may give negative weights


def nearest(images, subjects, count, targets, along=None):
    """The images that correlate best with each of the first ones, before any registration.

    Args:
        images: ``(pool, 1, *space)``.
        subjects: ``(pool,)`` subject of each: none is a neighbour of its own subject's images.
        count: of neighbours; fewer where there are fewer images of other subjects.
        targets: how many images, from the first, want neighbours.
        along: ``(pool,)`` where slices lie along their volume's axis, in [0, 1]; None for other images.

    Returns:
        ``(targets, count)`` positions, the most similar first.
    """
    pixels = images.flatten(1).float()
    pixels = F.normalize(pixels - pixels.mean(1, keepdim=True), dim=1)
    similar = pixels[:targets] @ pixels.T  # the GNCC of every pair
    if along is not None:
        similar -= 2.0 * ((along[:targets, None] - along).abs() > REACH)  # only where none is nearer
    same = subjects[:targets, None] == subjects
    others = int((~same).sum(1).min()) if targets else 0
    return similar.masked_fill(same, -torch.inf).topk(min(count, others), dim=1).indices


def patches(images):
    """The patch around every pixel, with mean 0 and standard deviation 1: ``(n, pixels of a patch, *space)``.

    Args:
        images: ``(n, 1, *space)``.
    """
    axes = images.ndim - 2
    radius = RADIUS[axes]
    found = F.pad(images.float(), (radius,) * 2 * axes, mode="replicate")[:, 0]
    for axis in range(1, axes + 1):
        found = found.unfold(axis, 2 * radius + 1, 1)
    found = found.flatten(1 + axes).movedim(-1, 1)
    found = found - found.mean(1, keepdim=True)
    return found / (found.std(1, keepdim=True) + 1e-3)


def patch_errors(warped, target):
    """How wrong sources are at every pixel, and how wrong they are together.

    Args:
        warped: ``(n, k, *space)``, sources warped onto the target.
        target: ``(n, 1, *space)``.

    Returns:
        ``(n, *space, k, k)``: means over a patch of the products of two sources' absolute differences from the target.
        On the diagonal they are 2 - 2 r for a patch whose correlation with the target's is r.
    """
    own = patches(target)
    errors = torch.stack([(patches(warped[:, k, None]) - own).abs() for k in range(warped.shape[1])], 1)
    return torch.einsum("nkp...,nlp...->n...kl", errors, errors) / errors.shape[2]


def fusion_weights(errors, regularisation):
    """The weights of joint label fusion (Wang et al., TPAMI 2013): similar sources weigh much, sources
    that are wrong together share their weight.

    Args:
        errors: of ``patch_errors``.
        regularisation: alpha of the paper, added to the diagonal; the larger it is, the more alike are the weights.

    Returns:
        ``(n, k, *space)``, with sum 1 over the k; single ones may be negative.
    """
    together = errors.square() + regularisation * torch.eye(errors.shape[-1], device=errors.device)
    weights = torch.linalg.solve(together, torch.ones_like(together[..., :1]))[..., 0]
    return (weights / weights.sum(-1, keepdim=True)).movedim(-1, 1)


@torch.no_grad()
def find_neighbours(experiment):
    """Neighbours of all unlabelled images, registered by the pre-trained network and refined for each pair.

    Returns:
        Neighbours. Setting ``strong.joint_plus.control`` leaves out what it is to measure: ``random`` takes any images
        as neighbours, ``unmoved`` and ``forced`` do not register them.
    """
    data, numerics, options = experiment.data, experiment.numerics, experiment.settings.strong.joint_plus
    pretrained, refinement = load_pretrained_registration(experiment), experiment.settings.refinement
    known = labelled_images(experiment)
    cause = fingerprint(weights_digest(pretrained), refinement, options, known.tolist())
    network = Refined(pretrained, refinement).eval()
    pool, count = torch.cat((data.unlabelled, known)), len(data.unlabelled)
    images, clock = data.guides[pool], Clock(numerics.device)
    subjects = data.as_index(np.unique(experiment.cohort.subjects[pool.cpu()], return_inverse=True)[1])
    compared = images
    if options.control == "random":
        generator = numerics.generator(experiment.settings.seed, *SEEDS, "neighbours")
        compared = torch.rand((len(pool), 1, 64), generator=generator, device=images.device)
    sources = nearest(compared, subjects, options.neighbours, count, data.positions(pool))
    k, space = sources.shape[1], images.shape[2:]
    fields = [images.new_zeros(0, k, len(space), *space, dtype=torch.float16)]
    weights, residuals = [images.new_zeros(0, k, *space)], [images.new_zeros(0, *space)]
    size = max(1, numerics.batch(images) // max(k, 1))
    batches = list(zip(images[:count].split(size), sources.split(size))) if k else []
    for target, chosen in tqdm(batches, desc="neighbours", unit="batch"):
        source = images[chosen.flatten()]
        with numerics.autocast():
            field = network.register(source, target.repeat_interleave(k, 0))
        field = field * (options.control not in ("unmoved", "forced"))
        warped = warp(source, field).unflatten(0, (-1, k))[:, :, 0]
        fields.append(field.unflatten(0, (-1, k)).half())
        errors = patch_errors(warped, target)
        weights.append(fusion_weights(errors, options.regularisation))
        residuals.append(errors.diagonal(dim1=-2, dim2=-1).mean(-1))
    experiment.note_cost(NEIGHBOURS, clock.read())
    return Neighbours(sources, torch.cat(fields), torch.cat(weights), torch.cat(residuals), cause)
