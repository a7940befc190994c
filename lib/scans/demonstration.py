"""A folder of scans to try things on: slices of the pipeline's own cohort, as NIfTI files."""

from pathlib import Path

import nibabel as nib
import numpy as np

from lib.cohorts import load_cohort
from lib.runs.params import cohort_file


def write_demonstration(settings, folder):
    """Write images, a few of them with masks, as a user would bring them.

    One slice of every subject is taken, whatever split it is in, until there are as many as asked for. The first get
    masks. The masks of the others go to a folder of their own, to be compared with afterwards.

    Args:
        settings: as params.load gives them, of the pipeline's cohort; its section folder.demonstration says how many.
        folder: for ``images``, ``masks`` and ``hidden``; files that are there are replaced.

    Raises:
        DataError: the cohort has not been made.
    """
    options, folder = settings.folder.demonstration, Path(folder)
    cohort = load_cohort(cohort_file(settings))
    _, firsts = np.unique(cohort.subjects, return_index=True)
    known = firsts[cohort.split[firsts] != "unseen"]
    chosen = np.random.default_rng([settings.seed, 3]).permutation(known)[: options.cases]
    for part in ("images", "masks", "hidden"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for file in (folder / part).glob("*.nii.gz"):
            file.unlink()
    affine = np.diag([cohort.pixel_mm, cohort.pixel_mm, 1.0, 1.0])
    for number, index in enumerate(chosen):
        name = f"scan_{number + 1:02d}.nii.gz"
        image = np.round(1000 * cohort.images[index]).astype(np.int16)
        part = "masks" if number < options.labelled else "hidden"
        for what, slice in ("images", image), (part, cohort.labels[index]):  # x from left to right, y from below
            nib.save(nib.Nifti1Image(slice[::-1].T[..., None], affine), folder / what / name)
