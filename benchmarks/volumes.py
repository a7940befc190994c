"""`python benchmarks/volumes.py`: masks of whole volumes from five drawn ones, by `make segment` and by others.

Hippocampus, real MRI: some training subjects are drawn, test subjects are not and are scored. All ways get the same
cases and the same cores. Writes own.csv and own.md to results/hippocampus3d/. Ways that need more than the project does
are left out unless they are named; they need `pip install -r benchmarks/requirements.txt`.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm import tqdm

from lib.cohorts.hippocampus import chosen_cases
from lib.methods import ants
from lib.metrics import dice
from lib.results.tables import as_markdown
from lib.runs import params

CASES = 25  # that are scored
BAD = 0.8  # DSC below which a mask is to be found out
VALUES = {1: "anterior", 2: "posterior"}
SPLIT = params.ROOT / "results" / "hippocampus_centre" / "split.csv"


def pick(part, count, rng):
    """(files of all cases: image and mask, by name; names of ``count`` random ones that are of a part of the split)."""
    with open(SPLIT, newline="") as stream:
        split = {row["subject"]: row["split"] for row in csv.DictReader(stream)}
    files, _ = chosen_cases(params.load("strong", "hippocampus3d").hippocampus3d)
    return files, rng.permutation(sorted(name for name in files if split.get(name) == part))[:count]


def write_folder(folder, labelled, draw):
    """Images, and masks of the drawn ones; ``draw`` says which. Returns the masks of the others, by name."""
    rng = np.random.default_rng([draw, 7])
    (_, drawn), (files, scored) = pick("train", labelled, rng), pick("test", CASES, rng)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for name in (*drawn, *scored):
        shutil.copy(files[name][0], folder / "images" / f"{name}.nii.gz")
    for name in drawn:
        shutil.copy(files[name][1], folder / "masks" / f"{name}.nii.gz")
    return {name: files[name][1] for name in scored}


def by_segment(*changes):
    """`make segment`, with settings."""

    def way(folder, hidden):
        words = [sys.executable, "-m", "lib.scans", folder / "images", folder / "out", "--masks", folder / "masks"]
        words += [word for change in changes for word in ("-S", change)]
        subprocess.run(words, cwd=params.ROOT, check=True)
        return {name: labels_in(folder / "out" / f"{name}_mask.nii.gz") for name in hidden}

    return way


def by_ants(fuse):
    """ANTs SyN with its defaults: every drawn volume is registered to every other one, and the warped masks fused."""

    def way(folder, hidden):
        os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(os.cpu_count())
        image = lambda file: ants.load_ants().image_read(str(file))
        atlases = [(image(folder / "images" / mask.name), image(mask)) for mask in sorted((folder / "masks").iterdir())]
        found = {}
        for name in tqdm(hidden, desc="ANTs", unit="case"):
            target = image(folder / "images" / f"{name}.nii.gz")
            found[name] = fuse(target, ants.warp_onto(target, atlases), max(VALUES))
        return found

    return way


WAYS = {
    "make segment": by_segment(),
    "make segment, bcp": by_segment("folder.method=bcp"),
    "make segment, fs+elastic": by_segment("folder.method=fs+elastic"),
    "make segment, slices": by_segment("folder.space=slices", "folder.size=64"),
    "make segment, slices, bcp": by_segment("folder.space=slices", "folder.size=64", "folder.method=bcp"),
    "make segment, views, fs+elastic": by_segment("folder.space=views", "folder.method=fs+elastic"),
    "make segment, volumes": by_segment("folder.space=volumes"),
    "make segment, volumes, bcp": by_segment("folder.space=volumes", "folder.method=bcp"),
    "make segment, volumes, fs+elastic": by_segment("folder.space=volumes", "folder.method=fs+elastic"),
    "make segment, joint+": by_segment("folder.method=joint+"),
    "make segment, volumes, joint+": by_segment("folder.space=volumes", "folder.method=joint+"),
    "ANTs SyN, majority vote": by_ants(ants.majority),
    "ANTs SyN, joint label fusion": by_ants(ants.joint_fusion),
}
OURS = "make segment", "make segment, bcp", "make segment, volumes"


def labels_in(file):
    return np.asarray(nib.load(file).dataobj).round()


def scores_of(found, hidden):
    """DSC of every class and of the foreground, by case."""
    rows = []
    for name, file in hidden.items():
        truth = labels_in(file)
        masks = [  # of type bool, since the foreground overlaps the classes
            torch.as_tensor(np.stack([each == v for v in VALUES] + [each > 0]))[None] for each in (found[name], truth)
        ]
        rows.append(dice(*masks)[0].tolist())
    return pd.DataFrame(rows, columns=[*VALUES.values(), "foreground"], index=list(hidden))


def trust_of(cases, dsc):
    """How well cases.csv foretells the DSC: mean absolute error, rank correlation, and AUROC for masks below BAD.

    Args:
        cases: file; of a way that writes none nothing is said.
        dsc: pandas.Series of case to true DSC.
    """
    if not cases.exists():
        return {}
    table = pd.read_csv(cases).set_index("case").loc[dsc.index]
    confidence, bad = table["confidence"], dsc < BAD
    found = {"predicted_error": (table["predicted_dsc"] - dsc).abs().mean()}
    found["spearman"] = confidence.corr(dsc, "spearman")
    if 0 < bad.sum() < len(bad):
        larger = stats.mannwhitneyu(confidence[~bad], confidence[bad]).statistic
        found["auroc_bad"] = larger / (bad.sum() * (~bad).sum())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", default=list(OURS), help=f"some of: {'; '.join(WAYS)}")
    parser.add_argument("--labelled", type=int, nargs="*", default=[5])
    parser.add_argument("--draws", type=int, nargs="*", default=[1])
    given = parser.parse_args()
    if unknown := set(given.ways) - set(WAYS):
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(WAYS)}")
    results = params.output_root() / "results" / "hippocampus3d"
    results.mkdir(parents=True, exist_ok=True)
    table = pd.read_csv(results / "own.csv") if (results / "own.csv").exists() else pd.DataFrame()
    for labelled in given.labelled:
        for draw in given.draws:
            for name in given.ways:
                with tempfile.TemporaryDirectory() as folder:
                    hidden = write_folder(Path(folder), labelled, draw)
                    began = time.monotonic()
                    found = WAYS[name](Path(folder), hidden)
                    minutes = (time.monotonic() - began) / 60
                    scores = scores_of(found, hidden)
                    classes = scores[list(VALUES.values())].mean(axis=1)
                    trust = trust_of(Path(folder) / "out" / "cases.csv", classes)
                row = {"method": name, "n_labelled": labelled, "draw": draw, "n_scored": len(hidden)}
                row |= {"dsc_mean": classes.mean(), "dsc_worst": classes.min(), **scores.mean(), "minutes": minutes}
                row |= trust
                own = ["method", "n_labelled", "draw"]
                table = pd.concat([table, pd.DataFrame([row])]).drop_duplicates(own, keep="last").sort_values(own[1:])
                table.round(4).to_csv(results / "own.csv", index=False)
                print(row, flush=True)
    (results / "own.md").write_text(as_markdown(table.round(3).astype(object).fillna("").to_dict("records")))


if __name__ == "__main__":
    main()
