"""The midbrain cohort: subjects simulated in 3D from real T1 anatomies with published labels.

It stands in for the private cohort of P1 and needs nothing but the package index (see cohorts.anatomies).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from lib import DataError
from lib.cohorts.cohort import Cohort, min_max
from lib.cohorts.reading import check_image, read_volume
from lib.cohorts.splitting import split_by_subject

TRAINING_ANATOMIES = ("mni152_t1.nii", "colin27_t1.nii.gz")
UNSEEN_ANATOMY = "person_t1.nii.gz"
LABELS = "mni152_cerebra.nii"
MASK_LABELS = (11, 62, 26, 77)  # CerebrA: brain stem and ventral diencephalon, right and left
LEVEL_MM = (-21.0, -16.0)  # axial levels (MNI) between which these labels trace the midbrain's outline
CENTRE_MM = (0.0, -20.0)  # of the head in the axial plane, left-right and posterior-anterior


class Volume(NamedTuple):
    """A 3D array and the map from world millimetres (MNI) to its voxels."""

    values: np.ndarray
    to_voxel: np.ndarray

    def at(self, points):
        """Linear interpolation at ``points`` ``(3, ...)`` in mm; 0 outside."""
        voxel = np.tensordot(self.to_voxel[:3, :3], points, 1)
        voxel += self.to_voxel[:3, 3].reshape(3, *[1] * (points.ndim - 1))
        return ndimage.map_coordinates(self.values, voxel, order=1, mode="constant", cval=0.0)


def read_anatomy(file):
    """A T1 volume, intensities from 0 to 1 between 0 and the 99.8th percentile."""
    values, grid = read_volume(file)
    check_image(values, file)
    return Volume(np.clip(values / np.percentile(values, 99.8), 0, 1), np.linalg.inv(grid.canonical))


def read_midbrain_labels(file):
    """The mask of the labels that form the midbrain between LEVEL_MM, smoothed, and filled slice by slice.

    Above LEVEL_MM the labels spread into the hypothalamus, which a deformed slice may touch; there the mask
    keeps to its outline at the upper level.
    """
    labels, grid = read_volume(file)
    affine = grid.canonical
    mask = np.isin(np.rint(labels), MASK_LABELS)
    mask = ndimage.binary_closing(mask, ndimage.generate_binary_structure(3, 1), iterations=2)
    top = round(LEVEL_MM[1] - affine[2, 3])
    mask[:, :, top + 1 :] &= mask[:, :, [top]]
    mask = ndimage.binary_opening(mask, ndimage.generate_binary_structure(3, 1), iterations=2)
    for level in range(mask.shape[2]):
        mask[:, :, level] = ndimage.binary_fill_holes(mask[:, :, level])
    components, _ = ndimage.label(mask)
    mask = components == np.bincount(components.ravel())[1:].argmax() + 1
    return Volume(mask.astype(np.float32), np.linalg.inv(affine))


def smooth_field(rng, shape, spacing, std):
    """A smooth random field: normal values on control points ``spacing`` grid steps apart, cubic in between."""
    control = [max(2, int(np.ceil((n - 1) / spacing)) + 1) for n in shape]
    values = rng.normal(0, 1, control) * std
    points = np.meshgrid(*[np.arange(n) / spacing for n in shape], indexing="ij")
    return ndimage.map_coordinates(values, points, order=3, mode="nearest")


GRID_MM = 4.0  # of the velocity field
SLAB_MM = 80.0  # its height: the slices and what their deformation may reach


def draw_diffeomorphism(rng, settings):
    """A smooth random diffeomorphism: a stationary velocity field, integrated by scaling and squaring.

    Returns:
        A function from points ``(3, ...)`` in mm about the centre to displacements ``(3, ...)`` in mm.
    """
    shape = [int(settings.field_of_view / GRID_MM) + 9] * 2 + [int(SLAB_MM / GRID_MM) + 1]
    std = rng.uniform(0, settings.nonlinear_std)
    field = np.stack([smooth_field(rng, shape, settings.nonlinear_spacing / GRID_MM, std) for _ in range(3)])
    grid = np.stack(np.meshgrid(*[np.arange(n, dtype=float) for n in shape], indexing="ij"))
    middle = (np.array(shape) - 1).reshape(3, 1, 1, 1) / 2
    interpolate = lambda f, at: np.stack([ndimage.map_coordinates(c, at, order=1, mode="nearest") for c in f])
    field /= 2**6
    for _ in range(6):
        field = field + interpolate(field, grid + field / GRID_MM)

    def displacement(points):
        flat = points.reshape(3, -1) / GRID_MM + middle.reshape(3, 1)
        return interpolate(field, flat).reshape(points.shape)

    return displacement


def draw_affine(rng, settings):
    """A random 3x3 matrix (scaling, shearing, rotation) and in-plane translation in mm."""
    turn = np.eye(3)
    for axis, limit in enumerate((settings.tilt, settings.tilt, settings.rotation)):
        angle = np.deg2rad(rng.uniform(-limit, limit))
        first, second = [a for a in range(3) if a != axis]
        rotation = np.eye(3)
        rotation[[first, first, second, second], [first, second, first, second]] = (
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        )
        turn = turn @ rotation
    shear = np.eye(3) + rng.uniform(-settings.shearing, settings.shearing, (3, 3)) * (1 - np.eye(3))
    scale = np.diag(1 + rng.uniform(-settings.scaling, settings.scaling, 3))
    shift = np.array([*rng.uniform(-settings.translation, settings.translation, 2), 0.0])
    return turn @ shear @ scale, shift


def simulate_subject(rng, anatomy, mask, settings):
    """One subject: a deformed head, scanned, and its axial slices at the level of the midbrain.

    Image and mask are sampled at exactly the same deformed points.

    Args:
        rng: numpy Generator, for all draws.
        anatomy, mask: Volumes in MNI space.
        settings: section ``midbrain`` of params.yaml.

    Returns:
        List of (image ``(size, size)`` float32 in [0, 1], label ``(size, size)`` uint8).
    """
    deform = draw_diffeomorphism(rng, settings)
    matrix, shift = draw_affine(rng, settings)
    n = int(settings.field_of_view)
    axis = np.arange(n) - (n - 1) / 2
    rows, columns = np.meshgrid(-axis, axis, indexing="ij")  # rows run from anterior to posterior
    edges = np.linspace(*LEVEL_MM, settings.slices_per_subject + 1)
    levels = rng.uniform(edges[:-1], edges[1:])
    thickness = rng.uniform(*settings.thickness_mm)
    blur = rng.uniform(*settings.blur_mm) / 2.355  # full width at half maximum to standard deviation
    bias = np.exp(smooth_field(rng, (n, n), settings.bias_spacing, rng.uniform(0, settings.bias_std)))
    gamma = np.exp(rng.normal(0, settings.gamma_std))
    noise = rng.uniform(0, settings.noise_std)
    slices = []
    for level in levels:
        image, inside = np.zeros((n, n)), np.zeros((n, n))
        depths = np.linspace(-0.5, 0.5, 5) * thickness
        for depth in depths:
            points = np.stack((columns, rows, np.full_like(rows, depth)))
            centre = np.zeros((3, 1, 1))
            moved = points + deform(points) - np.array([0, 0, 1]).reshape(3, 1, 1) * deform(centre)[2]
            moved = np.tensordot(matrix, moved - shift.reshape(3, 1, 1), 1)
            moved += np.array([*CENTRE_MM, level]).reshape(3, 1, 1)
            image += anatomy.at(moved) / len(depths)
            inside += mask.at(moved) / len(depths)
        image = ndimage.gaussian_filter(image, blur) * bias
        image = min_max(image) ** gamma + rng.normal(0, noise, image.shape)
        slices.append((min_max(shrink(image, settings.size)), (shrink(inside, settings.size) >= 0.5).astype(np.uint8)))
    return slices


def shrink(image, size):
    """A square image resized to ``size`` by averaging blocks of pixels."""
    factor = len(image) // size
    if factor * size != len(image):
        raise ValueError(
            f"midbrain.field_of_view ({len(image)}) in params.yaml must be a multiple of midbrain.size ({size})"
        )
    return image.reshape(size, factor, size, factor).mean(axis=(1, 3))


def build(settings, seed, folder):
    """The cohort.

    Args:
        settings: section ``midbrain`` of params.yaml.
        seed: of the split; the simulation has its own.
        folder: with the raw files, see cohorts.anatomies.
    """
    folder = Path(folder)
    mask = read_midbrain_labels(folder / LABELS)
    anatomies = [read_anatomy(folder / name) for name in TRAINING_ANATOMIES]
    unseen = read_anatomy(folder / UNSEEN_ANATOMY)
    per_subject = settings.slices_per_subject
    seen_subjects = -(-sum(settings.split.values()) // per_subject)
    unseen_subjects = -(-settings.unseen // per_subject)
    plan = [(f"simulated-{k:04d}", anatomies[k % len(anatomies)], (1, k)) for k in range(seen_subjects)]
    plan += [(f"unseen-{k:04d}", unseen, (0, k)) for k in range(unseen_subjects)]

    def simulate(subject):
        name, anatomy, numbers = subject
        slices = simulate_subject(np.random.default_rng([settings.seed, *numbers]), anatomy, mask, settings)
        if not all(label.any() for _, label in slices):
            raise DataError(f"{name} shows no midbrain: narrow the ranges of section midbrain in params.yaml")
        return slices

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # scipy's interpolation runs outside Python's lock
        bar = tqdm(pool.map(simulate, plan), total=len(plan), desc="simulating subjects", unit="subject")
        images, labels = zip(*(pair for slices in bar for pair in slices))
    subjects = np.repeat([name for name, *_ in plan], per_subject)
    split = np.full(len(subjects), "unseen", dtype="<U10")
    is_seen = np.char.startswith(subjects, "simulated")
    split[is_seen] = split_by_subject(subjects[is_seen], settings.split, seed)
    return Cohort(
        name="midbrain",
        title="midbrain (simulated)",
        images=np.stack(images),
        labels=np.stack(labels),
        subjects=subjects,
        split=split,
        classes=("midbrain",),
        symmetric=settings.symmetric,
        pixel_mm=settings.field_of_view / settings.size,
    )
