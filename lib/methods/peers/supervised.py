"""fs, the baseline of recipe `strong`: the labelled images alone."""

from lib.methods.peers.learning import prediction, teach


def train(experiment, stage="segmentation", bend=False):
    """Train on the labelled images alone: (ResidualUNet, Fit).

    Args:
        stage: under which the network is saved.
        bend: whether images are deformed elastically as well.
    """

    def batch_loss(lesson, generator, step):
        images, masks = lesson.known(lesson.training.batch, generator, bend)
        return {"loss": lesson.loss(lesson.student(images), masks)}

    return teach(experiment, stage, batch_loss)


def predict(experiment, index):
    """See methods.table."""
    return prediction(experiment, index, "segmentation", "fs")
