"""The hippocampus cohort: real T1 MRI of the Medical Segmentation Decathlon, Task04 (CC-BY-SA 4.0)."""

from functools import partial

import numpy as np
from tqdm import tqdm

from lib import DataError
from lib.cohorts.cohort import Cohort, min_max
from lib.cohorts.reading import EXTERNAL, existing_folder, on_canvas, read_pair, without
from lib.cohorts.splitting import split_by_subject
from lib.cohorts.volumes import scaled
from lib.runs.params import ROOT, work_folder

URL = "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar"
MD5 = "9d24dba78a72977dbd1d2e110310f31b"
LABELS = {0: "background", 1: "anterior", 2: "posterior"}
NUMBERS = """
001 003 004 007 008 011 014 015 017 019 020 023 024 025 033 034 035 036 037 038 039 040 041 042 044 046 048 049 050
052 053 056 057 058 060 065 067 068 070 074 075 077 083 084 087 088 089 090 091 092 093 094 095 096 097 099 101 102
104 105 107 114 123 124 125 127 130 132 133 135 136 138 141 142 144 145 146 148 149 150 152 154 155 156 157 158 160
161 162 163 164 165 166 169 170 171 172 173 174 175 176 177 180 181 184 185 188 189 190 193 194 195 197 199 205 212
215 216 217 219 220 221 222 223 224 225 227 228 229 230 232 233 234 235 236 238 242 243 244 245 248 249 250 251 252
253 257 259 260 261 264 265 268 269 274 276 277 279 280 286 287 288 289 292 294 295 296 297 299 300 301 302 303 304
305 308 309 310 311 314 316 317 318 319 320 322 325 326 327 328 329 331 332 333 335 336 337 338 340 341 343 349 351
352 354 355 356 358 359 360 361 366 367 368 370 372 373 374 375 376 378 380 381 383 385 386 387 389 390 393
""".split()
TITLES = {
    "largest": "hippocampus",
    "centre": "hippocampus (slices by place)",
    "whole": "hippocampus (volumes)",
}
CASES = {f"hippocampus_{number}" for number in NUMBERS}  # the results are from these of the archive's 260


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
    """Image file and mask file of every case by its name, in the Decathlon's layout or with folders images and labels.

    Raises:
        DataError: neither is there.
    """
    for images, labels in (("imagesTr", "labelsTr"), ("images", "labels")):
        if (folder / images).is_dir():
            files = sorted(f for f in (folder / images).glob("*.nii*") if not f.name.startswith("."))
            return {f.name.split(".")[0]: (f, folder / labels / f.name) for f in files}
    raise DataError(f"{folder} holds neither imagesTr/ and labelsTr/ nor images/ and labels/: is it the task's folder?")


def chosen_cases(settings):
    """Names and files of the cohort's cases and of those of the external folder, as ``find_cases`` gives them.

    Of the official archive only those of CASES are the cohort's, so that the split is that of the results.
    """
    found = find_cases(find_folder(settings.folder))
    if set(found) >= CASES:
        found = {name: files for name, files in found.items() if name in CASES}
    cases = dict(list(found.items())[: settings.subjects])
    if not settings.external:
        return cases, {}
    folder = existing_folder(settings.external, EXTERNAL)
    return cases, without(found, find_cases(folder), folder)


def sagittal_slices(image, mask, offsets, around="largest"):
    """Sagittal slices of a RAS volume.

    Args:
        offsets: of the slices, from the one that ``around`` names.
        around: ``largest``: the slice of largest mask area; offsets that lead past the structure stop at its end.
            ``centre``: the middle slice, whatever the mask is.

    Returns:
        List of (image, mask) 2D arrays; rows run from superior to inferior, columns from posterior to anterior.
    """
    if around == "centre":
        chosen = np.clip(len(image) // 2 + np.asarray(offsets), 0, len(image) - 1)
    else:
        area = (mask > 0).sum(axis=(1, 2))
        marked = np.flatnonzero(area)
        chosen = np.clip(area.argmax() + np.asarray(offsets), marked[0], marked[-1])
    return [(image[k].T[::-1], mask[k].T[::-1]) for k in dict.fromkeys(chosen)]


def whole_volumes(image, mask):
    """A RAS volume as one image of its sagittal slices, which stand as those of ``sagittal_slices`` do."""
    return [tuple(np.ascontiguousarray(volume.transpose(0, 2, 1)[:, ::-1]) for volume in (image, mask))]


def build(settings, seed, around="largest"):
    """The cohort.

    Args:
        settings: section of the cohort in params.yaml.
        seed: of the split.
        around: which slices, see ``sagittal_slices``; ``whole`` for volumes.

    Raises:
        DataError: see reading.read_pair; also too few subjects, or an empty mask.
    """
    if settings.classes not in ("binary", "two"):
        raise ValueError(f"hippocampus.classes '{settings.classes}' in params.yaml is not one of binary, two")
    whole = around == "whole"
    canvas = settings.canvas if whole else [settings.size] * 2
    take = whole_volumes if whole else partial(sagittal_slices, offsets=settings.slice_offsets, around=around)
    images, labels, subjects = [], [], []
    cases, external = chosen_cases(settings)
    for name, files in tqdm((cases | external).items(), desc="reading hippocampus", unit="case"):
        image, mask, _ = read_pair(*files, LABELS)
        if not mask.any():
            raise DataError(f"{files[1]} is empty, so no slice can be chosen: leave the case out")
        for one, labelled in take(image, mask):
            images.append(on_canvas(scaled(one) if whole else min_max(one), canvas))
            labels.append(on_canvas(labelled, canvas))
            subjects.append(name)
    labels, subjects = np.stack(labels), np.array(subjects)
    own = np.isin(subjects, list(cases))
    split = np.full(len(subjects), "external", object)
    split[own] = split_by_subject(subjects[own], settings.split, seed)
    binary = settings.classes == "binary"
    return Cohort(
        name="hippocampus",
        title=TITLES[around],
        images=np.stack(images),
        labels=np.minimum(labels, 1) if binary else labels,
        subjects=subjects,
        split=split.astype(str),
        classes=("hippocampus",) if binary else ("anterior", "posterior"),
        symmetric=settings.symmetric,
        pixel_mm=1.0,
    )
