"""`python benchmarks/volumes.py`: masks of whole volumes from five drawn ones, by `make segment` and by others.

Real MRI, hippocampus or hearts: some training subjects are drawn, test subjects are not and are scored. All ways get
the same cases and the same cores. Writes own.csv and own.md to the cohort's results, and with `--trust` single cases.
Ways that need more than the project does are left out unless they are named: ANTs needs
`pip install -r benchmarks/requirements.txt`, nnU-Net `pip install -r benchmarks/nnunet/requirements.txt`.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm import tqdm

from lib.cohorts import acdc
from lib.cohorts.hippocampus import chosen_cases
from lib.methods import ants
from lib.metrics import dice
from lib.results.tables import as_markdown
from lib.runs import params

CASES = 25  # that are scored, if there are so many
BAD = 0.8  # DSC below which a mask is to be found out
FORETOLD = ["confidence", "predicted_dsc", "predicted_low", "predicted_high"]  # columns of cases.csv
MONAI = Path(__file__).with_name("monai_unet.py")
SPLIT = params.ROOT / "results" / "hippocampus_centre" / "split.csv"


class Cohort(NamedTuple):
    """Whole scans with masks."""

    files: dict  # name of a case to (image, mask)
    split: dict  # name of a case to train, validation or test
    values: dict  # label value to the name of the class


def hippocampus():
    with open(SPLIT, newline="") as stream:
        split = {row["subject"]: row["split"] for row in csv.DictReader(stream)}
    files, _ = chosen_cases(params.load("strong", "hippocampus3d").hippocampus3d)
    return Cohort(files, split, {1: "anterior", 2: "posterior"})


def hearts():
    """ACDC, of every patient the first of both phases; the structure takes a small part of the scan."""
    files = {}
    for patient, *pair in acdc.find_volumes(params.load("strong", "acdc").acdc.folder):
        files.setdefault(patient, pair)
    split = {patient: part for part, patients in acdc.SPLIT.items() for patient in patients}
    return Cohort(files, split, {value: name for value, name in acdc.LABELS.items() if value})


COHORTS = {"hippocampus3d": hippocampus, "acdc": hearts}


def pick(cohort, part, count, rng):
    """Names of ``count`` random cases that are of a part of the split."""
    return rng.permutation(sorted(name for name in cohort.files if cohort.split.get(name) == part))[:count]


def write_folder(folder, cohort, labelled, draw):
    """Images, and masks of the drawn ones; ``draw`` says which. Returns the masks of the others, by name."""
    rng, files = np.random.default_rng([draw, 7]), cohort.files
    drawn, scored = pick(cohort, "train", labelled, rng), pick(cohort, "test", CASES, rng)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for name in (*drawn, *scored):
        shutil.copy(files[name][0], folder / "images" / f"{name}.nii.gz")
    for name in drawn:
        shutil.copy(files[name][1], folder / "masks" / f"{name}.nii.gz")
    return {name: files[name][1] for name in scored}


def by_segment(*changes, program=("-m", "lib.scans")):
    """`make segment`, with settings, or another program that is called alike."""

    def way(folder, hidden, *_):
        words = [sys.executable, *program, folder / "images", folder / "out", "--masks", folder / "masks"]
        words += [word for change in changes for word in ("-S", change)]
        subprocess.run(words, cwd=params.ROOT, check=True)
        return {name: labels_in(folder / "out" / f"{name}_mask.nii.gz") for name in hidden}

    return way


def by_ants(fuse):
    """ANTs SyN with its defaults: every drawn volume is registered to every other one, and the warped masks fused."""

    def way(folder, hidden, values, _):
        atlases, found = drawn_for_ants(folder), {}
        for name in tqdm(hidden, desc="ANTs", unit="case"):
            target = for_ants(folder / "images" / f"{name}.nii.gz")
            found[name] = fuse(target, ants.warp_onto(target, atlases), max(values))
        return found

    return way


def for_ants(file):
    """An ANTs image. Volumes are large enough for ITK's threads."""
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(os.cpu_count())
    return ants.load_ants().image_read(str(file))


def drawn_for_ants(folder):
    """Pairs of ANTs images: every drawn volume and its labels."""
    masks = sorted((folder / "masks").iterdir())
    return [(for_ants(folder / "images" / mask.name), for_ants(mask)) for mask in masks]


def reverse_accuracy(folder, found, values):
    """Reverse classification accuracy of predicted masks (Valindria et al., IEEE TMI 2017), without their truth.

    Every case with its predicted mask is registered by ANTs SyN to every drawn volume. What counts is the mean DSC of
    the classes there, of the drawn volume where it is highest.

    Args:
        folder: of ``write_folder``.
        found: dictionary of case to its predicted labels, an array of the image's shape.
        values: label values of the classes.

    Returns:
        pandas.Series in [0, 1] by case.
    """
    drawn, best = drawn_for_ants(folder), {}
    for name in tqdm(found, desc="reverse accuracy", unit="case"):
        scan = for_ants(folder / "images" / f"{name}.nii.gz")
        case = [(scan, scan.new_image_like(found[name].astype(np.float32)))]
        moved = [ants.warp_onto(image, case)[0][1].numpy().round() for image, _ in drawn]
        best[name] = max(class_scores(one, labels.numpy(), values).mean() for one, (_, labels) in zip(moved, drawn))
    return pd.Series(best, name="reverse")


def by_nnunet(folder, hidden, values, minutes):
    """nnU-Net's 3d_fullres by its default plans, trained as long as `make segment` takes from end to end.

    One network on all drawn cases, without folds; planning and segmenting come on top.
    """
    if minutes is None:
        raise SystemExit("how long nnU-Net trains follows from `make segment`: name that way before it")
    data, scored, out = folder / "raw" / "Dataset001_Own", folder / "scored", folder / "predicted"
    for part in (data / "imagesTr", data / "labelsTr", scored):
        part.mkdir(parents=True)
    for mask in (drawn := sorted((folder / "masks").iterdir())):
        shutil.copy(mask, data / "labelsTr")
        shutil.copy(folder / "images" / mask.name, data / "imagesTr" / f"{stem(mask)}_0000.nii.gz")
    for name in hidden:
        shutil.copy(folder / "images" / f"{name}.nii.gz", scored / f"{name}_0000.nii.gz")
    labels = {"background": 0} | {name: value for value, name in values.items()}
    described = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": len(drawn)}
    (data / "dataset.json").write_text(json.dumps(described | {"file_ending": ".nii.gz"}))
    places = {f"nnUNet_{part}": str(folder / part) for part in ("raw", "preprocessed", "results")}
    places |= {"nnUNet_extTrainer": str(Path(__file__).with_name("nnunet")), "NNUNET_MINUTES": str(minutes)}
    network = "-c 3d_fullres -tr TimedTrainer -device cpu".split()
    for words in (
        ["plan_and_preprocess", "-d", "1", "-c", "3d_fullres", "-np", "2"],
        ["train", "1", "3d_fullres", "all", *network[2:]],
        ["predict", "-d", "1", "-f", "all", *network, "-i", scored, "-o", out],
    ):
        command = Path(sys.executable).with_name(f"nnUNetv2_{words[0]}")
        subprocess.run([command, *words[1:]], env=os.environ | places, check=True)
    return {name: labels_in(out / f"{name}.nii.gz") for name in hidden}


def stem(file):
    return file.name.removesuffix(".nii.gz")


# Half of the default's steps: measured rows on volumes are of these.
SHORT = "folder.space=volumes", "volumes.training.steps=1000"
WAYS = {
    "make segment": by_segment(),
    "make segment, bcp": by_segment("folder.method=bcp"),
    "make segment, fs+elastic": by_segment("folder.method=fs+elastic"),
    "make segment, slices": by_segment("folder.space=slices", "folder.size=64"),
    "make segment, slices, bcp": by_segment("folder.space=slices", "folder.size=64", "folder.method=bcp"),
    "make segment, whole scans": by_segment("folder.region=whole"),
    "make segment, views, fs+elastic": by_segment("folder.space=views", "folder.method=fs+elastic"),
    "make segment, volumes": by_segment("folder.space=volumes"),
    "make segment, volumes, bcp": by_segment(*SHORT, "folder.method=bcp"),
    "make segment, volumes, 1,000 steps": by_segment(*SHORT),
    "make segment, volumes, fs+elastic": by_segment(*SHORT, "folder.method=fs+elastic"),
    "make segment, joint+": by_segment("folder.method=joint+", SHORT[1]),
    "make segment, volumes, joint+": by_segment(*SHORT, "folder.method=joint+"),
    "ANTs SyN, majority vote": by_ants(ants.majority),
    "ANTs SyN, joint label fusion": by_ants(ants.joint_fusion),
    "MONAI U-Net": by_segment(*SHORT, "folder.method=fs+elastic", program=[MONAI]),
    "nnU-Net": by_nnunet,
}
OURS = "make segment", "make segment, bcp", "make segment, volumes, 1,000 steps"


def labels_in(file):
    return np.asarray(nib.load(file).dataobj).round()


def scores_of(found, hidden, values):
    """DSC of every class and of the foreground, by case."""
    rows = []
    for name, file in hidden.items():
        truth = labels_in(file)
        foreground = class_scores(found[name] > 0, truth > 0, [True])
        rows.append([*class_scores(found[name], truth, values), *foreground])
    return pd.DataFrame(rows, columns=[*values.values(), "foreground"], index=list(hidden))


def class_scores(labels, truth, values):
    """DSC of every label value, array ``(values,)`` in [0, 1]; ``labels`` and ``truth`` are arrays of one shape."""
    masks = [torch.as_tensor(np.stack([each == value for value in values]))[None] for each in (labels, truth)]
    return dice(*masks)[0].numpy()


def trust_of(cases):
    """How well confidence foretells the DSC: mean absolute error, rank correlation, and AUROC for masks below BAD.

    Where there are intervals: the share of the cases whose DSC lies in theirs, and their mean width. Where there is
    reverse accuracy: its mean absolute error and rank correlation.

    Args:
        cases: see foretold; of a way that writes no cases.csv nothing is said.
    """
    dsc, bad, reverse = cases["dsc"], cases["dsc"] < BAD, {}
    if "reverse" in cases:
        reverse["reverse_error"] = (cases["reverse"] - dsc).abs().mean()
        reverse["reverse_spearman"] = cases["reverse"].corr(dsc, "spearman")
    if "confidence" not in cases:
        return reverse
    confidence = cases["confidence"]
    found = {"predicted_error": (cases["predicted_dsc"] - dsc).abs().mean()}
    found["spearman"] = confidence.corr(dsc, "spearman")
    if 0 < bad.sum() < len(bad):
        larger = stats.mannwhitneyu(confidence[~bad], confidence[bad]).statistic
        found["auroc_bad"] = larger / (bad.sum() * (~bad).sum())
    if cases["predicted_low"].notna().any():
        low, high = cases["predicted_low"], cases["predicted_high"]
        found |= {"in_interval": dsc.between(low, high).mean(), "interval_width": (high - low).mean()}
    return found | reverse


def foretold(file, dsc):
    """What cases.csv foretells of every case, if the way has written one, beside the true ``dsc``.

    Args:
        dsc: pandas.Series of case to true DSC.
    """
    table = dsc.rename("dsc").rename_axis("case").to_frame()
    if not file.exists():
        return table
    return table.join(pd.read_csv(file).set_index("case").loc[dsc.index, FORETOLD])


def mean_of_kept(order, dsc):
    """Mean DSC of the masks with the largest ``order``: of the first, of the first two, and so on to all."""
    ranked = np.asarray(dsc)[np.argsort(-np.asarray(order), kind="stable")]
    return ranked.cumsum() / np.arange(1, len(ranked) + 1)


def risk_coverage(cases):
    """Figure: mean DSC of the masks that are kept where the least confident are set aside; a panel for every run."""
    runs = list(cases.dropna(subset="confidence").groupby(["method", "n_labelled", "draw"], sort=False))
    figure, axes = plt.subplots(1, len(runs), figsize=(4.2 * len(runs), 3.4), squeeze=False, sharey=True)
    for ax, ((method, labelled, draw), run) in zip(axes[0], runs):
        kept = 100 * np.arange(1, len(run) + 1) / len(run)
        for order, colour, name in (("confidence", "#1f77b4", "by confidence"), ("dsc", "#999999", "by the true DSC")):
            ax.plot(kept, mean_of_kept(run[order], run["dsc"]), color=colour, label=name)
        ax.axhline(run["dsc"].mean(), color="black", linestyle=":", label="at random")
        ax.set(xlabel="masks that are kept (%)", title=f"{method}, {labelled} drawn, draw {draw}")
    axes[0, 0].set_ylabel("their mean DSC")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def ours_took(table, labelled, draw):
    """Minutes of `make segment` with its defaults on the same cases, None if they have not been measured."""
    if table.empty:
        return None
    same = (table["n_labelled"] == labelled) & (table["draw"] == draw) & (table["method"] == OURS[0])
    return next(iter(table.loc[same, "minutes"].dropna()), None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", default=list(OURS), help=f"some of: {'; '.join(WAYS)}")
    parser.add_argument("--labelled", type=int, nargs="*", default=[5])
    parser.add_argument("--draws", type=int, nargs="*", default=[1])
    parser.add_argument("--cohort", choices=COHORTS, default="hippocampus3d")
    parser.add_argument("--table", default="own", help="its name: figures of another machine belong in another table")
    parser.add_argument(
        "--trust", action="store_true", help="keep single cases too, and draw what confidence says of them"
    )
    parser.add_argument("--reverse", action="store_true", help="reverse classification accuracy too, by ANTs")
    given = parser.parse_args()
    if unknown := set(given.ways) - set(WAYS):
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(WAYS)}")
    cohort = COHORTS[given.cohort]()
    results = params.output_root() / "results" / given.cohort
    results.mkdir(parents=True, exist_ok=True)
    table, cases = (Kept(results / f"{given.table}{part}.csv") for part in ("", "_cases"))
    for labelled, draw, name in product(given.labelled, given.draws, given.ways):
        run = {"method": name, "n_labelled": labelled, "draw": draw}
        row, found = measure(cohort, name, labelled, draw, ours_took(table.rows, labelled, draw), given.reverse)
        table.replace(run, pd.DataFrame([row]))
        if given.trust or cases.file.exists():
            cases.replace(run, found.reset_index())
        print(run | row, flush=True)
    rows = table.rows.round(3).astype(object).fillna("").to_dict("records")
    table.file.with_suffix(".md").write_text(as_markdown(rows))
    if "confidence" in cases.rows:
        risk_coverage(cases.rows).savefig(results / f"{given.table}_trust.png", dpi=110)


def measure(cohort, name, labelled, draw, minutes, reverse=False):
    """One run of a way: (a row of the table, as a dictionary; see foretold, of every scored case).

    Args:
        cohort: Cohort.
        name: one of WAYS.
        labelled, draw: how many cases are drawn, and which.
        minutes: that `make segment` takes, if that is known.
        reverse: whether ``reverse_accuracy`` is wanted.
    """
    with tempfile.TemporaryDirectory() as folder:
        hidden = write_folder(Path(folder), cohort, labelled, draw)
        began = time.monotonic()
        found = WAYS[name](Path(folder), hidden, cohort.values, minutes)
        took = (time.monotonic() - began) / 60
        scores = scores_of(found, hidden, cohort.values)
        cases = foretold(Path(folder) / "out" / "cases.csv", scores[list(cohort.values.values())].mean(axis=1))
        if reverse:
            cases = cases.join(reverse_accuracy(Path(folder), found, cohort.values))
    row = {"n_scored": len(hidden), "dsc_mean": cases["dsc"].mean(), "dsc_worst": cases["dsc"].min()}
    return row | {**scores.mean(), "minutes": took} | trust_of(cases), cases


class Kept:
    """A table on disk, in which a run replaces what an earlier one of the same kind has left.

    Args:
        file: CSV, written anew by every ``replace``. Its content is ``rows``, a pandas.DataFrame.
    """

    def __init__(self, file):
        self.file = file
        self.rows = pd.read_csv(file) if file.exists() else pd.DataFrame()

    def replace(self, run, rows):
        """Put ``rows`` in the place of those of ``run``, a dictionary of columns that identify it."""
        others = self.rows
        if len(others):
            others = others[~np.logical_and.reduce([others[column] == value for column, value in run.items()])]
        rows = pd.DataFrame({**{column: [value] * len(rows) for column, value in run.items()}, **rows})
        self.rows = pd.concat([others, rows]).sort_values(["n_labelled", "draw"], kind="stable").round(4)
        self.rows.to_csv(self.file, index=False)


if __name__ == "__main__":
    main()
