"""joint+: registration hands the network's masks from image to image, and the network learns from what they agree on.

1. For a first part of the steps a network learns by BCP.
2. Every unlabelled image has its neighbours, labelled or not, registered to it. Their masks, true or the network's, are
   warped onto it and fused with its own (see ``neighbours``), as much as the warped neighbours look like the image.
3. The network goes on by copy-paste, with the fused masks in place of its own.

So joint+ without the second step is BCP that goes on from its own masks, and the difference is what fusion is worth.
What registration adds to fusion is the difference from neighbours that are not registered and fused all the same
(setting ``control``: forced). P1's joint training is its ancestor: there too both networks make the pseudo-masks that
the segmentation goes on from, but only labelled images are warped.
"""

import torch

from lib.methods.peers import bcp
from lib.methods.peers.learning import labelled_images, learn, prediction
from lib.methods.peers.neighbours import find_neighbours
from lib.methods.pretraining import save_network, segment
from lib.training import draw_indices

UNLIKE = 0.56  # residual at which both kinds of masks count the same: hippocampus has 0.35, ACDC 0.72
DOUBTFUL = 0.05  # probability of a pixel that may be marked


@torch.no_grad()
def pool_masks(experiment, network):
    """Masks of the unlabelled images by the network, then of the labelled ones, true wherever they are drawn.

    Returns:
        ``(pool, classes, *space)`` in [0, 1]; the pool is that of ``neighbours``.
    """
    data, known = experiment.data, labelled_images(experiment)
    free, true = segment(experiment, network, data.unlabelled), data.masks[known]
    if data.drawn is not None:
        drawn = data.drawn[known]
        true = drawn * true + (1 - drawn) * segment(experiment, network, known)
    return torch.cat((free.float(), true))


def weight_of_own(least, residuals, guessed, fused):
    """How much the network's own masks count beside the fused ones: a number from ``least`` to 1, for all images alike.

    Where registration fails, warped neighbours do not look like the image, and their masks are wrong. This can be seen
    without any mask: in the residuals at pixels where a mask is in doubt. The weight is a half where they are UNLIKE.

    Args:
        residuals: ``(n, *space)`` of the Neighbours.
        guessed, fused: masks ``(n, classes, *space)`` in [0, 1], of the network and of the neighbours.
    """
    doubt = sum((masks > DOUBTFUL) & (masks < 1 - DOUBTFUL) for masks in (guessed, fused)).any(1).flatten(1)
    shown = doubt.any(1)
    if not shown.any():
        return least
    doubt, residuals = doubt[shown], residuals.flatten(1)[shown]
    fourth = float(((doubt * residuals).sum(1) / doubt.sum(1)).mean()) ** 4
    return max(least, fourth / (fourth + UNLIKE**4))


def fused_masks(experiment, neighbours, network):
    """What the network goes on from. With setting ``control: forced`` the fused masks count whatever they look like.

    Returns:
        (masks ``(unlabelled, classes, *space)`` in [0, 1]; the weight that the network's own have in them).
    """
    masks, least = pool_masks(experiment, network), experiment.settings.strong.joint_plus.own
    guessed = masks[: len(experiment.data.unlabelled)]
    if not neighbours.sources.shape[1]:
        return guessed, 1.0
    fused = neighbours.fuse(masks)
    forced = experiment.settings.strong.joint_plus.control == "forced"
    own = least if forced else weight_of_own(least, neighbours.residuals, guessed, fused)
    return own * guessed + (1 - own) * fused, own


def taught_by(masks):
    """As bcp.taught_by_teacher: with these masks of all unlabelled images, moved with them."""

    def unlabelled(lesson, count, generator):
        index = draw_indices(len(masks), count, generator)
        images, moved = lesson.move(lesson.unlabelled[index], masks[index], generator)
        return lesson.light(images, generator), moved

    return unlabelled


def begin(experiment):
    """The first part, BCP: (ResidualUNet, Fit)."""
    options = experiment.settings.strong
    part = options.joint_plus.pretraining
    return learn(experiment, "joint_plus_start", bcp.batch_loss, [options.bcp], part, "joint+: before fusion")


def go_on(experiment, network, cause, masks):
    """The second part: (ResidualUNet, Fit). Setting ``strong.joint_plus.control``: with ``teacher`` it is BCP again.

    Args:
        network: of the first part.
        cause: of the Neighbours.
        masks: of ``fused_masks``.
    """
    options = experiment.settings.strong
    unlabelled = bcp.taught_by_teacher if options.joint_plus.control == "teacher" else taught_by(masks)

    def batch_loss(lesson, generator, step):
        return bcp.loss_of(lesson, bcp.paste_both_ways(lesson, unlabelled, generator))

    part = 1 - options.joint_plus.pretraining
    depends = options.bcp, cause, UNLIKE
    return learn(experiment, "joint_plus", batch_loss, depends, part, "joint+", start=network)


def train(experiment):
    """(ResidualUNet, Fit) of the second part; the Fit's seconds are those of both."""
    first, begun = begin(experiment)
    neighbours = find_neighbours(experiment)
    network, found = go_on(experiment, first, neighbours.cause, fused_masks(experiment, neighbours, first)[0])
    return save(experiment, network, begun, found)


def save(experiment, network, begun, found):
    """Save the network, with the time of both parts and what was watched: (ResidualUNet, Fit), as ``train``."""
    steps = len(begun.history)
    watched = [*begun.watched, *((steps + step, seen) for step, seen in found.watched)]
    found = found._replace(seconds=begun.seconds + found.seconds, watched=watched)
    save_network(experiment, "joint_plus", network, found)
    return network, found


def predict(experiment, index):
    """See methods.table."""
    return prediction(experiment, index, "joint_plus", "joint+")
