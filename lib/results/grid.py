"""`python -m lib.results.grid`: experiments at further rates, with further seeds and variants, several at a time.

Runs the notebooks through papermill for every item of params.yaml's section ``grid`` that has no results yet, or
results of other settings or code. A killed run that is started again goes on with the missing items, and within an
item with the missing steps. An item that fails is reported and does not stop the others.
"""

import argparse
import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tqdm import tqdm

from lib.methods import table
from lib.runs import params, versions
from lib.runs.cabinet import PAIRS, Cabinet

EVALUATION = "08_evaluation"
FIRST = ("joint_plus", "cctr")  # stages whose versions have a place in every item's key, whether they run or not


class Item(NamedTuple):
    """One experiment of the grid."""

    recipe: str
    rate: float
    seed: int
    variant: str = ""
    stage: str = ""  # of recipe `fair`, whose stages are items by themselves

    @property
    def name(self):
        parts = self.recipe, self.stage, f"{self.rate:g}", f"seed_{self.seed}", self.variant.replace(" ", "_")
        return "-".join(filter(None, parts))


def groups_of(settings):
    """Items that share a registration network, as lists: recipe and seed are the same, rates and variants differ.

    Variants run at the first rate. If no rates or seeds are named, they are the pipeline's own. What the pipeline runs
    anyway, at its own rate and seed, is left out. The main recipe comes before the baseline.
    """
    rates, seeds = settings.grid.rates or [settings.rate], settings.grid.seeds or [settings.seed]
    groups = []
    for recipe, seed in itertools.product(reversed(params.recipes(settings)), seeds):
        items = [Item(recipe, rate, seed) for rate in rates if (rate, seed) != (settings.rate, settings.seed)]
        if recipe == settings.recipe:
            items += [Item(recipe, rates[0], seed, variant) for variant in settings.grid.variants]
        if items:
            groups.append(items)
    return groups


def contest_of(settings):
    """As ``groups_of``, the items of section ``contest``: recipe ``fair``, one method each, a group per seed."""
    groups = {}
    for part in settings.contest.methods[settings.cohort]:
        of = range(1, part.draws + 1), part.rates, part.stages, part.get("variants", [""])
        for seed, rate, stage, variant in itertools.product(*of):
            groups.setdefault(seed, []).append(Item("fair", rate, seed, variant, stage))
    return [groups[seed] for seed in sorted(groups)]


def stages_of(item, settings):
    """Stages of methods.table that make an item, in order. At 100 % nothing is unlabelled: only the baseline runs.

    A variant begins with the pre-training that it shares with the others; if that is done, it is only loaded.
    """
    if item.stage:
        (stage,) = (stage for stage in table.stages() if stage.name == item.stage)
        return [*[table.REGISTRATION] * (table.REGISTRATION.name in stage.after), stage]
    changed = ()
    if item.variant:
        own = params.load(item.recipe, settings.cohort, item.rate, item.seed, item.variant)
        changed = [section for section in own.varied if own[section] != settings[section]]
    return table.stages_of(settings, item.recipe, item.rate, changed)


def notebooks_of(item, settings):
    """The notebooks that make an item, in order."""
    fair = item.recipe == "fair"
    trained = [table.FAIR if fair and stage.peer else stage.notebook for stage in stages_of(item, settings)]
    return [*trained, EVALUATION]


def folder_of(item, settings):
    """Where the item's results lie."""
    return params.output_root() / "results" / "grid" / settings.cohort / item.name


def key_of(item, settings):
    """Fingerprint of what the item's results depend on: settings, split and the code's names.

    The folder of the data does not count, since the split names every slice. Nor do the device and the precision that
    ``auto`` gives on it: results from one machine are valid on another.
    """
    own = params.load(item.recipe, settings.cohort, item.rate, item.seed, item.variant)
    if item.stage:
        return fair_key(item, own)
    ran = stages_of(item, settings)
    sections = {section for stage in table.stages() for section in stage.sections}
    read = {section for stage in ran for section in stage.sections}
    others = {
        "grid",
        "contest",
        "baseline",
        "device",
        "varied",
        "fair",
        *(sections - read),
        *params.CHOICES["cohort"],
    } - {settings.cohort}
    relevant = {key: value for key, value in own.items() if key not in others}
    relevant[settings.cohort] = content_of(own[settings.cohort])
    for whole, part in (section.split(".") for section in read if "." in section):
        if whole not in read:  # all that is read of it
            relevant[whole] = {part: own[whole][part]}
    of_volumes = [versions.VOLUMES, versions.VOLUME_EVALUATION] if settings.cohort in params.VOLUME_COHORTS else []
    named = {stage.name: stage.version for stage in ran if stage.version}
    first = [named.pop(name, False) for name in FIRST]
    return versions.fingerprint(
        relevant,
        split_of(settings),
        versions.NUMERICS,
        versions.MEAN_TEACHER,
        versions.EVALUATION,
        *first,
        *of_volumes,
        *sorted(named.values()),
    )


def content_of(cohort):
    """Settings of a cohort that its images depend on; ``external`` where there is one."""
    return {name: value for name, value in cohort.items() if name != "folder" and (name != "external" or value)}


def fair_key(item, own):
    """``key_of`` an item of recipe `fair`, which is of one stage: nothing that others read is in it."""
    read = ["recipe", "rate", "seed", "split_seed", "scale", "precision"]
    parts = ["training", "augmentation", item.stage]
    relevant = {name: own[name] for name in read}
    relevant[own.cohort] = content_of(own[own.cohort])
    registered = table.REGISTRATION in stages_of(item, own)
    if registered:
        relevant |= {"registration": own.registration, "refinement": own.joint_plus.refinement}
        parts.append("pairs")
    relevant["fair"] = {part: own.fair[part] for part in parts if part in own.fair}
    relevant["normalisation"] = own.segmentation.normalisation
    of_volumes = [versions.VOLUMES, versions.VOLUME_EVALUATION] if own.cohort in params.VOLUME_COHORTS else []
    return versions.fingerprint(
        relevant, split_of(own), versions.FAIR, versions.EVALUATION, registered and versions.NUMERICS, *of_volumes
    )


def split_of(settings):
    """Digest of which slice of which subject is in which split; None before the cohort has been made."""
    file = params.output_root() / "results" / settings.cohort / "split.csv"
    if not file.exists():
        return None
    with open(file, newline="") as stream:
        rows = [(row["slice"], row["subject"], row["split"]) for row in csv.DictReader(stream)]
    return versions.fingerprint(rows)


def is_done(item, settings):
    """Whether the item's results are there, from these settings and this code."""
    marker = folder_of(item, settings) / "item.json"
    return marker.exists() and json.loads(marker.read_text())["key"] == key_of(item, settings)


def finished(settings):
    """Folders of all items whose results are of these settings and this code; the others are named and left out."""
    found = []
    for marker in sorted((params.output_root() / "results" / "grid" / settings.cohort).glob("*/item.json")):
        saved = json.loads(marker.read_text())
        try:
            item = Item(**{name: saved[name] for name in Item._fields if name in saved})
            done = saved["key"] == key_of(item, settings)
        except ValueError:  # a variant that params.yaml no longer has
            done = False
        if done:
            found.append(marker.parent)
        else:
            print(f"{marker.parent} is of other settings or code: left out, run the grid again")
    return found


def cost_of(item, cohort):
    """What the training of one method took: dictionary of minutes, device and threads; empty for an item of several.

    Pre-training and registering pairs count where the method needs them.
    """
    if not item.stage:
        return {}
    (stage,) = (stage for stage in table.stages() if stage.name == item.stage)
    cabinet = Cabinet(params.load(item.recipe, cohort, item.rate, item.seed, item.variant), None)
    files = [cabinet.cost_file(name) for name in [*stage.after, *[PAIRS] * bool(stage.after), stage.name]]
    costs = [json.loads(file.read_text()) for file in files]
    return {"minutes": round(sum(cost["seconds"] for cost in costs) / 60, 1), "device": costs[-1]["device"]}


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
        if item.stage and notebook in (table.FAIR, EVALUATION):
            values["stage"] = item.stage
        if notebook == EVALUATION:  # untrained methods, which have no recipe, run beside one of them
            untrained = item.recipe == settings.baseline and item.rate < 100 and not item.variant and not item.stage
            values |= {"destination": str(folder), "untrained": untrained}
        executed = params.work_folder("notebooks", "grid", settings.cohort, item.name, f"{notebook}.ipynb")
        pairs = [part for name, value in values.items() for part in ("-p", name, json.dumps(value))]
        command = [sys.executable, "-m", "lib.runs.notebooks", "run", notebook, "--to", str(executed), *pairs]
        done = subprocess.run(command, env=environment, cwd=params.ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{item.name}: {executed} failed\n{done.stderr[-2000:]}")
    (folder / "item.json").write_text(
        json.dumps({**item._asdict(), "key": key, **cost_of(item, settings.cohort)}) + "\n"
    )


def main(arguments=()):
    """Run all missing items, those of the command line's ``arguments``; the exit status is 1 where some failed."""
    parser = argparse.ArgumentParser(prog="python -m lib.results.grid", description=__doc__.splitlines()[0])
    parser.add_argument("--contest", metavar="COHORT", help="the items of section `contest` for this cohort")
    contest = parser.parse_args(arguments).contest
    settings = params.load(cohort=contest)
    groups = contest_of(settings) if contest else groups_of(settings)
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
    sys.exit(main(sys.argv[1:]))
