"""Cohorts by name, made from raw data."""

from lib import DataError
from lib.cohorts import acdc, anatomies, hippocampus, midbrain, synapse
from lib.cohorts.splitting import check_split

BUILDERS = {  # name in params.yaml to a function of the settings
    "midbrain": lambda settings: midbrain.build(settings.midbrain, settings.split_seed, anatomies.raw_folder()),
    "hippocampus": lambda settings: hippocampus.build(settings.hippocampus, settings.split_seed),
    "hippocampus_centre": lambda settings: hippocampus.build(
        settings.hippocampus_centre, settings.split_seed, "centre"
    ),
    "hippocampus3d": lambda settings: hippocampus.build(settings.hippocampus3d, settings.split_seed, "whole"),
    "acdc": lambda settings: acdc.build(settings.acdc),
    "synapse": lambda settings: synapse.build(settings.synapse),
}


def build(settings):
    """The cohort that params.yaml names; ``settings`` as params.load gives them.

    Raises:
        DataError: it has no test images, its files cannot be used, or its split is wrong.
    """
    if settings.cohort not in BUILDERS:
        raise DataError(
            f"cohort '{settings.cohort}' has no test images, so that the pipeline cannot run on it: use `make "
            "segment` or notebooks/11_own_data.ipynb"
        )
    cohort = BUILDERS[settings.cohort](settings)
    check_split(cohort.subjects, cohort.split)
    return cohort
