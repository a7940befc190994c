"""Cohorts: 2D slices with masks, subjects and a split by subject; every check on what comes in."""

import re
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import nibabel as nib
import numpy as np
import torch

from lib import DataError
from lib.files import replacing
from lib.params import ROOT

SPLITS = ("train", "validation", "test", "unseen")  # unseen: another anatomy, tested only


@dataclass(frozen=True)
class Cohort:
    """A table of 2D slices.

    Attributes:
        name: as in params.yaml.
        title: as in tables; says so where the cohort is simulated.
        images: ``(slices, height, width)`` float32 in [0, 1].
        labels: ``(slices, height, width)`` uint8, 0 background, 1.. the classes.
        subjects: ``(slices,)`` subject ids.
        split: ``(slices,)`` one of SPLITS.
        classes: name of every foreground class.
        symmetric: whether a mirrored image is a valid one.
        pixel_mm: side of a pixel.
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

    def index(self, split):
        """Indices of the slices of one split."""
        return np.flatnonzero(self.split == split)

    def order(self, seed):
        """Indices of the training images in the order in which they are labelled as the rate grows.

        Labelled images come from distinct subjects first: every subject gives one slice before any gives a second.
        """
        rank, order = {}, []
        for index in np.random.default_rng([seed, 1]).permutation(self.index("train")):
            subject = self.subjects[index]
            rank[subject] = rank.get(subject, -1) + 1
            order.append((rank[subject], len(order), index))
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

    def save(self, file):
        """Write the cohort as one .npz file; the same cohort gives the same bytes."""
        with replacing(file) as partial:
            np.savez(partial, **{field.name: getattr(self, field.name) for field in fields(self)})


def load_cohort(file):
    """The cohort that ``Cohort.save`` wrote.

    Raises:
        DataError: the file is missing or is not one of ours.
    """
    from lib.volumes import OwnCohort, VolumeCohort  # which imports this module

    file = Path(file)
    if not file.exists():
        raise DataError(f"{file} is missing: run notebooks/01_data.ipynb, or `dvc repro`, first")
    try:
        with np.load(file) as archive:
            kind = OwnCohort if "masked" in archive else VolumeCohort if "volumes" in archive else Cohort
            values = {field.name: archive[field.name] for field in fields(kind)}
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{file} is not a cohort file ({error}): delete it and run notebooks/01_data.ipynb") from error
    for name in ("name", "title", "symmetric", "pixel_mm"):
        values[name] = values[name].item()
    values["classes"] = tuple(values["classes"].tolist())
    return kind(**values)


# --- reading images ---------------------------------------------------------------------------------------------


def existing_folder(folder, how):
    """``folder``, relative to the repository, as an absolute path; ``how`` says how its data are to be had.

    Raises:
        DataError: there is none.
    """
    folder = (ROOT / folder).resolve()
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: {how}")
    return folder


def files_by_case(folder, pattern, how):
    """Files of a folder that match a glob pattern: dictionary of case, such as ``case0005``, to its files in order.

    Raises:
        DataError: there are none; ``how`` says how they are to be had.
    """
    found = {}
    for file in sorted(folder.glob(pattern)):
        if match := re.match(r"[a-z]+\d+", file.name):
            found.setdefault(match[0], []).append(file)
    if not found:
        raise DataError(f"{folder} holds no {pattern}: {how}")
    return found


def read_nifti(file):
    """A NIfTI image in the closest canonical (RAS) orientation.

    Returns:
        (array, affine).

    Raises:
        DataError: missing, unreadable or truncated file.
    """
    file = Path(file)
    if not file.exists():
        raise DataError(f"{file} does not exist: check the folder's layout and the file's name")
    try:
        image = nib.as_closest_canonical(nib.load(file))
        return np.asarray(image.dataobj), image.affine
    except Exception as error:  # nibabel lets whatever gzip, numpy and its own parsers raise through
        raise DataError(f"{file} cannot be read as NIfTI ({error}): export or download it again") from error


def read_pair(image_file, mask_file, values):
    """An image and its mask, checked.

    Args:
        values: the label values that the mask may hold, background included.

    Returns:
        (image float32, mask uint8) arrays of one shape, RAS.

    Raises:
        DataError: unreadable file, different shape or affine, a label outside ``values``, NaN, constant image,
            or no mask.
    """
    if mask_file is None or not Path(mask_file).exists():
        raise DataError(f"{image_file} has no mask, but one is needed here: add {mask_file}, or leave the image out")
    image, affine = read_nifti(image_file)
    mask, mask_affine = read_nifti(mask_file)
    if image.shape != mask.shape:
        raise DataError(
            f"{image_file} has shape {image.shape} but its mask {mask_file} has {mask.shape}: "
            "resample the mask onto the image's grid"
        )
    if not np.allclose(affine, mask_affine, atol=1e-3):
        raise DataError(
            f"{image_file} and its mask {mask_file} have different affines: resample the mask onto the image's grid"
        )
    check_image(image, image_file)
    check_labels(mask, values, mask_file)
    return image.astype(np.float32), mask.astype(np.uint8)


def check_image(image, file):
    """Raise DataError where an image holds NaN or infinity, or is constant."""
    if not np.isfinite(image).all():
        raise DataError(f"{file} holds NaN or infinite values: replace them, or leave the image out")
    if image.min() == image.max():
        raise DataError(f"{file} is constant ({image.min()}): it shows nothing, leave it out")


def check_labels(labels, values, file):
    """Raise DataError where labels hold a value outside ``values``."""
    unknown = sorted(set(np.unique(labels).tolist()) - set(values))
    if unknown:
        raise DataError(f"{file} holds label values {unknown}, but only {sorted(values)} are declared")


def min_max(image):
    """An image scaled to [0, 1]; a constant one becomes 0."""
    low, high = float(image.min()), float(image.max())
    if high == low:
        return np.zeros_like(image, dtype=np.float32)
    return ((image - low) / (high - low)).astype(np.float32)


def on_canvas(image, size):
    """A 2D image centred on a ``size`` x ``size`` canvas of zeros, cropped where it is larger."""
    canvas = np.zeros((size, size), image.dtype)
    window = []
    for side in image.shape:
        length = min(side, size)
        window.append((slice((size - length) // 2, (size - length) // 2 + length),
                       slice((side - length) // 2, (side - length) // 2 + length)))
    (to_rows, from_rows), (to_columns, from_columns) = window
    canvas[to_rows, to_columns] = image[from_rows, from_columns]
    return canvas


# --- splitting --------------------------------------------------------------------------------------------------


def split_by_subject(subjects, sizes, seed):
    """Splits by subject, never by slice.

    Args:
        subjects: ``(slices,)`` ids.
        sizes: slices wanted for train, validation and test; scaled down in proportion where there are fewer.
        seed: of the draw.

    Returns:
        ``(slices,)`` of train, validation, test, or ``unused`` where there are more slices than wanted.

    Raises:
        DataError: fewer subjects than splits.
    """
    names, slices = np.unique(subjects, return_counts=True)
    if len(names) < 3:
        raise DataError(f"{len(names)} subjects cannot fill train, validation and test: give at least 3")
    share = min(1.0, len(subjects) / sum(sizes.values()))
    wanted = {split: max(1, round(sizes[split] * share)) for split in ("test", "validation", "train")}
    order = list(np.random.default_rng(seed).permutation(len(names)))
    assignment = dict.fromkeys(names, "unused")
    for position, (split, count) in enumerate(wanted.items()):
        taken = 0
        while taken < count and len(order) > 2 - position:  # each split keeps at least one subject
            subject = order.pop()
            assignment[names[subject]] = split
            taken += slices[subject]
    return np.array([assignment[subject] for subject in subjects])


def check_split(subjects, split):
    """Raise DataError where a subject stands in two splits, or a split is empty."""
    for subject in np.unique(subjects):
        found = np.unique(split[subjects == subject])
        if len(found) > 1:
            raise DataError(f"subject {subject} is in the splits {' and '.join(found)}: it may be in one only")
    for name in ("train", "validation", "test"):
        if not (split == name).any():
            raise DataError(f"the {name} split is empty: give more subjects, or a smaller split in params.yaml")


# --- building ---------------------------------------------------------------------------------------------------


def build(settings):
    """The cohort that params.yaml names; ``settings`` as params.load gives them."""
    from lib import acdc, anatomies, hippocampus, midbrain, synapse  # they import this module

    if settings.cohort == "midbrain":
        cohort = midbrain.build(settings.midbrain, settings.split_seed, anatomies.raw_folder())
    elif settings.cohort == "acdc":
        cohort = acdc.build(settings.acdc)
    elif settings.cohort == "synapse":
        cohort = synapse.build(settings.synapse)
    elif settings.cohort == "hippocampus":
        cohort = hippocampus.build(settings.hippocampus, settings.split_seed)
    else:
        raise DataError(f"cohort '{settings.cohort}' has no test images, so that the pipeline cannot run on it: use `make "
                        "segment` or notebooks/11_own_data.ipynb")
    check_split(cohort.subjects, cohort.split)
    return cohort


def one_hot(labels, classes):
    """Label maps ``(n, height, width)`` as masks ``(n, classes, height, width)`` float32, background left out."""
    return np.stack([labels == value for value in range(1, classes + 1)], axis=1).astype(np.float32)


def to_labels(masks):
    """The most probable label of every pixel.

    Args:
        masks: ``(n, classes, ...)`` in [0, 1]; what they leave of 1 is the background's, so that a single class is
            thresholded at 0.5.

    Returns:
        ``(n, ...)`` integer, 0 where it is the background.
    """
    background = (1 - masks.sum(dim=1, keepdim=True)).clamp_min(0)
    return torch.cat((background, masks), dim=1).argmax(dim=1)


class Tensors:
    """A cohort on the device, with the labelled images drawn.

    Args:
        cohort, settings, numerics: of the experiment.
        order: function of these tensors that gives the training images in the order in which they are labelled,
            called when labelled images are first asked for; None for a random order.

    Attributes:
        images: ``(slices, 1, height, width)``; masks: ``(slices, classes, height, width)``.
        labelled, unlabelled, train, validation: index tensors.
        example: index ``(1,)`` of a training image that is unlabelled at every rate below 100 %, for pictures.
    """

    def __init__(self, cohort, settings, numerics, order=None):
        self.cohort = cohort
        self.images = numerics.tensor(cohort.images[:, None])
        self.masks = numerics.tensor(one_hot(cohort.labels, len(cohort.classes)))
        self.as_index = lambda index: torch.as_tensor(index, device=numerics.device)
        self.train, self.validation = self.as_index(cohort.index("train")), self.as_index(cohort.index("validation"))
        self.symmetric = cohort.symmetric
        self.drawn = cohort.order(settings.seed)
        self.count = cohort.count(settings.rate)
        self.order = order
        self.along = self.as_index(cohort.positions) if hasattr(cohort, "positions") else None

    def known(self, index):
        """``(n,)`` which of the images ``index`` have a true mask to be measured against."""
        return self.as_index(self.cohort.known(index.cpu()))

    def positions(self, index):
        """Where slices of volumes lie along the axis, in [0, 1]; None where the images are not from volumes."""
        return None if self.along is None else self.along[index]

    @cached_property
    def ordered(self):
        """Indices of the training images in the order in which they are labelled."""
        return self.order(self) if self.order else self.drawn

    @cached_property
    def labelled(self):
        return self.as_index(np.sort(self.ordered[: self.count]))

    @cached_property
    def unlabelled(self):
        return self.as_index(np.sort(self.ordered[self.count :]))

    @cached_property
    def example(self):
        return self.as_index([self.cohort.example(self.ordered)])
