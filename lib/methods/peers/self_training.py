"""Self-training (noisy student; Xie et al., CVPR 2020): a teacher's masks of the unlabelled images, and a new student.

The teacher learns the labelled images for half of the steps. Then a student learns, from scratch and under the full
augmentation, the labelled images and the unlabelled ones with the teacher's masks, half and half.
"""

import torch

from lib.methods.peers.learning import learn, prediction
from lib.methods.pretraining import save_network, segment
from lib.training import draw_indices, weights_digest


def train(experiment):
    """(ResidualUNet, Fit) of the student; the Fit's seconds are those of both."""

    def taught(lesson, generator, step):
        images, masks = lesson.known(lesson.training.batch, generator)
        return {"loss": lesson.loss(lesson.student(images), masks)}

    teacher, first = learn(experiment, "self_training_teacher", taught, part=0.5)
    with torch.no_grad():
        guessed = (segment(experiment, teacher, experiment.data.unlabelled) > 0.5).float()

    def batch_loss(lesson, generator, step):
        half = lesson.training.batch // 2
        known, masks = lesson.known(half, generator)
        index = draw_indices(len(guessed), half, generator)
        free, target = lesson.move(lesson.unlabelled[index], guessed[index], generator)
        images = torch.cat((known, lesson.light(free, generator)))
        return {"loss": lesson.loss(lesson.student(images), torch.cat((masks, target)))}

    network, second = learn(experiment, "self_training", batch_loss, depends=[weights_digest(teacher)], part=0.5)
    found = second._replace(seconds=first.seconds + second.seconds)
    save_network(experiment, "self_training", network, found)
    return network, found


def predict(experiment, index):
    """See methods.table."""
    return prediction(experiment, index, "self_training", "self-training")
