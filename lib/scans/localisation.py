"""Where the structure is, in scans that show much else: a coarse view finds it, and the rest is done on its region.

From coarse to fine, as Roth et al. do it (Computerized Medical Imaging and Graphics 2018). The coarse view is a run on
the folder like any other, in a folder of its own: slices by larger pixels, without cases that are held out. What it
marks in a case, with a margin, is the region of the case.
"""

import json

import numpy as np
from tqdm import tqdm

from lib import DataError
from lib.runs.params import SMALLEST, section
from lib.scans.networks.model_file import load_model, save_model
from lib.scans.networks.training import TooThin, what_is_to_do
from lib.scans.reading.planning import COARSER, grids_of, plans_of
from lib.scans.reading.region import STRAY, joined, region_of

REGIONS = "auto", "localised", "whole"  # that folder.region may name
COARSE = 2  # times fewer pixels along the longest side of a slice
FEW = 6  # of them along the structure's region: where there would be fewer, pixels are not made larger
LEAST = 2  # pixels of the coarse view, the smallest margin
SOME = 20  # labelled cases that say how large the structure is
NOT_FOUND = "nothing was found in a coarse view, so the whole scan was searched (folder.region)"


def drawn_regions(options, cases):
    """Labelled folder.Cases whose masks mark anything, each with that region: at most SOME, since some suffice."""
    undrawn = options.drawn if isinstance(options.drawn, int) else None
    drawn = [case for case in cases if case.mask][:SOME]
    found = [case._replace(region=region_of(case.mask, 0, undrawn)) for case in drawn]
    return [case for case in found if case.region]


def worth_localising(options, cases):
    """Whether the networks would see the structure's region in pixels that are finer by COARSER than otherwise.

    Args:
        options: section ``folder`` of params.yaml.
        cases: list of folder.Case.
    """
    drawn = drawn_regions(options, cases)
    if not drawn:
        return False
    try:
        whole, part = (plans_of(options, some)[0] for some in (cases, drawn))
    except DataError:  # is reported when the run's own plans are made
        return False
    return max(now / then for now, then in zip(whole.spacing[-2:], part.spacing[-2:])) >= COARSER


def is_wanted(options, cases, model):
    """Whether regions are to be found.

    Args:
        options, cases: see ``worth_localising``.
        model: model_file.Model that is given, if any. It decides then.

    Raises:
        DataError: folder.region is none of REGIONS; a region is to be found, but not all slices are to be segmented.
    """
    if options.region not in REGIONS:
        raise DataError(f"folder.region is '{options.region}', not one of {', '.join(REGIONS)}")
    whole = options.slices == "all"
    if options.region == "auto" and not model:
        return whole and worth_localising(options, cases)
    wanted = model.localiser is not None if model else options.region == "localised"
    if wanted and not whole:
        raise DataError(f"folder.slices is {options.slices}, but a region is to be found: set it to all")
    return wanted


def coarse_settings(settings, cases, folder):
    """Settings of the coarse run on ``cases``, which writes to ``folder``; ``settings`` are those of the run itself."""
    own = section(json.loads(json.dumps(settings)))
    own.folder |= {"output": str(folder), "space": "slices", "method": "auto", "dicom_seg": False}
    own.folder |= {"quick": 0, "degraded_views": 0}  # nobody asks what its confidence means
    (plan,) = plans_of(own.folder, cases)
    own.folder["symmetric"] = plan.mirrored(own.folder.symmetric)  # along axis 0 nothing can be flipped
    grids = grids_of(drawn_regions(own.folder, cases), plan.axis)
    side = np.median([np.multiply(grid.slices, grid.spacing)[1:].min() for grid, _ in grids]) if grids else np.inf
    if side >= FEW * COARSE * plan.spacing[0]:
        own.folder["size"] = max(SMALLEST, own.folder.size // COARSE)
    return own


def expected(settings, cases, model):
    """What the run on the regions will take, in units of progress.Progress: as if all were like those of drawn cases.

    Args:
        settings, cases, model: see ``localise``. Where nothing is drawn, whole scans stand for their regions.
    """
    seen = drawn_regions(settings.folder, cases) or cases[:SOME]
    try:
        plans = model.plans if model else plans_of(settings.folder, seen)
    except DataError:  # is reported when the run's own plans are made
        return 0
    count = lambda plan: int(np.median([grid.slices[0] for grid, _ in grids_of(seen, plan.axis)] or [1]))
    positions = [range(1 if plan.space == "volumes" else count(plan)) for plan in plans]
    labelled = None if model else [case.name for case in cases if case.mask]
    return sum(what_is_to_do(settings, plans, labelled, {case.name: positions for case in cases}).values())


def localise(settings, cases, model, folder, run):
    """The cases with their regions, and what finds them.

    A labelled case's region holds its mask too. Where nothing is found the region is the whole scan.

    Args:
        settings: as params.load gives them.
        cases: list of folder.Case.
        model: model_file.Model that is given, with a localiser, or None: then one is trained.
        folder: where the coarse run writes.
        run: segment.segment_before, of which settings, cases and ``later`` are to be given.

    Returns:
        (cases, notes: dictionary of name to what is odd about a region, Model of the localiser). Where what is drawn is
        too thin for the coarse view, there is no region and no localiser.

    Raises:
        DataError: see ``run``.
    """
    coarse = coarse_settings(settings, cases, folder)
    file = folder / "model.safetensors"
    if model:
        file = folder / "given.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model.localiser, file)
        coarse.folder["model"] = str(file)
    tqdm.write("the structure is small in these scans: first a coarse view finds it; change it by folder.region")
    try:
        table = run(coarse, cases, expected(settings, cases, model)).set_index("case")
    except TooThin as error:
        tqdm.write(f"no region is found, since {error}")
        return cases, {}, None
    localiser = load_model(file)
    undrawn = settings.folder.drawn if isinstance(settings.folder.drawn, int) else None
    least = LEAST * max(localiser.plans[0].spacing)
    found, notes = [], {}
    for case in cases:
        done = table.loc[case.name, "status"] != "failed"
        seen = region_of(folder / f"{case.name}_mask.nii.gz", least, strays=STRAY) if done else ()
        region = joined(seen, region_of(case.mask, least, undrawn))
        if done and not region:
            notes[case.name] = NOT_FOUND
        found.append(case._replace(region=region))
    return found, notes, localiser
