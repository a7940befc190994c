"""A cohort: slices or volumes with masks, subjects and a split by subject; and the same on the device."""

from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch

from lib.runs.files import save_arrays

UNDRAWN = 255  # label of what nobody has drawn: it trains nothing and is scored nowhere


def min_max(image):
    """An image scaled to [0, 1]; a constant one becomes 0."""
    low, high = float(image.min()), float(image.max())
    if high == low:
        return np.zeros_like(image, dtype=np.float32)
    return ((image - low) / (high - low)).astype(np.float32)


@dataclass(frozen=True)
class Cohort:
    """A table of images: slices, or whole volumes.

    Attributes:
        name: as in params.yaml.
        title: as in tables; says so where the cohort is simulated.
        images: ``(images, *space)`` float32 in [0, 1], or ``(images, channels, *space)``.
        labels: ``(images, *space)`` uint8, 0 background, 1.. the classes, or UNDRAWN.
        subjects: ``(images,)`` subject ids.
        split: ``(images,)`` one of splitting.SPLITS.
        classes: name of every foreground class.
        symmetric: whether a mirrored image is a valid one.
        pixel_mm: side of a pixel or voxel.
    """

    name: str
    title: str
    images: np.ndarray
    labels: np.ndarray
    subjects: np.ndarray
    split: np.ndarray
    classes: tuple
    symmetric: bool
    pixel_mm: float

    of_volumes: ClassVar[bool] = False  # whether the slices are of volumes, see cohorts.volumes

    @property
    def axes(self):
        """How many axes an image has: 2, or 3 if it is a volume."""
        return self.labels.ndim - 1

    @property
    def spacing(self):
        """mm between pixels or voxels along every axis."""
        return (self.pixel_mm,) * self.axes

    def index(self, split):
        """Indices of the slices of one split."""
        return np.flatnonzero(self.split == split)

    def order(self, seed):
        """Indices of the training images in the order in which they are labelled as the rate grows.

        Labelled images come from distinct subjects first: every subject gives one slice before any gives a second.
        Images without any structure come last: nobody would choose them to draw on.
        """
        rank, order = {}, []
        for index in np.random.default_rng([seed, 1]).permutation(self.index("train")):
            subject = self.subjects[index]
            rank[subject] = rank.get(subject, -1) + 1
            order.append((not self.labels[index].any(), rank[subject], len(order), index))
        return np.array([index for *_, index in sorted(order)])

    def count(self, rate):
        """How many training images are labelled at ``rate`` per cent; 1 % is the paper's five images."""
        total = len(self.index("train"))
        return min(total, 5 if rate == 1 else max(1, round(total * rate / 100)))

    def example(self, order):
        """Of ``order``, the slice to show: the one that is labelled last, and so is unlabelled at every lower rate."""
        return order[-1]

    def known(self, index):
        """Which of these slices have a true mask to be measured against."""
        return np.ones(len(index), bool)

    def units(self, index):
        """How many annotated things, here images, these slices are: the tables' n_labelled."""
        return len(index)

    def matches(self, index, sources):
        """Which of the slices ``sources`` correspond to each slice by their place in the body; None: any may."""

    def save(self, file):
        """Write the cohort as one .npz file; the same cohort gives the same bytes."""
        save_arrays({field.name: getattr(self, field.name) for field in fields(self)}, file)


def one_hot(labels, classes):
    """Label maps ``(n, *space)`` as masks ``(n, classes, *space)`` float32, background left out."""
    return np.stack([labels == value for value in range(1, classes + 1)], axis=1).astype(np.float32)


class Tensors:
    """A cohort on the device, with the labelled images drawn.

    Args:
        cohort, settings, numerics: of the experiment.

    Attributes:
        images: ``(images, channels, *space)``; masks: ``(images, classes, *space)``.
        guides: ``(images, 1, *space)``, the first channel, by which images are registered.
        drawn: ``(images, 1, *space)``, 0 where nobody has drawn, else 1; None where all is drawn.
        labelled, unlabelled, train, validation: index tensors.
        example: index ``(1,)`` of a training image that is unlabelled at every rate below 100 %, for pictures.
    """

    def __init__(self, cohort, settings, numerics):
        self.cohort = cohort
        of_one = cohort.images.ndim == cohort.labels.ndim
        self.images = numerics.tensor(cohort.images[:, None] if of_one else cohort.images)
        self.guides = self.images if of_one else numerics.tensor(cohort.images[:, :1])
        self.masks = numerics.tensor(one_hot(cohort.labels, len(cohort.classes)))
        undrawn = cohort.labels == UNDRAWN
        self.drawn = numerics.tensor(~undrawn[:, None]) if undrawn.any() else None
        self.as_index = lambda index: torch.as_tensor(index, device=numerics.device)
        self.train, self.validation = self.as_index(cohort.index("train")), self.as_index(cohort.index("validation"))
        self.symmetric = cohort.symmetric
        ordered, count = cohort.order(settings.seed), cohort.count(settings.rate)
        self.labelled = self.as_index(np.sort(ordered[:count]))
        self.unlabelled = self.as_index(np.sort(ordered[count:]))
        self.example = self.as_index([cohort.example(ordered)])
        self.along = self.as_index(cohort.positions) if hasattr(cohort, "positions") else None

    def known(self, index):
        """``(n,)`` which of the images ``index`` have a true mask to be measured against."""
        return self.as_index(self.cohort.known(index.cpu()))

    def positions(self, index):
        """Where slices of volumes lie along the axis, in [0, 1]; None where the images are not from volumes."""
        return None if self.along is None else self.along[index]
