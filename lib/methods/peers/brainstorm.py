"""Pairs made by registration alone (Zhao et al., CVPR 2019): labelled images warped onto unlabelled anatomy.

Image and mask are warped by the same field, so that the pair is exact however good the field is.
"""

from lib.methods.peers.learning import prediction, teach
from lib.methods.peers.pairs import draw_pairs, register_pairs


def train(experiment):
    """(ResidualUNet, Fit)."""
    fields = register_pairs(experiment)

    def batch_loss(lesson, generator, step):
        _, images, masks = draw_pairs(lesson, fields, lesson.training.batch, generator)
        return {"loss": lesson.loss(lesson.student(images), masks)}

    return teach(experiment, "brainstorm", batch_loss, depends=[fields.cause])


def predict(experiment, index):
    """See methods.table."""
    return prediction(experiment, index, "brainstorm", "brainstorm")
