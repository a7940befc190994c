"""From a folder of scans with masks for some to masks for all, each with a confidence map and a predicted DSC."""

import errno
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout
from tqdm import tqdm

from lib import DataError
from lib.results.calibration import SUPPORTED
from lib.runs import params
from lib.runs.files import append_line, read_lines, replacing
from lib.runs.versions import NUMERICS, PREDICTED_DSC, STRONG, fingerprint
from lib.scans.cases import digests, files_of, segmented, workers
from lib.scans.drawing_next import draw_next
from lib.scans.localisation import is_wanted, localise
from lib.scans.networks.model_file import load_model, save_model
from lib.scans.networks.training import MANY, train, what_is_to_do
from lib.scans.progress import SEGMENTING, Progress, case_takes
from lib.scans.reading.folder import find_cases
from lib.scans.reading.intake import chosen_images, take_in
from lib.scans.reading.planning import plans_of, seen_whole
from lib.scans.reading.store import Store


@contextmanager
def at_work(settings):
    """Context in which nobody else works in folder.output, and all outputs lie there.

    Raises:
        DataError: another run is at work there; it is a folder of inputs, or cannot be written to; the disk is full.
    """
    output = Path(settings.folder.output)
    for what in ("images", "masks"):
        if settings.folder[what] and Path(settings.folder[what]).resolve() == output.resolve():
            raise DataError(f"{output} is the folder of the {what}: give another one for what comes out")
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".lock").acquire(timeout=0)
    except Timeout:
        raise DataError(f"another run is at work in {output}: wait for it, or give another output folder") from None
    except OSError as error:
        raise DataError(f"{output} cannot be written to ({error.strerror}): give another output folder") from error
    with lock, params.outputs_under(output):
        try:
            yield output
        except OSError as error:
            full = error.errno in (None, errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # safetensors gives no number
            what = f"{output} cannot be written to ({error}): make room" if full else str(error)
            raise DataError(f"{what}; what is finished is kept, and the same command goes on from here") from error


def segment_folder(settings):
    """Masks and confidence maps of every image of a folder, by the given model or by one trained on it.

    Everything lies under folder.output: ``<case>_mask.nii.gz``, ``<case>_confidence.nii.gz``, cases.csv, the model
    with held_out.csv, and ``work``, from which a killed run goes on. Results of the same image, model and settings are
    not computed again. A file that somebody has changed, or that is not from these runs, is kept.

    Args:
        settings: as params.load gives them, of cohort ``folder``.

    Returns:
        pandas.DataFrame, cases.csv: one row per case, ``status`` done, kept or failed, and ``note`` says why.

    Raises:
        DataError: the folders cannot be used, nothing is labelled, or the model file is not one; see also ``at_work``.
    """
    options = settings.folder
    with at_work(settings) as output:
        model = load_model(options.model) if options.model else None
        if model:
            options["channels"] = [] if model.about["channels"] == [""] else model.about["channels"]
        cases = find_cases(options.images, options.masks or None, options.pattern, options.channels)
        notes, localiser = {}, None
        with Progress() as progress:
            if is_wanted(options, cases, model):
                before = partial(segment_before, progress)
                cases, notes, localiser = localise(settings, cases, model, output / "work" / "localisation", before)
            return segment_these(settings, output, cases, progress, notes=notes, localiser=localiser)


def segment_before(progress, settings, cases, later):
    """``segment_these`` for a run that needs their masks first, in an output folder of its own.

    ``later``: what that run will take, see progress.Progress.begin.
    """
    with at_work(settings) as output:
        return segment_these(settings, output, cases, progress, "coarse view: ", later)


def segment_these(settings, output, cases, progress, stage="", later=0, notes=None, localiser=None):
    """``segment_folder`` where the cases are known and nobody else works in ``output``.

    Args:
        cases: list of folder.Case. Those with a region are seen and segmented there alone.
        progress: progress.Progress; ``stage`` and ``later``: see its ``begin``.
        notes: dictionary of name to what is odd about a case so far.
        localiser: model_file.Model that has found the regions, if any.
    """
    options = settings.folder
    with ExitStack() as stack:
        model = load_model(options.model) if options.model else None
        plans = model.plans if model else plans_of(options, cases)
        if seen_whole(plans) and options.slices != "all":
            raise DataError(
                f"folder.slices is {options.slices}, but scans are seen whole: set it to all, or folder.space to "
                "slices" + ", and train a model on them" * (model is not None)
            )
        tqdm.write(f"{' and '.join(plan.title for plan in plans)}; change it by folder.space")
        stores = [Store(output / "work" / "scans" / plan.view, plan) for plan in plans]
        client = stack.enter_context(workers(settings, len(cases)))
        intake = take_in(options, cases, stores, client)
        for name, note in (notes or {}).items():
            intake.notes[name] = "; ".join(filter(None, (intake.notes.get(name), note)))
        for reason in intake.failures.values():  # now, not after hours of training
            tqdm.write(f"left out: {reason}")
        counts = len(intake.cases), len(intake.labelled), len(intake.failures)
        tqdm.write("{} cases, {} of them with masks; {} left out".format(*counts))
        labelled = None if model else [case.name for case in intake.labelled]
        chosen = chosen_images(options, stores, intake.cases)
        progress.begin(what_is_to_do(settings, plans, labelled, chosen), stage, later)
        if model is None:
            model = trained(settings, stores, intake, localiser, output, progress)
        rows = segment_cases(settings, model, stores, intake, output, progress, client)
        table = summary(rows, model, options.review)
        write_table(table, output / "cases.csv")
        return table


def segment_cases(settings, model, stores, intake, output, progress, client):
    """Rows of cases.csv, as dictionaries; cases that are finished are taken from the log of the runs before."""
    chosen = chosen_images(settings.folder, stores, intake.cases)
    log_file = output / "work" / "cases.jsonl"
    log, keys = read_lines(log_file, "case"), {}
    rows = []
    for name, note in intake.failures.items():
        old = any(file.exists() for file in files_of(name, output))
        left = "; its files in the output folder are of an earlier run" if old else ""
        rows.append({"case": name, "status": "failed", "note": note + left})
    for case in intake.cases:
        prints = [store.index[case.name]["fingerprint"] for store in stores]
        positions = [at.tolist() for at in chosen[case.name]]
        how = positions, str(case.image), settings.folder.dicom_seg, PREDICTED_DSC
        keys[case.name] = fingerprint(model.key, prints, *how)
        row = log.get(case.name, {})
        if row.get("fingerprint") != keys[case.name] or row.get("digests") != digests(case.name, output):
            log.pop(case.name, None)
    missing = [(case, chosen[case.name]) for case in intake.cases if case.name not in log]
    found = segmented(settings, stores, output, missing, client) if missing else None
    with progress.part(SEGMENTING) as done:
        for case in intake.cases:
            row = log.get(case.name)
            if row is None:
                row = next(found)
                if row["status"] == "done":
                    row |= {"fingerprint": keys[case.name]}
                    append_line(row, log_file)
            rows.append({"note": intake.notes.get(case.name, ""), **row, "labelled": case.mask is not None})
            done(case_takes(settings, model.plans, chosen[case.name]))
    draw_next(rows, lambda name: stores[0].images(name)[chosen[name][0]])
    return rows


def write_table(table, file):
    """Write a CSV file; leaves either the old file or the whole new one."""
    with replacing(file) as partial:
        table.round(4).to_csv(partial, index=False)


def summary(rows, model, review):
    """cases.csv. To be reviewed are cases that failed or mark nothing, and those without a predicted DSC of ``review``.

    A mask that somebody has changed counts as reviewed. Where there is no interval, the note says why.
    """
    classes = model.about["classes"]
    held = len({number for number, *_ in model.about["calibration"]})
    if held < SUPPORTED:
        why = f"no interval: {held} held out, {SUPPORTED} are needed"
        rows = [
            {**row, "note": "; ".join(filter(None, (row["note"], why)))} if row["status"] == "done" else row
            for row in rows
        ]
    columns = [
        "case",
        "status",
        "labelled",
        "draw_next",
        "slices",
        "of_slices",
        "unit",
        *classes,
        "confidence",
        "predicted_dsc",
        "predicted_low",
        "predicted_high",
        "note",
    ]
    table = pd.DataFrame(rows).sort_values("case", ignore_index=True).reindex(columns=columns)
    table["draw_next"] = table["draw_next"].astype("Int64")  # whole numbers, empty where there is none
    doubtful = ~(table["predicted_dsc"] >= review) | (table[list(classes)].sum(axis=1) == 0)
    table.insert(2, "review", doubtful & (table["status"] != "kept"))
    return table


def trained(settings, stores, intake, localiser, output, progress):
    """The model in ``output`` if it was trained on these cases with these settings, else one trained now.

    ``localiser``: Model that has found the cases' regions, or None.
    """
    read = "seed", "scale", "device", "precision", "segmentation", "registration", "refinement", "pseudo_masks"
    relevant = {name: settings[name] for name in read}
    relevant["strong"] = {name: settings.strong[name] for name in ("training", "augmentation", "bcp", "joint_plus")}
    names = (
        "method",
        "drawn",
        "channels",
        "slices",
        "subject",
        "symmetric",
        "unlabelled",
        "labelled",
        "degraded_views",
        "degradation",
        "quick",
        "licence",
    )
    options = {name: settings.folder[name] for name in names}
    plans = [store.plan for store in stores]
    prints = [store.index[case.name]["fingerprint"] for case in intake.cases for store in stores]
    if plans[0].space == "volumes":
        relevant["volumes"] = settings.volumes
    seen, names = [list(plan) for plan in plans], [case.name for case in intake.cases]
    localised_by = [localiser.key] if localiser else []
    key = fingerprint(relevant, options, seen, prints, names, NUMERICS, STRONG, MANY, *localised_by)
    file = output / "model.safetensors"
    try:
        model = load_model(file)
        if model.about.get("key") == key and (output / "held_out.csv").exists():
            progress.skip(*(name for name in list(progress.parts) if name != SEGMENTING))
            return model
    except DataError:
        pass
    model, held_out = train(settings, stores, intake, progress)
    write_table(held_out, output / "held_out.csv")
    model = model._replace(localiser=localiser)
    model.about["key"] = key
    save_model(model, file)
    return model
