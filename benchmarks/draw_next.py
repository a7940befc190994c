"""`python benchmarks/draw_next.py`: five further masks, drawn where `cases.csv` says or anywhere.

Hippocampus volumes, real MRI, as a user has them. Of some training subjects five are drawn, at random. A network is
trained, five more cases are drawn, another network is trained with ten. It is scored on test subjects, which are not in
the folder. The five more are chosen by `draw_next`, at random, or by confidence alone. Writes draw_next.csv and
draw_next.md to results/hippocampus3d/; draws that are there already are kept.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from volumes import hippocampus, labels_in, pick, scores_of

from lib.results.tables import as_markdown
from lib.runs import params

POOL, DRAWN, MORE, SCORED = 40, 5, 5, 25
CHANGES = "folder.method=fs+elastic", "folder.space=volumes", "volumes.training.steps=250"  # there are many to train
RULES = {
    "draw_next": lambda table, rng: table.sort_values("draw_next"),
    "random": lambda table, rng: table.iloc[rng.permutation(len(table))],
    "least confident": lambda table, rng: table.sort_values("confidence"),
}


def segment(images, output, *words):
    """cases.csv of a run of `make segment`."""
    command = [sys.executable, "-m", "lib.scans", images, output, *words]
    subprocess.run([*command, *(word for change in CHANGES for word in ("-S", change))], cwd=params.ROOT, check=True)
    return pd.read_csv(output / "cases.csv").set_index("case")


def dsc_after(folder, masks, output, hidden, values):
    """(mean DSC of the test cases in ``test`` by a network trained on ``masks``, cases.csv of the training folder).

    Args:
        hidden: masks of the test cases by name.
        values: of every class, see volumes.Cohort.
    """
    table = segment(folder / "images", output, "--masks", masks)
    segment(folder / "test", output / "test", "--model", output / "model.safetensors")
    found = {name: labels_in(output / "test" / f"{name}_mask.nii.gz") for name in hidden}
    return scores_of(found, hidden, values)[list(values.values())].to_numpy().mean(), table


def one_draw(folder, draw):
    """Rows of the table: DSC after five masks, and after five more by each rule."""
    rng = np.random.default_rng([draw, 11])
    cohort = hippocampus()
    files, pool, test = cohort.files, pick(cohort, "train", POOL, rng), pick(cohort, "test", SCORED, rng)
    for part, names in (("images", pool), ("test", test)):
        (folder / part).mkdir()
        for name in names:
            shutil.copy(files[name][0], folder / part / f"{name}.nii.gz")
    hidden = {name: files[name][1] for name in test}

    def draw_masks(rule, names):
        (folder / rule).mkdir()
        for name in names:
            shutil.copy(files[name][1], folder / rule / f"{name}.nii.gz")
        return dsc_after(folder, folder / rule, folder / f"out {rule}", hidden, cohort.values)

    before, table = draw_masks("first", pool[:DRAWN])
    rows = [{"rule": "five masks", "draw": draw, "dsc": before}]
    free = table.loc[pool[DRAWN:]]
    for rule, ordered in RULES.items():
        chosen = [*pool[:DRAWN], *ordered(free, rng).index[:MORE]]
        rows.append({"rule": rule, "draw": draw, "dsc": draw_masks(rule, chosen)[0]})
    return rows


def summary(table):
    """Mean DSC by rule over the draws, the gain over five masks, and that over five more at random."""
    wide = table.pivot(index="draw", columns="rule", values="dsc")
    rows = []
    for rule in ["five masks", *RULES]:
        row = {"masks": "5" if rule == "five masks" else "5 + 5", "chosen by": rule if rule in RULES else ""}
        row |= {"draws": len(wide), "DSC": f"{wide[rule].mean():.3f}"}
        if rule in RULES:
            row["gain over five"] = f"{(wide[rule] - wide['five masks']).mean():+.3f}"
        if rule in RULES and rule != "random":
            gain = wide[rule] - wide["random"]
            row["over random"], row["draws in which it is better"] = f"{gain.mean():+.3f}", int((gain > 0).sum())
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=5)
    given = parser.parse_args()
    results = params.output_root() / "results" / "hippocampus3d"
    results.mkdir(parents=True, exist_ok=True)
    file = results / "draw_next.csv"
    table = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=["rule", "draw", "dsc"])
    for draw in range(1, given.draws + 1):
        if draw not in set(table["draw"]):
            with tempfile.TemporaryDirectory() as folder:
                rows = one_draw(Path(folder), draw)
            table = pd.concat([table, pd.DataFrame(rows)]) if len(table) else pd.DataFrame(rows)
            table.round(4).to_csv(file, index=False)
            (results / "draw_next.md").write_text(as_markdown(summary(table)))
            print(pd.DataFrame(rows).to_string(), flush=True)


if __name__ == "__main__":
    main()
