"""UniMatch (Yang et al., CVPR 2023): a weak view of an unlabelled image labels strong views of it.

Two strong views differ in intensities and have a box of another image in them (CutMix); in a third one features are
dropped. Pixels count of which the weak view is certain.
"""

import torch
import torch.nn.functional as F

from lib.methods.peers.bcp import box, paste
from lib.methods.peers.learning import prediction, teach


def batch_loss(lesson, generator, step):
    """See learning.learn."""
    options, half = lesson.options.unimatch, lesson.training.batch // 2
    known, masks = lesson.known(half, generator)
    weak = lesson.free(half, generator)
    said = lesson.teacher(weak)
    target = (said > 0.5).float()
    certain = (torch.maximum(said, 1 - said) > options.threshold).float().amin(dim=1, keepdim=True)
    other = lambda images: images.roll(1, 0)
    views, targets, weights = [], [], []
    for _ in range(2):
        inside = box(half, weak.shape[2:], options.share, generator)
        strong = lesson.light(weak, generator)
        for kept, of in ((views, strong), (targets, target), (weights, certain)):
            kept.append(paste(other(of), of, inside))
    logits = lesson.student(torch.cat((known, *views)))
    supervised = lesson.loss(logits[:half], masks)
    strong = lesson.loss(logits[half:], torch.cat(targets), torch.cat(weights))
    with lesson.numerics.autocast():
        features = lesson.networks.student.features(weak)
        keep = torch.rand(features.shape[:2], generator=generator, device=features.device) >= options.dropout
        dropped = features * keep[:, :, None, None] / (1 - options.dropout)
        logits = F.conv2d(dropped, lesson.networks.student.head.weight, lesson.networks.student.head.bias)
    dropping = lesson.loss(logits.float(), target, certain)
    return {
        "loss": (supervised + (strong + dropping) / 2) / 2,
        "supervised": supervised,
        "strong": strong,
        "dropping": dropping,
    }


def train(experiment):
    """(ResidualUNet, Fit)."""
    return teach(experiment, "unimatch", batch_loss)


def predict(experiment, index):
    """See methods.table."""
    return prediction(experiment, index, "unimatch", "unimatch")
