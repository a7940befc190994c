"""`python -m lib.grid`: experiments at further rates, with further seeds and variants, several at a time.

Runs the notebooks through papermill for every item of params.yaml's section ``grid`` that has no results yet, or
results of other settings or code. A killed run started again goes on with the items, and within them with the
steps, that are missing; an item that fails is reported and does not stop the others.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tqdm import tqdm

from lib import params
# What a variant may change, and the notebook that has to run again.
VARIED = {"coverage": "02_pretrain_segmentation", "joint_plus": "06_joint_plus", "cctr": "07_cctr"}


class Item(NamedTuple):
    """One experiment of the grid."""

    recipe: str
    rate: float
    seed: int
    variant: str = ""

    @property
    def name(self):
        parts = self.recipe, f"{self.rate:g}", f"seed_{self.seed}", self.variant.replace(" ", "_")
        return "-".join(filter(None, parts))


def groups_of(settings):
    """Items that share a registration network, as lists: recipe and seed are the same, rates and variants differ.

    Variants run at the first rate. What the pipeline runs anyway, at its own rate and seed, is left out. The main
    recipe comes before the baseline.
    """
    grid = settings.grid
    groups = []
    for recipe, seed in itertools.product(reversed(params.recipes(settings)), grid.seeds):
        items = [Item(recipe, rate, seed) for rate in grid.rates if (rate, seed) != (settings.rate, settings.seed)]
        if recipe == settings.recipe:
            items += [Item(recipe, grid.rates[0], seed, variant) for variant in grid.variants]
        if items:
            groups.append(items)
    return groups


def notebooks_of(item, settings):
    """The notebooks that make an item, in order. At 100 % there is nothing unlabelled: fs is all there is."""
    if item.variant:
        own = params.load(item.recipe, settings.cohort, item.rate, item.seed, item.variant)
        changed = [notebook for section, notebook in VARIED.items() if own[section] != settings[section]]
        if "02_pretrain_segmentation" in changed:  # other images are labelled
            changed.append("06_joint_plus")
        return [*changed, "08_evaluation"]
    if item.rate == 100:
        return ["02_pretrain_segmentation", "08_evaluation"]
    plus = ["06_joint_plus"] if item.recipe == settings.recipe else []
    plus += ["07_cctr"] if item.recipe in settings.cctr.recipes else []
    return ["02_pretrain_segmentation", "03_pretrain_registration", "04_joint_training", "05_mean_teacher", *plus,
            "08_evaluation"]


def folder_of(item, settings):
    """Where the item's results lie."""
    return params.output_root() / "results" / "grid" / settings.cohort / item.name


def key_of(item, settings):
    """Fingerprint of everything that the item's results depend on."""
    from lib.experiment import CCTR, JOINT_PLUS, MEAN_TEACHER, NUMERICS  # not above: an empty grid needs no torch

    own = params.load(item.recipe, settings.cohort, item.rate, item.seed, item.variant)
    ran = set(notebooks_of(item, settings))
    unused = {"joint_plus": "06_joint_plus", "cctr": "07_cctr"}
    others = {"grid", "baseline", *(section for section, notebook in unused.items() if notebook not in ran),
              *params.CHOICES["cohort"]} - {settings.cohort}
    relevant = {key: value for key, value in own.items() if key not in others}
    names = [NUMERICS, MEAN_TEACHER, *([JOINT_PLUS] if "06_joint_plus" in ran else []),
             *([CCTR] if "07_cctr" in ran else [])]
    return params.fingerprint(relevant, *names)


def is_done(item, settings):
    """Whether the item's results are there, from these settings and this code."""
    marker = folder_of(item, settings) / "fingerprint"
    return marker.exists() and marker.read_text().strip() == key_of(item, settings)


def run(item, settings, threads):
    """Run the item's notebooks.

    Raises:
        RuntimeError: a notebook failed; the message names the executed copy that holds its traceback.
    """
    folder, key = folder_of(item, settings), key_of(item, settings)
    shutil.rmtree(folder, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    chosen = {"cohort": settings.cohort, "recipe": item.recipe, "rate": item.rate, "seed": item.seed}
    for notebook in notebooks_of(item, settings):
        values = dict(chosen)
        if item.variant:
            values["variant"] = item.variant
        if notebook == "08_evaluation":
            values |= {"destination": str(folder), "classical": item.recipe == "paper" and item.rate < 100}
        executed = params.work_folder("notebooks", "grid", settings.cohort, item.name, f"{notebook}.ipynb")
        pairs = [part for name, value in values.items() for part in ("-p", name, json.dumps(value))]
        command = [sys.executable, "-m", "lib.notebooks", "run", notebook, "--to", str(executed), *pairs]
        done = subprocess.run(command, env=environment, cwd=params.ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{item.name}: {executed} failed\n{done.stderr[-2000:]}")
    (folder / "fingerprint").write_text(key + "\n")


def main():
    """Run all missing items; the exit status is 1 where some failed."""
    settings = params.load()
    groups = groups_of(settings)
    missing = [[item for item in group if not is_done(item, settings)] for group in groups]
    total = sum(map(len, groups))
    (params.output_root() / "results" / "grid" / settings.cohort).mkdir(parents=True, exist_ok=True)
    workers = max(1, min(settings.grid.workers, len(groups)))
    threads = max(1, (os.cpu_count() or 1) // workers)
    failures = []
    done = total - sum(map(len, missing))
    with tqdm(total=total, initial=done, desc=f"grid of {settings.cohort}", unit="item") as bar:

        def work(group):
            for item in group:
                try:
                    run(item, settings, threads)
                except RuntimeError as error:
                    failures.append(str(error))
                    tqdm.write(str(error), file=sys.stderr)
                bar.set_postfix_str(item.name)
                bar.update()

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, filter(None, missing)))
    if failures:
        print(f"{len(failures)} of {total} items failed; run again to try them again", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
