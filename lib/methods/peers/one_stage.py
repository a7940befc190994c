"""joint+: copy-paste in which what is pasted has been warped onto the anatomy that it is pasted into, in one stage.

Registration brings exact masks under real anatomical variation, copy-paste the unlabelled images as background, the
averaged network what it has learnt from both. A box of a labelled image, warped onto an unlabelled one, goes into that
image, and the other way round, so that the organ lands where it belongs. Of the warped image the mask is exact. Of the
unlabelled one the target is a mean of the warped mask and the averaged network's: P1's soft pseudo-mask in one stage.
It begins with the warped mask and ends with the network's, which has learnt from all. A pixel counts by their agreement
in the beginning, and fully in the end. Half of what is pasted is not warped, as in BCP: where registration fails, the
other half does not.

Closest to it are Zhao et al. (CVPR 2019), whose pairs it trains on, DeepAtlas (Xu and Niethammer, MICCAI 2019), where
either network teaches the other, and BCP.
"""

from typing import NamedTuple

import torch

from lib.methods.peers.bcp import box, paste
from lib.methods.peers.learning import prediction, teach
from lib.methods.peers.pairs import draw_pairs, register_pairs


class Batch(NamedTuple):
    """What the network sees in a step; labelled images first, then both ways of pasting."""

    images: torch.Tensor  # (batch, 1, *space)
    target: torch.Tensor  # (batch, classes, *space) in [0, 1]
    weight: torch.Tensor  # (batch, 1, *space) how much a pixel counts


def make_batch(lesson, fields, generator, step):
    """A Batch of training step ``step``.

    Args:
        lesson: peers.learning.Lesson.
        fields: pairs.Fields.
    """
    options, batch = lesson.options.one_stage, lesson.training.batch
    count = max(1, int((1 - options.labelled) * batch / 2))
    known, masks = lesson.known(batch - 2 * count, generator)
    free, warped, exact = draw_pairs(lesson, fields, count, generator)
    said = lesson.teacher(free)
    trusted = options.teacher * min(1.0, step / max(1.0, options.ramp * lesson.training.steps))
    soft = torch.lerp(exact, said, trusted)
    agreement = 1 - (1 - trusted) * options.agreement * (said - exact).abs().amax(dim=1, keepdim=True)
    if plain := int(options.unwarped * count):
        own, own_masks = lesson.known(plain, generator)
        warped, exact = torch.cat((warped[plain:], own)), torch.cat((exact[plain:], own_masks))
    inside = box(count, free.shape[2:], options.share, generator)
    ones = torch.ones_like(inside)
    return Batch(
        torch.cat((known, paste(warped, free, inside), paste(free, warped, inside))),
        torch.cat((masks, paste(exact, soft, inside), paste(soft, exact, inside))),
        torch.cat((torch.ones_like(known), paste(ones, agreement, inside), paste(agreement, ones, inside))),
    )


def train(experiment):
    """(ResidualUNet, Fit)."""
    fields = register_pairs(experiment)

    def batch_loss(lesson, generator, step):
        batch = make_batch(lesson, fields, generator, step)
        return {"loss": lesson.loss(lesson.student(batch.images), batch.target, batch.weight)}

    return teach(experiment, "one_stage", batch_loss, depends=[fields.cause], label="joint+")


def predict(experiment, index):
    """See methods.table."""
    return prediction(experiment, index, "one_stage", "joint+")
