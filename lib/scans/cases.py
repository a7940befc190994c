"""Cases segmented by a finished model, one after another here, or many at a time on workers, see runs.cluster."""

import math
import os
import time
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from lib import DataError
from lib.compute import Numerics
from lib.runs import cluster
from lib.scans.dicom_seg import write_dicom_seg
from lib.scans.networks.applying import apply
from lib.scans.networks.model_file import load_model
from lib.scans.reading.folder import is_others
from lib.scans.reading.intake import digest
from lib.scans.reading.store import Store, images_of

SMALL = 2**19  # pixels that are handed to a worker at a time, some seconds of work: large cases go one by one


class Job(NamedTuple):
    """All that a worker needs besides the case. It reads and writes the folders that are named here."""

    model: str  # file
    stores: tuple  # folders, one for every plan of the model
    output: str
    numerics: tuple  # device, precision, deterministic
    dicom_seg: bool
    threads: int  # of a worker; 0: as many as there are
    run: int  # a number of its own: what an earlier run in this process has kept does not count


@lru_cache(1)
def tools(job):
    """(Model on the device, its Stores, Numerics), made once by every worker."""
    if job.threads:
        torch.set_num_threads(job.threads)
    numerics = Numerics(*job.numerics)
    return load_model(job.model).to(numerics), [Store(folder) for folder in job.stores], numerics


def segment_case(job, case, positions):
    """The row of a case in cases.csv, segmented now unless somebody has changed its files in the output folder.

    ``positions``: of intake.chosen_images.
    """
    model, stores, numerics = tools(job)
    output = Path(job.output)
    files = files_of(case.name, output)
    try:
        if others := [file for file in files if is_others(file)]:
            note = f"{others[0]} has been changed, or was there before, and is kept: move it away to have it made"
            return {"case": case.name, "status": "kept", "note": note}
        plan = model.plans[0]
        grid = case.grid(plan.axis)
        planes = plan.planes(positions[0], grid)
        row = apply(model, case.name, images_of(stores, case.name, positions), planes, grid, output, numerics)
        if job.dicom_seg and case.image.is_dir():
            names = model.about["values"], model.about["classes"]
            write_dicom_seg(files[0], case.image, *names, output / f"{case.name}_mask.dcm")
    except DataError as error:
        return {"case": case.name, "status": "failed", "note": str(error)}
    return {**row, "status": "done", "digests": digests(case.name, output)}


def files_of(name, output):
    """Mask and confidence map of a case."""
    return [output / f"{name}_{what}.nii.gz" for what in ("mask", "confidence")]


def digests(name, output):
    """Of the files of a case, empty where there is none."""
    return [digest(file) if file.exists() else "" for file in files_of(name, output)]


@contextmanager
def workers(settings, count):
    """A client of runs.cluster for ``count`` cases; None where they are read and segmented here, one after another."""
    wanted = min(settings.folder.workers, count)
    if wanted > 1 or (cluster.address_of(settings) and count > 1):
        with cluster.connect(settings, wanted) as client:
            yield client
    else:
        yield None


def segmented(settings, stores, output, cases, client=None):
    """Rows of cases.csv, one after another in the order of the cases.

    Args:
        settings: as params.load gives them.
        stores: list of store.Store, one for every plan of the model.
        output: folder, in which the model lies unless folder.model names it.
        cases: pairs of folder.Case and the positions that are segmented, of intake.chosen_images.
        client: of ``workers``.

    Returns:
        Iterator of dictionaries, with ``digests`` of the files of a case that is done.
    """
    options = settings.folder
    shared = options.workers > 1 and not cluster.address_of(settings)  # the cores of this machine
    job = Job(
        str(Path(options.model or output / "model.safetensors").resolve()),
        tuple(str(store.folder.resolve()) for store in stores),
        str(output.resolve()),
        (settings.device, settings.precision, settings.deterministic),
        options.dicom_seg,
        max(1, (os.cpu_count() or 1) // options.workers) if shared else 0,
        time.time_ns(),
    )
    size = 1
    if client and cases:
        pixels = lambda name, positions: sum(
            len(at) * math.prod(store.index[name]["shape"][1:]) for store, at in zip(stores, positions)
        )
        largest = max(pixels(case.name, positions) for case, positions in cases)
        size = min(cluster.together(len(cases), max(1, options.workers, len(client.nthreads()))), SMALL // largest)
    return cluster.mapped(client, partial(segment_case, job), *([*part] for part in zip(*cases)), size=max(1, size))
