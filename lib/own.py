"""From a folder of scans with masks for some to masks for all, each with a confidence map and a predicted DSC.

Where five or more cases are labelled, a fifth of them is held out: their DSC chooses the best round and calibrates the
predicted one. Where fewer are, each is left out once, and the masks are the mean of the networks that come of it.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from tqdm import tqdm

from lib import DataError, params
from lib.calibration import predict_dsc
from lib.compute import Numerics
from lib.data import to_labels
from lib.evaluation import dice
from lib.experiment import JOINT_PLUS, NUMERICS, Experiment, best_rounds, cohort_file, load_measured, load_round
from lib.folder import find_cases, read_case, read_scan, write_scan
from lib.joint_plus import joint_plus_rounds
from lib.model_file import Model, load_model, save_model
from lib.params import fingerprint, section
from lib.pseudo_masks import mean_confidence, segmentation_masks
from lib.store import Store
from lib.training import pretrain_registration, pretrain_segmentation
from lib.volumes import OwnCohort, fit_to, scaled

LEAVE_ONE_OUT = 5  # below so many labelled cases each is left out once


class Intake(NamedTuple):
    """What a folder holds."""

    cases: list  # folder.Case, those that could be read
    failures: dict  # name of the others to what is wrong
    values: list  # label values of the masks, background left out

    @property
    def labelled(self):
        return [case for case in self.cases if case.mask]


def digest(*files):
    """sha256 of the files' bytes."""
    found = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while part := stream.read(2**20):
                found.update(part)
    return found.hexdigest()


def prints_of(case, settings):
    """Fingerprint of what a case's slices in the store are made from."""
    return fingerprint(digest(case.image, *([case.mask] if case.mask else [])), bool(case.mask), settings.axis,
                       settings.size)


def take_in(settings, store):
    """Read every case of a folder into the store; one that cannot be read is reported and does not stop the others.

    Args:
        settings: section ``folder`` of params.yaml.
        store: store.Store of slices of ``settings.size``.

    Returns:
        Intake.

    Raises:
        DataError: the folder itself cannot be used, see folder.find_cases.
    """
    cases, failures, values = [], {}, set()
    for case in tqdm(find_cases(settings.images, settings.masks or None, settings.pattern), desc="reading", unit="case"):
        try:
            key = prints_of(case, settings)
            if not store.has(case.name, key):
                image, labels, _ = read_case(case, settings.axis)
                small = None if labels is None else fit_to(labels, settings.size, "nearest")
                store.add(case.name, key, fit_to(scaled(image), settings.size, "bilinear"), small)
            if case.mask:
                values |= set(np.unique(store.labels(case.name)).tolist())
            cases.append(case)
        except (DataError, OSError) as error:
            failures[case.name] = str(error)
    return Intake(cases, failures, sorted(values - {0}))


def chosen_slices(settings, store, cases):
    """Which slices of every case are used: dictionary of name to positions."""
    if settings.slices == "all":
        return {case.name: np.arange(len(store.images(case.name))) for case in cases}
    if settings.slices == "largest":
        marked = {case.name: (store.labels(case.name) > 0).sum(axis=(1, 2)) for case in cases if case.mask}
        largest = {name: int(area.argmax()) for name, area in marked.items()}
        height = np.mean([place / max(1, len(marked[name]) - 1) for name, place in largest.items()]) if largest else 0.5
        return {case.name: np.array([largest.get(case.name, round(height * (len(store.images(case.name)) - 1)))])
                for case in cases}
    try:
        first, last = map(int, settings.slices)
    except (TypeError, ValueError):
        raise DataError(f"folder.slices is '{settings.slices}', not all, largest or two numbers [first, last]") from None
    found = {case.name: np.arange(len(store.images(case.name)))[first : last + 1] for case in cases}
    for name, positions in found.items():
        if not len(positions):
            raise DataError(f"{name} has no slices from {first} to {last}: change folder.slices")
    return found


def folds_of(names, seed):
    """Names of the labelled cases that are held out, once per network to be trained.

    One case alone cannot be held out: the one fold is then empty.
    """
    if len(names) == 1:
        return [()]
    if len(names) < LEAVE_ONE_OUT:
        return [(name,) for name in names]
    order = np.random.default_rng([seed, 2]).permutation(len(names))
    return [tuple(names[k] for k in sorted(order[: round(len(names) / 5)]))]


def build(settings, store, intake, held_out):
    """The cohort of one fold.

    Args:
        settings: as params.load gives them.
        held_out: names of the labelled cases that validate; where it is empty, those that train do.

    Returns:
        OwnCohort. Unlabelled slices beyond folder.unlabelled are left out, evenly.
    """
    options = settings.folder
    slices = chosen_slices(options, store, intake.cases)
    free = [(case.name, int(k)) for case in intake.cases if not case.mask for k in slices[case.name]]
    keep = np.unique(np.linspace(0, len(free) - 1, min(len(free), options.unlabelled)).round().astype(int))
    rows = [(free[k][0], free[k][1], "train", False) for k in keep]
    for case in intake.labelled:
        for split in ["validation"] if case.name in held_out else ["train"] if held_out else ["train", "validation"]:
            rows += [(case.name, int(k), split, True) for k in slices[case.name]]
    empty = np.zeros((options.size, options.size), np.uint8)
    to_class = np.zeros(256, np.uint8)
    to_class[intake.values] = np.arange(1, len(intake.values) + 1)
    return OwnCohort(
        name="folder", title="own data", symmetric=options.symmetric, pixel_mm=1.0,
        classes=tuple(f"label {value}" for value in intake.values),
        images=np.stack([store.images(name)[k] for name, k, *_ in rows]).astype(np.float32),
        labels=np.stack([to_class[store.labels(name)[k]] if masked else empty for name, k, _, masked in rows]),
        subjects=np.array([name for name, *_ in rows]), split=np.array([split for *_, split, _ in rows]),
        masked=np.array([masked for *_, masked in rows]),
        volumes=np.array([f"{name}/{split}" for name, _, split, _ in rows]),
        positions=np.array([k / max(1, len(store.images(name)) - 1) for name, k, *_ in rows], np.float32),
        ranks=np.zeros(len(rows), int), shapes=np.zeros((0, 3), int), truth=np.zeros(0, np.uint8),
    )


def train(settings, store, intake):
    """Networks for a folder by joint+, one per fold.

    Args:
        settings: as params.load gives them, of cohort ``folder``.

    Returns:
        model_file.Model.

    Raises:
        DataError: no case has a mask, or no mask marks anything.
    """
    options = settings.folder
    if not intake.labelled:
        raise DataError(f"no image in {options.images} has a mask in {options.masks or 'any folder'}: draw at least one")
    if not intake.values:
        raise DataError(f"the masks in {options.masks} mark nothing: draw at least one structure")
    networks, pairs, keys = [], [], []
    for number, held_out in enumerate(folds_of([case.name for case in intake.labelled], settings.seed)):
        own = section(json.loads(json.dumps(settings)))
        own["cohort"] = f"folder/fold_{number}"
        if not held_out:  # nothing to weigh both kinds of masks by
            own.joint_plus["fusion"] = "mean"
        build(own, store, intake, held_out).save(cohort_file(own))
        experiment = Experiment(own)
        network, _ = pretrain_segmentation(experiment)
        if len(experiment.data.unlabelled):
            pretrain_registration(experiment)
            joint_plus_rounds(experiment)
            measured = load_measured(experiment, "joint_plus")
            number = best_rounds(measured)["joint"] if held_out else own.joint_plus.rounds
            network = load_round(experiment, number, "joint_plus")[0][0]
        networks.append(network.eval())
        keys.append(experiment.origin)
        model = Model([network], {"pseudo_masks": own.pseudo_masks, "symmetric": options.symmetric})
        for case in intake.labelled:
            if case.name in held_out:
                soft = soft_masks(model, store.images(case.name), experiment.numerics)
                truth = store.labels(case.name)
                truth = np.stack([truth == value for value in intake.values], axis=1)
                score = dice(*(whole(torch.as_tensor(masks, dtype=torch.float32)) for masks in (soft.cpu(), truth)))
                pairs.append([confidence_of(soft), float(score.mean())])
    about = {"classes": [f"label {value}" for value in intake.values], "values": intake.values, "size": options.size,
             "axis": options.axis, "normalisation": settings.segmentation.normalisation,
             "pseudo_masks": settings.pseudo_masks, "symmetric": options.symmetric, "fingerprint": fingerprint(keys),
             "licence": options.licence, "calibration": pairs}
    return Model(networks, about)


def whole(masks):
    """Masks of a case's slices ``(slices, classes, height, width)`` as those of one volume, ``(1, classes, ...)``."""
    return masks.movedim(0, 1)[None]


def confidence_of(soft):
    """Mean confidence of a case in [0.5, 1], see pseudo_masks.mean_confidence."""
    return float(mean_confidence(soft.flatten(2, 3).movedim(0, -1)[None]))


@torch.no_grad()
def soft_masks(model, slices, numerics):
    """Probabilities of a case's slices: the mean over networks and over N augmented views.

    Args:
        model: Model on the device.
        slices: ``(slices, size, size)`` in [0, 1].

    Returns:
        ``(slices, classes, size, size)``. The draws depend on nothing but the case's own slices.
    """
    images = numerics.tensor(np.asarray(slices, np.float32)[:, None])
    options = section(model.about["pseudo_masks"])
    total, size = [], numerics.batch(images)
    for batch in images.split(size):
        parts = [segmentation_masks(network, batch, options.n, numerics.generator("own"), options,
                                    model.about["symmetric"], numerics).mean(dim=0) for network in model.networks]
        total.append(torch.stack(parts).mean(dim=0))
    return torch.cat(total)


def apply(model, name, slices, positions, grid, folder, numerics):
    """Segment one case and write its mask and confidence map.

    Args:
        model: Model on the device.
        name: of the case.
        slices: all of the case, as the store has them.
        positions: those that are segmented; nothing is marked in the others.
        grid: folder.Grid of the image.
        folder: where ``<name>_mask.nii.gz`` and ``<name>_confidence.nii.gz`` go.

    Returns:
        Dictionary: a row of cases.csv. Volumes are in mm³, of single slices areas in mm².
    """
    soft = soft_masks(model, slices[positions], numerics)
    stored = canonical_shape(grid)
    shape = stored[grid.axis], *np.delete(stored, grid.axis)
    labels, confidence = np.zeros(shape, np.uint8), np.ones(shape, np.float32)
    values = np.array([0, *model.about["values"]], np.uint8)
    for part, at in zip(soft.split(16), np.split(positions, range(16, len(positions), 16))):
        masks = F.interpolate(part, size=shape[1:], mode="bilinear", align_corners=False)
        labels[at] = values[to_labels(masks).cpu().numpy()]
        every = torch.cat((1 - masks.sum(dim=1, keepdim=True), masks), dim=1)
        confidence[at] = every.amax(dim=1).clamp(0, 1).cpu().numpy().round(3)
    write_scan(labels, grid, folder / f"{name}_mask.nii.gz")
    write_scan(confidence, grid, folder / f"{name}_confidence.nii.gz")
    between, *inside = grid.spacing
    voxel = np.prod(inside) * (between if shape[0] > 1 else 1)
    mean = confidence_of(soft)
    dsc, low, high = predict_dsc(model.about["calibration"], mean)
    return {"case": name, "slices": len(positions), "unit": "mm3" if shape[0] > 1 else "mm2",
            **{label: round(float((labels == value).sum() * voxel), 3)
               for label, value in zip(model.about["classes"], model.about["values"])},
            "confidence": round(mean, 4), "predicted_dsc": dsc, "predicted_low": low, "predicted_high": high}


def segment_folder(settings):
    """Masks and confidence maps of every image of a folder, by the given model or by one trained on it.

    Everything lies under folder.output: ``<case>_mask.nii.gz``, ``<case>_confidence.nii.gz``, cases.csv, the model,
    and ``work`` with what a killed run goes on from. What is there already, from the same image, model and settings,
    is not computed again.

    Args:
        settings: as params.load gives them, of cohort ``folder``, with JOINT_OUTPUT set to folder.output.

    Returns:
        pandas.DataFrame, cases.csv: one row per case, ``status`` done or failed, and ``error`` where it failed.

    Raises:
        DataError: the folders cannot be used, nothing is labelled, or the model is none; another run is at work here.
    """
    options = settings.folder
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            return _segment_folder(settings, output)
    except Timeout:
        raise DataError(f"another run is at work in {output}: wait for it, or give another output folder") from None


def _segment_folder(settings, output):
    options = settings.folder
    model = load_model(options.model) if options.model else None
    if model:
        options |= {"size": model.about["size"], "axis": model.about["axis"]}
    store = Store(output / "work" / "slices", options.size)
    intake = take_in(options, store)
    numerics = Numerics(settings.device, settings.precision)
    if model is None:
        model = trained(settings, store, intake, output / "model.safetensors")
    key = fingerprint(model.about["fingerprint"], [float(sum(value.double().sum() for value in network.state_dict().values()))
                                                   for network in model.networks])
    model = model.to(numerics)
    slices = chosen_slices(options, store, intake.cases)
    log = Log(output / "work" / "cases.jsonl")
    rows = [{"case": name, "status": "failed", "error": error} for name, error in intake.failures.items()]
    for case in tqdm(intake.cases, desc="segmenting", unit="case"):
        own = fingerprint(key, store.index[case.name]["fingerprint"], slices[case.name].tolist(), options.axis)
        written = [output / f"{case.name}_{what}.nii.gz" for what in ("mask", "confidence")]
        row = log.rows.get(case.name)
        if not (row and row["fingerprint"] == own and all(file.exists() for file in written)):
            try:
                _, grid = read_scan(case.image, options.axis)
                row = apply(model, case.name, store.images(case.name), slices[case.name], grid, output, numerics)
                row |= {"status": "done", "error": "", "fingerprint": own}
                log.add(row)
            except (DataError, OSError) as error:
                row = {"case": case.name, "status": "failed", "error": str(error)}
        rows.append(row)
    table = pd.DataFrame(rows).sort_values("case", ignore_index=True)
    low = table["predicted_dsc"] < options.review if "predicted_dsc" in table else False
    nothing = (table[list(model.about["classes"])].sum(axis=1) == 0) if "confidence" in table else False
    table["review"] = low | nothing | (table["status"] == "failed")
    partial = output / ".cases.partial.csv"
    table.drop(columns="fingerprint", errors="ignore").round(4).to_csv(partial, index=False)
    partial.replace(output / "cases.csv")
    return table


def trained(settings, store, intake, file):
    """The model in ``file`` if it was trained on these cases with these settings, else one trained now and saved there."""
    relevant = {key: value for key, value in settings.items() if key not in ("grid", "folder", "cctr")}
    key = fingerprint(relevant, NUMERICS, JOINT_PLUS, [store.index[case.name]["fingerprint"] for case in intake.cases],
                      {name: settings.folder[name] for name in ("axis", "size", "slices", "symmetric", "unlabelled")})
    try:
        model = load_model(file)
        if model.about.get("key") == key:
            return model
    except DataError:
        pass
    model = train(settings, store, intake)
    model.about["key"] = key
    save_model(model, file)
    return model


class Log:
    """Rows of finished cases, one line each, appended as they are done."""

    def __init__(self, file):
        self.file = file
        self.rows = {}
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:  # cut short by a crash
                continue
            self.rows[row["case"]] = row

    def add(self, row):
        """Append a row."""
        broken = self.file.exists() and not self.file.read_bytes()[-1:] in (b"", b"\n")
        with open(self.file, "a") as stream:
            stream.write(("\n" if broken else "") + json.dumps(row) + "\n")
        self.rows[row["case"]] = row


def main():
    parser = argparse.ArgumentParser(prog="python -m lib.own", description=__doc__.splitlines()[0])
    parser.add_argument("images", help="folder of NIfTI images")
    parser.add_argument("output", help="folder for masks, confidence maps, cases.csv and the model")
    parser.add_argument("--masks", default="", help="folder of masks for some of the images")
    parser.add_argument("--model", default="", help="a trained model to apply instead of training one")
    parser.add_argument("-S", action="append", default=[], metavar="KEY=VALUE", dest="values", help="any setting")
    given = parser.parse_args()
    os.environ["JOINT_SET"] = ",".join(filter(None, [os.environ.get("JOINT_SET"), "cohort=folder", *given.values]))
    os.environ["JOINT_OUTPUT"] = str(Path(given.output).resolve())
    settings = params.load()
    settings.folder |= {"images": given.images, "masks": given.masks, "model": given.model, "output": given.output}
    try:
        table = segment_folder(settings)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    failed = table[table["status"] == "failed"]
    for row in failed.itertuples():
        print(f"failed: {row.case}: {row.error}", file=sys.stderr)
    print(f"{len(table) - len(failed)} of {len(table)} cases are segmented, {int(table['review'].sum())} to be reviewed: "
          f"{Path(given.output) / 'cases.csv'}")
    sys.exit(1 if len(failed) else 0)


if __name__ == "__main__":
    main()


def canonical_shape(grid):
    """Shape of a grid's canonical array."""
    shape = (*grid.shape, 1, 1)[:3]
    order = np.argsort(grid.orientation[:, 0])
    return tuple(shape[k] for k in order)
