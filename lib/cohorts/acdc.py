"""ACDC: cine cardiac MRI, end-diastole and end-systole of 100 patients (Bernard et al., IEEE TMI 2018).

Licence CC BY-NC-SA 4.0. The download needs a registration, so the folder is always one that the user has.
"""

import re

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from lib import DataError
from lib.cohorts.reading import EXTERNAL, existing_folder, files_by_case, read_pair, without
from lib.cohorts.volumes import assemble, scaled

LABELS = {0: "background", 1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
HOW = (
    "register at https://www.creatis.insa-lyon.fr/Challenge/acdc, download the training set, unpack it, and run with "
    "-S acdc.folder=PATH"
)
MOTION_SCALE = 0.1  # over which motion is smoothed, of the longer side: half a heart
CENTRE_SCALE = 0.25  # standard deviation of where the heart is expected around the middle, of the longer side


def numbered(numbers):
    """Names of patients by their numbers."""
    return [f"patient{number}" for number in numbers.split()]


# 70, 10 and 20 patients as in the literature (Luo et al., SSL4MIS); the first n of `train` are the n labelled ones.
SPLIT = {
    "train": numbered(
        "099 038 050 100 058 021 049 020 072 040 060 089 004 056 098 096 031 018 094 047 048 055 097 074 043 "
        "041 063 037 095 054 026 088 032 069 006 071 012 073 061 017 025 010 057 029 051 005 036 046 062 034 "
        "076 092 070 077 067 003 091 016 014 044 042 090 053 027 035 086 023 009 079 015"
    ),
    "validation": numbered("028 085 082 087 019 030 078 045 002 039"),
    "test": numbered("011 013 084 033 093 022 068 024 083 081 080 001 007 066 008 065 075 064 059 052"),
}


def frames_of(patient):
    """Numbers of the end-diastolic and end-systolic frame, from a patient's Info.cfg."""
    file = patient / "Info.cfg"
    try:
        found = dict(re.findall(r"^(ED|ES):\s*(\d+)", file.read_text(), flags=re.MULTILINE))
        return [int(found[phase]) for phase in ("ED", "ES")]
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} does not say which frames are ED and ES ({error!r}): unpack the archive again"
        ) from error


def find_volumes(folder, how=HOW):
    """(patient, image file, mask file) of both volumes of every patient.

    Two layouts are known: the challenge's own, patientNNN/patientNNN_frameNN.nii.gz with Info.cfg (also below
    training/ or testing/), and a flat one without folders and Info.cfg. Masks end in _gt.nii.gz.

    Raises:
        DataError: no such folder, nothing in it, or a patient without exactly ED and ES.
    """
    folder, found = existing_folder(folder, how), []
    patients = sorted(path for path in folder.rglob("patient*") if path.is_dir())
    for patient in patients:
        for number in frames_of(patient):
            name = f"{patient.name}_frame{number:02d}"
            found.append((patient.name, patient / f"{name}.nii.gz", patient / f"{name}_gt.nii.gz"))
    if patients:
        return found
    for patient, files in files_by_case(folder, "**/patient*_frame*.nii*", how).items():
        images = [file for file in files if "_gt." not in file.name]
        if len(images) != 2:
            raise DataError(f"{folder} holds {len(images)} volumes of {patient}, not ED and ES: add or remove some")
        found += [(patient, file, file.with_name(file.name.replace(".nii", "_gt.nii"))) for file in images]
    return found


def build(settings):
    """The cohort: all short-axis slices of the patients of SPLIT.

    Args:
        settings: section ``acdc`` of params.yaml.

    Raises:
        DataError: see find_volumes and reading.read_pair; or a patient of SPLIT is missing.
    """
    found = {}
    for patient, image, mask in find_volumes(settings.folder):
        found.setdefault(patient, []).append((image, mask))
    chosen = {split: names[: settings.patients.get(split)] for split, names in SPLIT.items()}
    missing = sorted(set(sum(chosen.values(), [])) - set(found))
    if missing:
        raise DataError(f"{settings.folder} lacks {', '.join(missing)}, which the split names: {HOW}")
    if settings.external:
        further = {}
        for patient, *files in find_volumes(settings.external, EXTERNAL):
            further.setdefault(patient, []).append(files)
        further = without(set(sum(SPLIT.values(), [])), further, settings.external)
        found |= further
        chosen["external"] = list(further)
    volumes, boxes = [], []
    for split, patients in chosen.items():
        for rank, patient in enumerate(tqdm(patients, desc=f"reading acdc, {split}", unit="patient", leave=False)):
            for image_file, mask_file in found[patient]:
                image, mask, _ = read_pair(image_file, mask_file, LABELS)
                name = image_file.name.split(".")[0]
                volumes.append((name, patient, split, rank, np.moveaxis(image, 2, 0), np.moveaxis(mask, 2, 0)))
            if settings.window:
                boxes += [heart_box(*(image for *_, image, _ in volumes[-2:]), settings.window)] * 2
    return assemble("acdc", "ACDC", volumes, tuple(LABELS.values())[1:], settings.size, boxes)


def heart_box(diastole, systole, window):
    """A square box around what moves between the two frames, which is the heart; no mask is looked at.

    Args:
        diastole, systole: ``(slices, height, width)`` of one shape; otherwise the box is around the middle.
        window: side of the box, as a share of the longer side of the slices.

    Returns:
        See volumes.VolumeCohort.boxes.
    """
    height, width = diastole.shape[1:]
    longer, middle = max(height, width), (height // 2, width // 2)
    if diastole.shape == systole.shape:
        moved = np.abs(scaled(diastole) - scaled(systole)).mean(axis=0)
        smooth = ndimage.gaussian_filter(moved, MOTION_SCALE * longer)
        away = [(np.arange(length) - length / 2) / (CENTRE_SCALE * longer) for length in (height, width)]
        central = np.exp(-(away[0][:, None] ** 2 + away[1] ** 2) / 2)  # vessels and breath move at the edges, too
        middle = np.unravel_index((smooth * central).argmax(), smooth.shape)
    side = round(window * longer)
    inside = lambda first, length: min(max(first, 0), length - side) if side <= length else (length - side) // 2
    row, column = (inside(int(at) - side // 2, length) for at, length in zip(middle, (height, width)))
    return row, column, side, side
