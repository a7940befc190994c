"""From a folder of scans with masks for some to masks for all, each with a confidence map and a predicted DSC.

Where five or more subjects are labelled, a fifth of them is held out: their DSC says which rounds are good, and
calibrates the predicted one. Where fewer are, each is left out once, and the masks are the mean of the networks that
come of it.
"""

import errno
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from tqdm import tqdm

from lib import DataError, params
from lib.augment import augment
from lib.calibration import predict_dsc
from lib.compute import Numerics, with_less_memory
from lib.data import to_labels
from lib.evaluation import dice, score
from lib.experiment import Experiment, cohort_file, load_measured, load_round
from lib.files import append_line, read_lines, replacing
from lib.folder import is_others, read_case, read_grid, write_scan
from lib.intake import build, chosen_slices, class_names, digest, folds_of, subjects_of, take_in
from lib.joint_plus import joint_plus_rounds
from lib.model_file import Model, load_model, save_model
from lib.params import fingerprint, section
from lib.pseudo_masks import mean_confidence, segmentation_masks
from lib.store import Store
from lib.training import pretrain_registration, pretrain_segmentation
from lib.versions import JOINT_PLUS, NUMERICS

TOLERANCE = 0.01  # of the DSC of held-out cases, by which a later round may be below an earlier one


def train(settings, store, intake):
    """Networks for a folder by joint+, one per fold.

    Args:
        settings: as params.load gives them, of cohort ``folder``.
        store: store.Store of the cases' slices.
        intake: intake.Intake.

    Returns:
        (model_file.Model, scores of the held-out cases: pandas.DataFrame with columns case, class, dsc, hd, hd95, the
        latter two in mm).

    Raises:
        DataError: no case has a mask, no mask marks anything, or memory does not suffice.
    """
    options = settings.folder
    if not intake.labelled:
        why = "".join(f"; {reason}" for reason in list(intake.failures.values())[:3])
        raise DataError(f"no image in {options.images} has a mask in {options.masks or 'any folder'} that can be used: draw "
                        f"at least one{why}")
    if not intake.values:
        raise DataError(f"the masks in {options.masks} mark nothing: draw at least one structure")
    slices = chosen_slices(options, store, intake.cases)
    about = {"classes": class_names(intake.values), "values": intake.values, "size": options.size, "axis": options.axis,
             "normalisation": settings.segmentation.normalisation, "pseudo_masks": settings.pseudo_masks,
             "symmetric": options.symmetric, "licence": options.licence}
    networks, keys, held, pairs = [], [], [], []
    subjects = subjects_of([case.name for case in intake.labelled], options.subject)
    number_of = {name: number for number, names in enumerate(subjects.values()) for name in names}
    for number, held_out in enumerate(folds_of(subjects, settings.seed)):
        train_one = lambda divisor: train_fold(settings, store, intake, number, held_out, divisor)
        network, numerics, key = with_less_memory(train_one, "training")
        networks.append(network.eval())
        keys.append(key)
        for case in intake.labelled:
            if case.name in held_out:
                model, positions = Model([network], about), slices[case.name]
                with_memory = lambda work, *more: with_less_memory(
                    lambda divisor: work(model, case, store, positions, *more, numerics.sharing(1 / divisor)), case.name)
                scores, confidence = with_memory(score_case)
                pairs.append([number_of[case.name], confidence, float(scores["dsc"].mean())])
                pairs += [[number_of[case.name], *pair] for pair in with_memory(degraded_pairs, settings)]
                held.append(scores.assign(image=case.name))
    columns = ["case", "class", "dsc", "hd", "hd95"]
    table = pd.concat(held).rename(columns={"image": "case"})[columns] if held else pd.DataFrame(columns=columns)
    return Model(networks, {**about, "fingerprint": fingerprint(keys), "calibration": pairs}), table


def train_fold(settings, store, intake, number, held_out, divisor=1):
    """The network of one fold, with the device it is on and the fingerprint of what it was trained on.

    Args:
        number, held_out: which fold, and the names of the cases that validate.
        divisor: what batches are divided by, for want of memory.
    """
    own = fold_settings(settings, number, bool(held_out), divisor)
    build(own, store, intake, held_out).save(cohort_file(own))
    experiment = Experiment(own)
    experiment.numerics.share = 1 / divisor
    network, _ = pretrain_segmentation(experiment)
    if len(experiment.data.unlabelled):
        pretrain_registration(experiment)
        joint_plus_rounds(experiment)
        last = last_good_round(load_measured(experiment, "joint_plus")) if held_out else own.joint_plus.rounds
        network = load_round(experiment, last, "joint_plus")[0][0]
    return network, experiment.numerics, experiment.origin


def last_good_round(measured):
    """The last round whose DSC on the held-out cases is at most TOLERANCE below the best.

    Held-out cases are few: they see that a round has gone wrong, not which of several good ones is best on all others.

    Args:
        measured: see experiment.load_measured.
    """
    scores = measured[measured["split"] == "validation"].set_index("round")["dsc_segmentation"]
    return int(scores.index[scores >= scores.max() - TOLERANCE].max())


def fold_settings(settings, number, validated=True, divisor=1):
    """Settings under which a fold trains, by which its Experiment is found again; see ``train_fold``."""
    own = section(json.loads(json.dumps(settings)))
    own["cohort"] = f"folder/fold_{number}"
    for part in (own.segmentation, own.registration, own.joint_plus):
        part["batch"] = max(1, part["batch"] // divisor)
    if not validated:  # nothing to weigh both kinds of masks by
        own.joint_plus["fusion"] = "mean"
    return own


def score_case(model, case, store, positions, numerics):
    """DSC, HD and HD95 in mm of a case with a mask, on the slices ``positions``, and the mask's mean confidence.

    A single slice is scored as an image: in a volume one slice thick every voxel would lie on the surface.
    """
    _, truth, grid = read_case(case, model.about["axis"])
    labels, _, confidence = segment(model, store.images(case.name), positions, grid, numerics)
    masks = [torch.stack([torch.as_tensor(found[positions] == value) for value in model.about["values"]])[None].float()
             for found in (labels, truth)]
    flat = len(positions) == 1
    masks = [part.squeeze(2) for part in masks] if flat else masks
    return score(*masks, model.about["classes"], grid.spacing[1:] if flat else grid.spacing), confidence


@torch.no_grad()
def degraded_pairs(model, case, store, positions, settings, numerics):
    """Mean confidence and DSC of worse and worse views of a held-out case, as pairs.

    Held-out cases are few and much alike: they alone do not say what low confidence means. Views are made by the strong
    recipe's augmentation, up to folder.degradation times as strong as in training.
    """
    options, pairs = settings.folder, []
    images = numerics.tensor(np.asarray(store.images(case.name)[positions], np.float32)[:, None])
    labels = np.asarray(store.labels(case.name)[positions])
    masks = numerics.tensor(np.stack([labels == value for value in model.about["values"]], axis=1))
    generator = numerics.generator(settings.seed, "degraded", case.name)
    for strength in np.linspace(0, options.degradation, options.degraded_views + 1)[1:]:
        stronger = params.Section({key: strength * value for key, value in settings.augmentation.items()})
        seen, truth = augment(images, masks, generator, stronger, options.symmetric)
        soft = torch.cat(list(soft_masks(model, seen[:, 0], numerics)))
        pair = [part.movedim(0, 1)[None] for part in (soft, truth)]
        pairs.append([confidence_of(soft), float(dice(*pair).mean())])
    return pairs


def confidence_of(soft):
    """Mean confidence of a case from the masks of its slices, ``(slices, classes, size, size)``: in [0.5, 1]."""
    return float(mean_confidence(soft.movedim(0, 1).flatten(1)[None, :, :, None]))


@torch.no_grad()
def soft_masks(model, slices, numerics):
    """Probabilities of a case's slices: the mean over networks and over N augmented views.

    Args:
        model: Model on the device.
        slices: ``(slices, size, size)`` in [0, 1].

    Yields:
        Batches ``(slices, classes, size, size)``. The draws depend on nothing but the case's own slices.
    """
    options = section(model.about["pseudo_masks"])
    size = numerics.batch(slices)
    for start in range(0, len(slices), size):
        images = numerics.tensor(slices[start : start + size])[:, None]
        generator = numerics.generator("own", start)
        parts = [segmentation_masks(network, images, options.n, generator, options, model.about["symmetric"],
                                    numerics).mean(dim=0) for network in model.networks]
        yield torch.stack(parts).mean(dim=0)


def segment(model, slices, positions, grid, numerics):
    """Labels and confidence of one case, on its own grid.

    Args:
        model: Model on the device.
        slices: all of the case, as the store has them.
        positions: those that are segmented.
        grid: folder.Grid of the image.

    Returns:
        (labels uint8, confidence float32 of every pixel's label, both ``(slices, rows, columns)`` and 0 in slices that
        are not segmented; mean confidence in [0.5, 1], see pseudo_masks.mean_confidence).
    """
    shape = grid.slices
    labels, confidence = np.zeros(shape, np.uint8), np.zeros(shape, np.float32)
    values = np.array([0, *model.about["values"]], np.uint8)
    seen, start = [], 0
    for soft in soft_masks(model, slices[positions], numerics):
        at = positions[start : start + len(soft)]
        start += len(soft)
        masks = F.interpolate(soft, size=shape[1:], mode="bilinear", align_corners=False)
        labels[at] = values[to_labels(masks).cpu().numpy()]
        every = torch.cat((1 - masks.sum(dim=1, keepdim=True), masks), dim=1)
        confidence[at] = every.amax(dim=1).clamp(0, 1).cpu().numpy().round(3)
        seen.append(soft)
    return labels, confidence, confidence_of(torch.cat(seen))


def apply(model, name, slices, positions, grid, folder, numerics):
    """Segment one case, write its mask and confidence map, and return its row of cases.csv.

    Args:
        model, slices, positions, grid, numerics: see ``segment``.
        name: of the case.
        folder: where ``<name>_mask.nii.gz`` and ``<name>_confidence.nii.gz`` go.

    Returns:
        Dictionary. Volumes, of what was segmented, are in mm³, areas, of single slices, in mm².
    """
    labels, confidence, mean = with_less_memory(
        lambda divisor: segment(model, slices, positions, grid, numerics.sharing(1 / divisor)), name
    )
    write_scan(labels, grid, folder / f"{name}_mask.nii.gz")
    write_scan(confidence, grid, folder / f"{name}_confidence.nii.gz")
    flat = len(positions) == 1
    voxel = np.prod(grid.spacing[1:] if flat else grid.spacing)
    dsc, low, high = predict_dsc(model.about["calibration"], mean)
    return {"case": name, "slices": len(positions), "of_slices": len(labels), "unit": "mm2" if flat else "mm3",
            **{label: round(float((labels == value).sum() * voxel), 3)
               for label, value in zip(model.about["classes"], model.about["values"])},
            "confidence": mean, "predicted_dsc": dsc, "predicted_low": low, "predicted_high": high}


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
    with held_out.csv, and ``work`` with what a killed run goes on from. What is there already, from the same image,
    model and settings, is not computed again. A file that somebody has changed, or that is not of these runs, is kept.

    Args:
        settings: as params.load gives them, of cohort ``folder``.

    Returns:
        pandas.DataFrame, cases.csv: one row per case, ``status`` done, kept or failed, and ``note`` says why.

    Raises:
        DataError: the folders cannot be used, nothing is labelled, or the model is none; see also ``at_work``.
    """
    with at_work(settings) as output:
        options = settings.folder
        model = load_model(options.model) if options.model else None
        if model:
            options |= {"size": model.about["size"], "axis": model.about["axis"]}
        store = Store(output / "work" / "slices" / str(options.size), options.size)
        intake = take_in(options, store)
        for reason in intake.failures.values():  # now, not after hours of training
            tqdm.write(f"left out: {reason}")
        counts = len(intake.cases), len(intake.labelled), len(intake.failures)
        tqdm.write("{} cases, {} of them with masks; {} left out".format(*counts))
        if model is None:
            model = trained(settings, store, intake, output)
        table = summary(segment_cases(settings, model, store, intake, output), model.about["classes"], options.review)
        write_table(table, output / "cases.csv")
        return table


def segment_cases(settings, model, store, intake, output):
    """Rows of cases.csv, as dictionaries; cases that are finished are taken from the log of the runs before."""
    numerics = Numerics(settings.device, settings.precision)
    model = model.to(numerics)
    slices = chosen_slices(settings.folder, store, intake.cases)
    log_file = output / "work" / "cases.jsonl"
    log = read_lines(log_file, "case")
    files_of = lambda name: [output / f"{name}_{what}.nii.gz" for what in ("mask", "confidence")]
    rows = []
    for name, note in intake.failures.items():
        old = "; its files in the output folder are of an earlier run" if any(map(Path.exists, files_of(name))) else ""
        rows.append({"case": name, "status": "failed", "note": note + old})
    for case in tqdm(intake.cases, desc="segmenting", unit="case"):
        key = fingerprint(model.key, store.index[case.name]["fingerprint"], slices[case.name].tolist(), str(case.image))
        files, row = files_of(case.name), log.get(case.name, {})
        digests = lambda: [digest(file) if file.exists() else "" for file in files]
        if row.get("fingerprint") != key or row.get("digests") != digests():
            try:
                if others := [file for file in files if is_others(file)]:
                    row = {"case": case.name, "status": "kept", "note": f"{others[0]} has been changed, or was there "
                           "before, and is kept: move it away to have it made"}
                else:
                    grid = read_grid(case.image, settings.folder.axis)
                    row = apply(model, case.name, store.images(case.name), slices[case.name], grid, output, numerics)
                    row |= {"status": "done", "fingerprint": key, "digests": digests()}
                    append_line(row, log_file)
            except DataError as error:
                row = {"case": case.name, "status": "failed", "note": str(error)}
        rows.append({"note": intake.notes.get(case.name, ""), **row, "labelled": case.mask is not None})
    return rows


def write_table(table, file):
    """Write a CSV file; leaves either the old file or the whole new one."""
    with replacing(file) as partial:
        table.round(4).to_csv(partial, index=False)


def summary(rows, classes, review):
    """cases.csv: to be reviewed is what failed, what marks nothing, and what is not known to reach DSC ``review``.

    What somebody has changed has been reviewed.
    """
    columns = ["case", "status", "labelled", "slices", "of_slices", "unit", *classes, "confidence", "predicted_dsc",
               "predicted_low", "predicted_high", "note"]
    table = pd.DataFrame(rows).sort_values("case", ignore_index=True).reindex(columns=columns)
    doubtful = ~(table["predicted_dsc"] >= review) | (table[list(classes)].sum(axis=1) == 0)
    table.insert(2, "review", doubtful & (table["status"] != "kept"))
    return table


def trained(settings, store, intake, output):
    """The model in ``output`` if it was trained on these cases with these settings, else one trained now."""
    others = "grid", "folder", "cctr", "baseline", *params.CHOICES["cohort"]
    relevant = {key: value for key, value in settings.items() if key not in others}
    names = ("axis", "size", "slices", "subject", "symmetric", "unlabelled", "labelled", "degraded_views",
             "degradation", "licence")
    options = {name: settings.folder[name] for name in names}
    prints = [store.index[case.name]["fingerprint"] for case in intake.cases]
    key = fingerprint(relevant, options, prints, [case.name for case in intake.cases], NUMERICS, JOINT_PLUS,
                      TOLERANCE)
    file = output / "model.safetensors"
    try:
        model = load_model(file)
        if model.about.get("key") == key and (output / "held_out.csv").exists():
            return model
    except DataError:
        pass
    model, held_out = train(settings, store, intake)
    write_table(held_out, output / "held_out.csv")
    model.about["key"] = key
    save_model(model, file)
    return model
