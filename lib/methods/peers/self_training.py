"""Self-training (noisy student; Xie et al., CVPR 2020): a teacher's masks of the unlabelled images, and a new student.

The teacher learns the labelled images for half of the steps. Then a student learns, from scratch and under the full
augmentation, the labelled images and the unlabelled ones with the teacher's masks, half and half.
"""

import torch

from lib.methods.peers.learning import labelled_loss, learn, prediction, taught_loss
from lib.methods.pretraining import save_network, segment
from lib.training import weights_digest


def train(experiment):
    """(ResidualUNet, Fit) of the student; the Fit's seconds are those of both."""
    teacher, first = learn(experiment, "self_training_teacher", labelled_loss, part=0.5)
    with torch.no_grad():
        guessed = (segment(experiment, teacher, experiment.data.unlabelled) > 0.5).float()

    def batch_loss(lesson, generator, step):
        return taught_loss(lesson, guessed, generator)

    network, second = learn(experiment, "self_training", batch_loss, depends=[weights_digest(teacher)], part=0.5)
    found = second._replace(seconds=first.seconds + second.seconds)
    save_network(experiment, "self_training", network, found)
    return network, found


def predict(experiment, index):
    """See methods.table."""
    return prediction(experiment, index, "self_training", "self-training")
