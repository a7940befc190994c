"""Cohorts: slices with masks, subjects and splits. What is built from raw data (cohorts.building) is read back here."""

from dataclasses import fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from lib import DataError
from lib.cohorts.cohort import Cohort
from lib.cohorts.volumes import OwnCohort, VolumeCohort


def load_cohort(file):
    """The cohort that ``Cohort.save`` wrote.

    Raises:
        DataError: the file is missing or is not one of ours.
    """
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
