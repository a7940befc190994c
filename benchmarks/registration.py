"""`python benchmarks/registration.py COHORT`: how well one field carries a mask.

MrRegNet beside ANTs and SimpleITK: the same random pairs of test images of different subjects for all, no mask seen by
any. Writes one_warp.csv and one_warp.md to results/<cohort>/: DSC of the warped mask, folding, and seconds per
pair, all on one thread. Needs `pip install -r benchmarks/requirements.txt`.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lib.methods import classical
from lib.methods.experiment import Experiment
from lib.methods.pretraining import pretrain_registration
from lib.metrics import dice
from lib.refinement import refine
from lib.results.tables import as_markdown
from lib.runs import params
from lib.warping import folding, warp

PAIRS = 200
COLUMNS = ["method", "pairs", "dsc_mean", "dsc_median", "dsc_low", "folding", "seconds_per_pair"]


def draw_pairs(cohort, count, seed=0):
    """``count`` pairs of test images of different subjects that show the structure: (sources, targets).

    Of volumes the source is the slice at the target's height.
    """
    rng, pairs = np.random.default_rng(seed), []
    shown = cohort.index("test")[cohort.labels[cohort.index("test")].any(axis=(1, 2))]
    while len(pairs) < count:
        source, target = rng.choice(shown, 2, replace=False)
        if cohort.of_volumes:
            others = shown[cohort.volumes[shown] == cohort.volumes[source]]
            source = others[np.abs(cohort.positions[others] - cohort.positions[target]).argmin()]
        if cohort.subjects[source] != cohort.subjects[target]:
            pairs.append((source, target))
    return np.transpose(pairs)


def by_network(network, source, target, refinement):
    """Fields of all pairs by the network, refined where ``refinement`` is given."""
    with torch.no_grad():
        found = torch.cat([network.register(*part) for part in zip(source.split(50), target.split(50))])
    return refine(found, source, target, refinement) if refinement else found


def by_syn(source, target):
    """The field of one pair by ANTs SyN with its defaults (affine first), in pixels."""
    import ants

    fixed, moving = (ants.from_numpy(np.float32(image)) for image in (target, source))
    found = ants.registration(fixed, moving, type_of_transform="SyN", random_seed=1)
    rows, columns = np.indices(target.shape)
    points = pd.DataFrame({"x": rows.ravel(), "y": columns.ravel()}, dtype=float)  # ANTs calls the first axis x
    come = ants.apply_transforms_to_points(2, points, found["fwdtransforms"])
    for file in {*found["fwdtransforms"], *found["invtransforms"]}:
        Path(file).unlink(missing_ok=True)
    return np.stack([come[axis].to_numpy().reshape(target.shape) for axis in "xy"]) - np.stack((rows, columns))


def by_demons(source, target, settings):
    """The field of one pair by SimpleITK, affine and diffeomorphic Demons, in pixels."""
    found = classical.register(source, target, settings)
    rows, columns = np.indices(target.shape)
    points = [found.TransformPoint((float(x), float(y))) for y, x in zip(rows.ravel(), columns.ravel())]
    x, y = np.transpose(points).reshape(2, *target.shape)
    return np.stack((y - rows, x - columns))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cohort")
    settings = params.load("strong", parser.parse_args().cohort)
    settings["precision"] = settings.contest.precision
    torch.set_num_threads(1)
    experiment = Experiment(settings)
    network, _ = pretrain_registration(experiment)
    network.eval()
    data = experiment.data
    sources, targets = draw_pairs(experiment.cohort, PAIRS)
    source, target = data.images[sources], data.images[targets]
    one_by_one = lambda register: torch.stack(
        [
            torch.as_tensor(np.asarray(register(moving[0].numpy(), fixed[0].numpy()), np.float32))
            for moving, fixed in tqdm(list(zip(source.cpu(), target.cpu())), unit="pair")
        ]
    )
    ways = {
        "none": lambda: torch.zeros(len(source), 2, *source.shape[2:]),
        "MrRegNet": lambda: by_network(network, source, target, None),
        "MrRegNet, refined": lambda: by_network(network, source, target, settings.refinement),
        "SimpleITK, affine and Demons": lambda: one_by_one(lambda *pair: by_demons(*pair, settings.classical)),
        "ANTs SyN": lambda: one_by_one(by_syn),
    }
    rows = []
    for name, register in ways.items():
        began = time.monotonic()
        fields = register()
        seconds = (time.monotonic() - began) / PAIRS
        scores = dice((warp(data.masks[sources], fields) > 0.5).float(), data.masks[targets]).mean(dim=1)
        low = float(scores.quantile(0.05))
        rows.append(
            [name, PAIRS, float(scores.mean()), float(scores.median()), low, float(folding(fields).mean()), seconds]
        )
        print(rows[-1], flush=True)
    table, results = pd.DataFrame(rows, columns=COLUMNS), params.results_folder(settings)
    table.round(4).to_csv(results / "one_warp.csv", index=False)
    said = table.assign(**{"folding": [f"{100 * share:.2f} %" for share in table["folding"]]})
    said = said.rename(columns={"dsc_low": "dsc, 5 % quantile"}).round(3)
    (results / "one_warp.md").write_text(as_markdown(said.to_dict("records")))


if __name__ == "__main__":
    main()
