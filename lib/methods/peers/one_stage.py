"""joint+: copy-paste in which what is pasted has been warped onto the anatomy that it is pasted into.

It is BCP with other labelled images. Half of those that go into a batch have been registered to an unlabelled image and
warped onto it, and are pasted into that image, so that the organ lands where it belongs. Their masks are warped by the
same field and are exact, however good the field is. The other half is not warped: where registration fails, that half
does not. So joint+ without registration is BCP, and what registration is worth can be read from the difference.

Closest to it are Zhao et al. (CVPR 2019), whose pairs it trains on, DeepAtlas (Xu and Niethammer, MICCAI 2019), where
registration and segmentation teach each other, and BCP.
"""

from functools import partial

import torch

from lib.methods.peers.bcp import Supply, loss_of
from lib.methods.peers.learning import prediction, teach
from lib.methods.peers.pairs import draw_pairs, register_pairs


class Warped(Supply):
    """See bcp.Supply; half of the labelled images are warped.

    Args:
        fields: pairs.Fields.
        lesson: peers.learning.Lesson.
    """

    def __init__(self, fields, lesson):
        super().__init__(lesson)
        self.fields = fields

    def known(self, count, generator):
        """``count`` labelled images and their masks, in random order."""
        images, masks, _ = self.both(count, generator)
        order = torch.randperm(count, generator=generator, device=images.device)
        return images[order], masks[order]

    def both(self, count, generator):
        """``count`` labelled images, their masks, and the unlabelled images that the warped ones were warped onto."""
        free, images, masks = draw_pairs(self.lesson, self.fields, count, generator)
        if plain := round(self.lesson.options.one_stage.unwarped * count):
            own, own_masks = self.lesson.known(plain, generator)
            images, masks = torch.cat((own, images[plain:])), torch.cat((own_masks, masks[plain:]))
        return images, masks, free


def train(experiment):
    """(ResidualUNet, Fit)."""
    fields = register_pairs(experiment)
    return teach(
        experiment,
        "one_stage",
        loss_of(partial(Warped, fields)),
        depends=[fields.cause, experiment.settings.strong.bcp],
        label="joint+",
    )


def predict(experiment, index):
    """See methods.table."""
    return prediction(experiment, index, "one_stage", "joint+")
