"""Synapse: abdominal CT with eight organs (BTCV, Landman et al. 2015), as TransUNet's authors have prepared it.

Their folder holds train_npz/caseNNNN_sliceNNN.npz, one slice each, and test_vol_h5/caseNNNN.npy.h5, one volume each,
all with `image` and `label`. The download needs a registration, so the folder is always one that the user has.
"""

from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from lib import DataError
from lib.cohorts.reading import EXTERNAL, check_image, check_labels, existing_folder, files_by_case, without
from lib.cohorts.volumes import assemble

LABELS = {
    0: "background",
    1: "aorta",
    2: "gallbladder",
    3: "left kidney",
    4: "right kidney",
    5: "liver",
    6: "pancreas",
    7: "spleen",
    8: "stomach",
}
HOW = (
    "register at https://www.synapse.org/#!Synapse:syn3193805 and prepare the data as https://github.com/Beckschen/"
    "TransUNet says, or ask its authors for theirs; then run with -S synapse.folder=PATH"
)


def read_npz(file):
    """``image`` and ``label`` of a slice."""
    with np.load(file) as archive:
        return archive["image"], archive["label"]


def read_h5(file):
    """``image`` and ``label`` of a volume."""
    import h5py  # needed for this cohort alone

    with h5py.File(file, "r") as archive:
        return archive["image"][:], archive["label"][:]


def read(file, reader):
    """Image float32 and labels uint8 from ``file``, checked.

    Raises:
        DataError: unreadable, without `image` or `label`, of two shapes, not finite, or with unknown labels.
    """
    try:
        image, labels = reader(file)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{file} does not hold `image` and `label` ({error}): download it again") from error
    if image.shape != labels.shape:
        raise DataError(f"{file} has an image of shape {image.shape} but a label of {labels.shape}: download it again")
    if not np.isfinite(image).all():
        raise DataError(f"{file} holds NaN or infinite values: download it again")
    check_labels(labels, LABELS, file)
    return image.astype(np.float32), labels.astype(np.uint8)


def build(settings):
    """The cohort. The last training cases validate; the others are labelled in the order of their numbers.

    Args:
        settings: section ``synapse`` of params.yaml.

    Raises:
        DataError: nothing to be found, see ``read``; or there are not more training cases than validate.
    """
    folder = existing_folder(settings.folder, HOW)
    slices = files_by_case(folder / "train_npz", "case*_slice*.npz", HOW)
    tested = files_by_case(folder / "test_vol_h5", "case*.h5", HOW)
    cases = sorted(slices)
    if len(cases) <= settings.validation:
        raise DataError(
            f"{folder / 'train_npz'} holds {len(cases)} cases, and {settings.validation} are to "
            "validate: add some, or lower synapse.validation in params.yaml"
        )
    volumes = []
    for rank, case in enumerate(tqdm(cases, desc="reading synapse, training", unit="case", leave=False)):
        parts = [read(file, read_npz) for file in slices[case]]
        if len({image.shape for image, _ in parts}) > 1:
            raise DataError(f"slices of {case} in {folder / 'train_npz'} differ in shape: download them again")
        split = "train" if rank < len(cases) - settings.validation else "validation"
        volumes.append((case, case, split, rank, *(np.stack(each) for each in zip(*parts))))
    for rank, (case, files) in enumerate(tqdm(tested.items(), desc="reading synapse, test", unit="case", leave=False)):
        volumes.append((case, case, "test", rank, *read(files[0], read_h5)))
    if settings.external:
        found = files_by_case(existing_folder(settings.external, EXTERNAL), "case*.h5", EXTERNAL)
        for rank, (case, files) in enumerate(without({*slices, *tested}, found, settings.external).items()):
            volumes.append((case, case, "external", rank, *read(files[0], read_h5)))
    for case, *_, image, _ in volumes:
        check_image(image, f"{folder}: {case}")
    return assemble("synapse", "Synapse", volumes, tuple(LABELS.values())[1:], settings.size)
