"""The hippocampus cohort: real T1 MRI of the Medical Segmentation Decathlon, Task04 (CC-BY-SA 4.0)."""

import numpy as np
from tqdm import tqdm

from lib.data import Cohort, DataError, min_max, on_canvas, read_pair, split_by_subject
from lib.params import ROOT, work_folder

URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar"
MD5 = "9d24dba78a72977dbd1d2e110310f31b"
LABELS = {0: "background", 1: "anterior", 2: "posterior"}


def find_folder(folder):
    """The Decathlon task's folder: the one given if it exists, else the official archive, fetched once.

    Raises:
        DataError: neither is to be had.
    """
    local = (ROOT / folder).resolve() if folder else None
    if local and local.is_dir():
        return local
    from monai.apps.utils import download_and_extract  # takes seconds to import

    target = work_folder("hippocampus")
    try:
        download_and_extract(URL, target / "Task04_Hippocampus.tar", target, hash_val=MD5, hash_type="md5")
    except Exception as error:  # urllib, hashing and tar errors all mean the same to the reader
        raise DataError(
            f"{local or 'no local folder'} is not there and the archive could not be fetched ({error}): download "
            f"{URL}, unpack it, and run with -S hippocampus.folder=PATH/Task04_Hippocampus"
        ) from error
    return target / "Task04_Hippocampus"


def find_cases(folder):
    """(name, image file, mask file) of every case, in the Decathlon's layout or with folders images and labels."""
    for images, labels in (("imagesTr", "labelsTr"), ("images", "labels")):
        if (folder / images).is_dir():
            files = sorted(f for f in (folder / images).glob("*.nii*") if not f.name.startswith("."))
            return [(f.name.split(".")[0], f, folder / labels / f.name) for f in files]
    raise DataError(f"{folder} holds neither imagesTr/ and labelsTr/ nor images/ and labels/: is it the task's folder?")


def sagittal_slices(image, mask, offsets):
    """Slices of a RAS volume around the sagittal one of largest mask area.

    Offsets that lead past the structure stop at its last slice.

    Returns:
        List of (image, mask) 2D arrays; rows run from superior to inferior, columns from posterior to anterior.
    """
    area = (mask > 0).sum(axis=(1, 2))
    marked = np.flatnonzero(area)
    chosen = np.clip(area.argmax() + np.asarray(offsets), marked[0], marked[-1])
    return [(image[k].T[::-1], mask[k].T[::-1]) for k in dict.fromkeys(chosen)]


def build(settings, seed):
    """The cohort.

    Args:
        settings: section ``hippocampus`` of params.yaml.
        seed: of the split.

    Raises:
        DataError: see lib.data.read_pair; also too few subjects, or an empty mask.
    """
    if settings.classes not in ("binary", "two"):
        raise ValueError(f"hippocampus.classes '{settings.classes}' in params.yaml is not one of binary, two")
    images, labels, subjects = [], [], []
    cases = find_cases(find_folder(settings.folder))[: settings.subjects]
    for name, image_file, mask_file in tqdm(cases, desc="reading hippocampus", unit="case"):
        image, mask = read_pair(image_file, mask_file, LABELS)
        if not mask.any():
            raise DataError(f"{mask_file} is empty, so no slice can be chosen: leave the case out")
        for image_slice, mask_slice in sagittal_slices(image, mask, settings.slice_offsets):
            images.append(on_canvas(min_max(image_slice), settings.size))
            labels.append(on_canvas(mask_slice, settings.size))
            subjects.append(name)
    labels = np.stack(labels)
    binary = settings.classes == "binary"
    return Cohort(
        name="hippocampus",
        title="hippocampus",
        images=np.stack(images),
        labels=np.minimum(labels, 1) if binary else labels,
        subjects=np.array(subjects),
        split=split_by_subject(np.array(subjects), settings.split, seed),
        classes=("hippocampus",) if binary else ("anterior", "posterior"),
        symmetric=settings.symmetric,
        pixel_mm=1.0,
    )
