"""Cohorts whose slices are from 3D volumes: resized for the networks, and kept at their original size to be scored."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from lib.cohorts.cohort import Cohort, min_max
from lib.metrics import to_labels


@dataclass(frozen=True)
class VolumeCohort(Cohort):
    """Slices of volumes. Those of one volume stand together, in their order along the axis.

    Attributes, besides those of Cohort:
        volumes: ``(slices,)`` id of the volume that a slice is from.
        positions: ``(slices,)`` float32 along the axis, 0 the first slice of its volume, 1 the last.
        ranks: ``(slices,)`` place of the slice's subject in the order in which subjects are labelled.
        shapes: ``(volumes, 3)`` original height, width and slices, in the order in which the volumes stand.
        boxes: ``(volumes, 4)`` what the slices show of it: first row, first column, rows and columns in its own pixels.
            A box may reach beyond the volume.
        truth: ``(voxels,)`` uint8, the original labels of all volumes that do not train, one after another, slices
            first. Only those volumes are scored by them.
    """

    volumes: np.ndarray
    positions: np.ndarray
    ranks: np.ndarray
    shapes: np.ndarray
    boxes: np.ndarray
    truth: np.ndarray

    of_volumes: ClassVar[bool] = True

    def order(self, seed):
        """Training slices, subject after subject in the order that the split gives; no seed changes it."""
        train = self.index("train")
        return train[np.argsort(self.ranks[train], kind="stable")]

    def count(self, rate):
        """How many training slices the labelled subjects have at ``rate`` per cent of the subjects."""
        ranks = self.ranks[self.index("train")]
        subjects = len(np.unique(ranks))
        return int((ranks < max(1, round(subjects * rate / 100))).sum())

    def example(self, order):
        """As Cohort has it, from the middle of the last volume, since the outermost slices show little."""
        members = np.flatnonzero(self.volumes == self.volumes[order[-1]])
        return members[len(members) // 2]

    def units(self, index):
        """How many subjects these slices are from: the tables' n_labelled."""
        return len(np.unique(self.subjects[np.asarray(index)]))

    def firsts(self):
        """Indices of the first slices of all volumes in the order in which they stand."""
        return np.sort(np.unique(self.volumes, return_index=True)[1])

    def names(self):
        """Ids of all volumes in the order in which they stand."""
        return self.volumes[self.firsts()]

    def original(self, number):
        """Labels of the volume at place ``number``: ``(slices, height, width)`` uint8.

        Raises:
            ValueError: it is a training volume.
        """
        sizes = np.where(self.split[self.firsts()] == "train", 0, self.shapes.prod(axis=1))
        if not sizes[number]:
            raise ValueError(f"{self.names()[number]} trains: its original labels are not kept")
        height, width, slices = self.shapes[number]
        start = sizes[:number].sum()
        return self.truth[start : start + sizes[number]].reshape(slices, height, width)

    def restore(self, number, masks):
        """Masks of the volume at place ``number`` at its original size; outside the box there is nothing.

        Args:
            masks: tensor ``(slices, classes, size, size)`` in [0, 1].

        Returns:
            tensor ``(slices, classes, height, width)`` float32 on the CPU.
        """
        height, width, _ = self.shapes[number]
        row, column, rows, columns = map(int, self.boxes[number])
        inside = F.interpolate(masks.float().cpu(), size=(rows, columns), mode="bilinear", align_corners=False)
        return F.pad(inside, (column, width - column - columns, row, height - row - rows))

    def hard_volumes(self, masks, index):
        """Predicted and true masks ``(1, classes, slices, height, width)`` of volumes at their original size.

        Args:
            masks: ``(slices, classes, size, size)`` in [0, 1], of the slices ``index``, which hold whole volumes.

        Yields:
            (position in ``index`` of the volume's first slice, predicted, true), for every volume.
        """
        for number, name in enumerate(self.names()):
            position = np.flatnonzero(self.volumes[index] == name)
            if len(position) == 0:
                continue
            truth = torch.as_tensor(self.original(number).astype(np.int64))
            seen = self.restore(number, masks[position])
            values = range(1, len(self.classes) + 1)
            hard = [torch.stack([found == value for value in values])[None] for found in (to_labels(seen), truth)]
            yield position[0], *hard

    def matches(self, index, sources):
        """For every slice: the slice of every volume among ``sources`` that lies nearest along the axis.

        Args:
            index: ``(n,)`` slices.
            sources: ``(m,)`` slices.

        Returns:
            ``(n, volumes among the sources)`` positions in ``sources``.
        """
        index, sources = np.asarray(index), np.asarray(sources)
        nearest = []
        for volume in dict.fromkeys(self.volumes[sources]):
            members = np.flatnonzero(self.volumes[sources] == volume)
            distance = np.abs(self.positions[index][:, None] - self.positions[sources[members]])
            nearest.append(members[distance.argmin(axis=1)])
        return np.stack(nearest, axis=1)


@dataclass(frozen=True)
class OwnCohort(VolumeCohort):
    """A user's slices or volumes: those with a mask are labelled, the rest is not, and there is nothing to test on.

    Attributes, besides those of VolumeCohort:
        masked: ``(images,)`` whether an image has a mask.
        voxel_mm: ``(axes,)`` mm between pixels or voxels.
    """

    masked: np.ndarray
    voxel_mm: np.ndarray

    @property
    def spacing(self):
        """See Cohort."""
        return tuple(self.voxel_mm.tolist())

    def order(self, seed):
        """Training slices, those with masks first; no seed changes it."""
        train = self.index("train")
        return train[np.argsort(~self.masked[train], kind="stable")]

    def count(self, rate):
        """How many training slices have masks, whatever the rate."""
        return int(self.masked[self.index("train")].sum())

    def known(self, index):
        """Which of these slices have a true mask to be measured against."""
        return self.masked[np.asarray(index)]


def fit_to(image, size):
    """A stack of slices ``(slices, height, width)`` resized to ``size`` x ``size``."""
    tensor = torch.as_tensor(np.ascontiguousarray(image), dtype=torch.float32)[:, None]
    return F.interpolate(tensor, size=(size, size), mode="bilinear", align_corners=False, antialias=True)[:, 0].numpy()


def fit_labels(labels, size):
    """Labels resized as ``fit_to`` resizes images, uint8: every pixel gets the label with the largest share of it."""
    found = np.zeros((len(labels), size, size), np.uint8)
    largest = np.full(found.shape, -np.inf, np.float32)
    for value in np.unique(labels):
        share = fit_to(labels == value, size)
        found[share > largest] = value
        np.maximum(largest, share, out=largest)
    return found


def scaled(image):
    """A volume in [0, 1], the darkest and brightest 0.5 % clipped: a few bright vessels would darken all else."""
    low, high = np.percentile(image, (0.5, 99.5))
    return min_max(np.clip(image, low, high)) if high > low else min_max(image)


def cut(stack, box):
    """What a box shows of ``(slices, height, width)``; beyond the edges there are zeros. See VolumeCohort.boxes."""
    row, column, rows, columns = box
    height, width = stack.shape[1:]
    shown = np.zeros((len(stack), rows, columns), stack.dtype)
    top, left, bottom, right = max(row, 0), max(column, 0), min(row + rows, height), min(column + columns, width)
    shown[:, top - row : bottom - row, left - column : right - column] = stack[:, top:bottom, left:right]
    return shown


def assemble(name, title, volumes, classes, size, boxes=()):
    """A VolumeCohort of whole volumes.

    Args:
        name, title: as Cohort has them.
        volumes: list of (id, subject, split, rank of the subject, image, labels), both ``(slices, height, width)``.
        classes: name of every foreground class.
        size: side of the resized slices.
        boxes: of every volume, see VolumeCohort; empty for the whole volumes.
    """
    boxes = boxes or [(0, 0, *image.shape[1:]) for *_, image, _ in volumes]
    tested = [labels for _, _, split, *_, labels in volumes if split != "train"]
    columns = {key: [] for key in ("images", "labels", "subjects", "split", "volumes", "positions", "ranks")}
    for (volume, subject, split, rank, image, labels), box in zip(volumes, boxes, strict=True):
        count = len(image)
        columns["images"].append(fit_to(cut(scaled(image), box), size))
        columns["labels"].append(fit_labels(cut(labels, box), size))
        for key, value in (("subjects", subject), ("split", split), ("volumes", volume), ("ranks", rank)):
            columns[key].append(np.full(count, value))
        columns["positions"].append(np.linspace(0, 1, count, dtype=np.float32))
    return VolumeCohort(
        name=name,
        title=title,
        classes=classes,
        symmetric=False,
        pixel_mm=1.0,
        shapes=np.array([(*image.shape[1:], len(image)) for *_, image, _ in volumes]),
        boxes=np.array(boxes),
        truth=np.concatenate([labels.astype(np.uint8).ravel() for labels in tested]),
        **{key: np.concatenate(parts) for key, parts in columns.items()},
    )
