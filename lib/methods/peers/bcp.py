"""BCP, bidirectional copy-paste (Bai et al., CVPR 2023): labelled and unlabelled images pasted into one another.

A box of a labelled image goes into an unlabelled one, and the other way round. Masks go with them: true ones, and those
of the averaged network. For a first part of the steps labelled images are pasted into one another.

The authors keep the largest component of every class of the network's masks. That holds for organs that are one piece
in every image, and is a setting here: a slice of the hippocampus often shows two pieces.
"""

from typing import NamedTuple

import numpy as np
import torch

from lib.methods.peers.learning import prediction, teach


def box(n, space, share, generator):
    """Random boxes ``(n, 1, *space)``: 1 inside, with sides that are ``share`` of the image's, and 0 outside."""
    inside = torch.ones((n, 1, *space), device=generator.device)
    for axis, side in enumerate(space):
        length = max(1, round(share * side))
        first = torch.randint(side - length + 1, (n, 1), generator=generator, device=generator.device)
        at = torch.arange(side, device=generator.device)
        here = (at >= first) & (at < first + length)
        inside = inside * here.reshape(n, 1, *(side if k == axis else 1 for k in range(len(space))))
    return inside


def paste(first, second, inside):
    """``first`` where ``inside`` is 1 and ``second`` where it is 0; images and masks alike."""
    return inside * first + (1 - inside) * second


def largest_components(masks):
    """The largest connected component of every binary mask ``(n, classes, *space)``."""
    from scipy import ndimage  # takes half a second to import: only hearts wait

    kept = np.zeros(masks.shape, np.float32)
    marked = masks.cpu().numpy() > 0.5
    for at in np.ndindex(*marked.shape[:2]):
        parts, count = ndimage.label(marked[at])
        if count:
            kept[at] = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    return torch.as_tensor(kept, device=masks.device)


class Batch(NamedTuple):
    """What the network sees in a step."""

    images: torch.Tensor  # (batch, 1, *space)
    target: torch.Tensor  # (batch, classes, *space), of 0 and 1; one channel more where masks are drawn in part
    weight: torch.Tensor  # (batch, 1, *space) how much a pixel counts


def taught_by_teacher(lesson, count, generator):
    """``count`` unlabelled images, augmented, and the averaged network's masks of them."""
    images = lesson.light(lesson.free(count, generator), generator)
    return images, lesson.teacher(images)


def make_batch(lesson, unlabelled, generator, step):
    """The Batch of training step ``step``, by ``unlabelled``: a function as ``taught_by_teacher``."""
    options = lesson.options.bcp
    batch, space = lesson.training.batch, lesson.labelled.shape[2:]
    if step < options.pretraining * lesson.training.steps:
        (first, first_masks), (second, second_masks) = (lesson.known(batch, generator) for _ in range(2))
        inside = box(batch, space, options.share, generator)
        images, target = paste(first, second, inside), paste(first_masks, second_masks, inside)
        return Batch(images, target, torch.ones_like(inside))
    return paste_both_ways(lesson, unlabelled, generator)


def paste_both_ways(lesson, unlabelled, generator):
    """A Batch of labelled images pasted into unlabelled ones and the other way round; see ``make_batch``."""
    options, half = lesson.options.bcp, lesson.training.batch // 2
    known, masks = lesson.known(half, generator)
    free, guessed = unlabelled(lesson, half, generator)
    guessed = (guessed > 0.5).float()
    if options.one_piece:
        guessed = largest_components(guessed)
    guessed = lesson.guessed(guessed)
    inside = box(half, free.shape[2:], options.share, generator)
    true = torch.cat((inside, 1 - inside))  # where the mask was drawn by hand
    return Batch(
        torch.cat((paste(known, free, inside), paste(free, known, inside))),
        torch.cat((paste(masks, guessed, inside), paste(guessed, masks, inside))),
        true + options.unlabelled * (1 - true),
    )


def loss_of(lesson, batch):
    """The named losses of a Batch, for learning.learn."""
    return {"loss": lesson.loss(lesson.student(batch.images), batch.target, batch.weight)}


def batch_loss(lesson, generator, step):
    """A batch_loss of learning.learn: BCP's own."""
    return loss_of(lesson, make_batch(lesson, taught_by_teacher, generator, step))


def train(experiment):
    """(ResidualUNet, Fit)."""
    return teach(experiment, "bcp", batch_loss)


def predict(experiment, index):
    """See methods.table."""
    return prediction(experiment, index, "bcp", "bcp")
