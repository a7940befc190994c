"""`python -m lib.results.grid`: experiments at further rates, with further seeds and variants, several at a time.

Runs the notebooks through papermill for every item that has no results yet, or results of other settings or code: of
params.yaml's section ``grid``, P1's methods by its own recipe, or with ``--contest`` of section ``contest``. A killed
run that is started again goes on with the missing items, and within an item with the missing steps. An item that fails
is reported and does not stop the others. Section ``cluster`` says where items run, see runs.cluster.
"""

import argparse
import csv
import itertools
import json
import os
import shutil
import sys
from typing import NamedTuple

from tqdm import tqdm

from lib.methods import table
from lib.runs import cluster, params, versions
from lib.runs.cabinet import Cabinet

EVALUATION = "08_evaluation"


class Item(NamedTuple):
    """One experiment of the grid."""

    recipe: str
    rate: float
    seed: int
    variant: str = ""
    stage: str = ""  # of recipe `strong`, whose stages are items by themselves

    @property
    def name(self):
        parts = self.recipe, self.stage, f"{self.rate:g}", f"seed_{self.seed}", self.variant.replace(" ", "_")
        return "-".join(filter(None, parts))


def groups_of(settings):
    """Items that share a registration network, as lists: the seed is the same, rates differ.

    If no rates or seeds are named, they are the pipeline's own. What the pipeline runs anyway, at its own rate and
    seed, is left out.
    """
    rates, seeds = settings.grid.rates or [settings.rate], settings.grid.seeds or [settings.seed]
    groups = []
    for seed in seeds:
        items = [Item("paper", rate, seed) for rate in rates if (rate, seed) != (settings.rate, settings.seed)]
        if items:
            groups.append(items)
    return groups


def contest_of(settings):
    """As ``groups_of``, the items of section ``contest``: recipe ``strong``, one method each, a group per seed."""
    groups = {}
    for part in settings.contest.methods.get(settings.cohort, []):
        of = range(1, part.draws + 1), part.rates, part.stages, part.get("variants", [""])
        for seed, rate, stage, variant in itertools.product(*of):
            groups.setdefault(seed, []).append(Item("strong", rate, seed, variant, stage))
    return [groups[seed] for seed in sorted(groups)]


def stages_of(item):
    """Stages of methods.table that make an item, in order. At 100 % nothing is unlabelled: only the baseline runs."""
    if item.stage:
        stage = table.by_stage(item.stage)
        return [*[table.REGISTRATION] * (table.REGISTRATION.name in stage.after), stage]
    return table.stages_of(item.recipe, item.rate)


def notebooks_of(item):
    """The notebooks that make an item, in order."""
    return list(dict.fromkeys([*(stage.notebook_in(item.recipe) for stage in stages_of(item)), EVALUATION]))


def folder_of(item, settings):
    """Where the item's results lie."""
    return params.output_root() / "results" / "grid" / settings.cohort / item.name


def key_of(item, settings):
    """Fingerprint of what the item's results depend on: settings, split and the code's names.

    The folder of the data does not count, since the split names every slice. Nor do the device and the precision that
    ``auto`` gives on it: results from one machine are valid on another. In the contest all have one precision.
    """
    own = params.load(item.recipe, settings.cohort, item.rate, item.seed, item.variant)
    if item.stage:
        own["precision"] = settings.contest.precision
    read = ["recipe", "rate", "seed", "split_seed", "scale", "precision"]
    relevant = {name: own[name] for name in read} | {own.cohort: content_of(own[own.cohort])}
    if item.stage:
        names, relevant["strong"] = strong_parts(item, own)
    else:
        names = versions.NUMERICS, versions.MEAN_TEACHER
        sections = "segmentation", "registration", "mean_teacher", "joint", "pseudo_masks", "classical"
        relevant |= {name: own[name] for name in sections}
    of_volumes = [versions.VOLUMES, versions.VOLUME_EVALUATION] if own.cohort in params.VOLUME_COHORTS else []
    return versions.fingerprint(relevant, split_of(own), versions.EVALUATION, *names, *of_volumes)


def strong_parts(item, own):
    """What else an item of recipe `strong` depends on, which is of one stage: names of its code, and its settings."""
    stage, strong = table.by_stage(item.stage), own.strong
    if not stage.trained:
        return [stage.name, stage.version], {section: own[section] for section in stage.sections}
    names, parts = [versions.STRONG, stage.version], {"training": strong.training, "augmentation": strong.augmentation}
    parts |= {name: strong[name] for name in (stage.name, *stage.parts) if name in strong}
    parts |= {section: own[section] for section in stage.sections}
    if stage.after:
        names.append(versions.NUMERICS)
        parts["registration"] = own.registration
    if own.selection != "none":
        parts["selection"] = own.selection
    return names, parts


def content_of(cohort):
    """Settings of a cohort that its images depend on; ``external`` where there is one."""
    return {name: value for name, value in cohort.items() if name != "folder" and (name != "external" or value)}


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
    cabinet = Cabinet(params.load(item.recipe, cohort, item.rate, item.seed, item.variant), None)
    files = [cabinet.cost_file(name) for name in [*table.by_stage(item.stage).needs(item.recipe), item.stage]]
    costs = [json.loads(file.read_text()) for file in files]
    return {"minutes": round(sum(cost["seconds"] for cost in costs) / 60, 1), "device": costs[-1]["device"]}


def execute(notebook, item, settings, threads, **values):
    """Run one notebook for an item, in a process of its own.

    Raises:
        RuntimeError: it failed; the message names the executed copy, which holds its traceback, and its log.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if item.stage:
        changes = (
            os.environ.get("JOINT_SET"),
            f"precision={settings.contest.precision}",
            "strong.watched=true" * (not item.variant),
        )
        environment["JOINT_SET"] = ",".join(filter(None, changes))
    values = {"cohort": settings.cohort, "recipe": item.recipe, "rate": item.rate, "seed": item.seed, **values}
    if item.variant:
        values["variant"] = item.variant
    executed = params.work_folder("notebooks", "grid", settings.cohort, item.name, f"{notebook}.ipynb")
    pairs = [part for name, value in values.items() for part in ("-p", name, json.dumps(value))]
    command = [sys.executable, "-m", "lib.runs.notebooks", "run", notebook, "--to", str(executed), *pairs]
    done = cluster.process(command, environment)
    if done.returncode:
        log = executed.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout + done.stderr)
        raise RuntimeError(f"{item.name}: {executed} failed, its log is {log}\n{done.stderr[-2000:]}")


def prepare(item, settings, threads, environment):
    """Pre-train the registration that an item shares with all of its recipe and seed."""
    os.environ.update(environment)
    execute(table.REGISTRATION.notebook, item, settings, threads)


def run(item, settings, threads, environment, ready=None):
    """Run the item's notebooks, but for the registration, which ``prepare`` has trained.

    Args:
        environment: see cluster.shared_environment.
        ready: what ``prepare`` gave; Dask waits for it.

    Returns:
        The files of the item's results by name, for a client that does not share the worker's folder.

    Raises:
        RuntimeError: a notebook failed.
    """
    os.environ.update(environment)
    folder, key = folder_of(item, settings), key_of(item, settings)
    shutil.rmtree(folder, ignore_errors=True)
    for notebook in notebooks_of(item):
        if notebook == table.REGISTRATION.notebook:
            continue
        values = {"stage": item.stage} if item.stage and notebook in (table.PEERS, EVALUATION) else {}
        if notebook == EVALUATION:  # untrained methods, which have no recipe, run beside one of them
            untrained = not table.by_stage(item.stage).trained if item.stage else item.rate < 100
            values |= {"destination": str(folder), "untrained": untrained}
        execute(notebook, item, settings, threads, **values)
    marker = json.dumps({**item._asdict(), "key": key, **cost_of(item, settings.cohort)})
    (folder / "item.json").write_text(marker + "\n")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def keep(item, settings, files):
    """Write an item's results where the worker that made them had another folder than this process."""
    folder = folder_of(item, settings)
    if not is_done(item, settings):
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(files, key="item.json".__eq__):  # the marker, which says that all is there, comes last
            (folder / name).write_bytes(files[name])


def submit(client, groups, settings, threads):
    """Give all items to the workers; those of a group wait for its registration. A dictionary of future to item."""
    futures, given = {}, (settings, threads, cluster.shared_environment())
    for group in groups:
        sharing = [item for item in group if table.REGISTRATION in stages_of(item)]
        ready = client.submit(prepare, sharing[0], *given, pure=False) if sharing else None
        for item in group:
            after = ready if item in sharing else None
            futures[client.submit(run, item, *given, after, pure=False, key=f"{item.name} of {settings.cohort}")] = item
    return futures


def run_missing(groups, settings, bar, patience):
    """Run items on the workers.

    Args:
        groups: as ``groups_of`` gives them.
        bar: progress bar of items.
        patience: see cluster.connect.

    Returns:
        (names of the items that failed; groups of those that were cut off because the scheduler is gone).
    """
    from distributed import as_completed

    workers = max(1, min(settings.grid.workers, sum(map(len, groups))))
    failed, cut_off = [], set()
    with cluster.connect(settings, workers, patience) as client:
        tqdm.write(f"the workers can be watched at {client.dashboard_link}", file=sys.stderr)
        futures = submit(client, filter(None, groups), settings, cluster.threads_of(settings, workers))
        for future in as_completed(futures):
            item = futures[future]
            if future.status in ("cancelled", "lost") and not is_done(item, settings):
                cut_off.add(item)
                continue
            if future.status == "finished":
                keep(item, settings, future.result())
            elif future.status == "error":
                failed.append(item.name)
                tqdm.write(f"{item.name}: {future.exception()}", file=sys.stderr)
            bar.set_postfix_str(item.name)
            bar.update()
    return failed, [[item for item in group if item in cut_off] for group in groups]


def main(arguments=()):
    """Run all missing items, those of the command line's ``arguments``; the exit status is 1 where some failed."""
    parser = argparse.ArgumentParser(prog="python -m lib.results.grid", description=__doc__.splitlines()[0])
    parser.add_argument("--contest", metavar="COHORT", help="the items of section `contest` for this cohort")
    contest = parser.parse_args(arguments).contest
    settings = params.load(cohort=contest)
    groups = contest_of(settings) if contest else groups_of(settings)
    missing = [[item for item in group if not is_done(item, settings)] for group in groups]
    total, left = sum(map(len, groups)), sum(map(len, missing))
    (params.output_root() / "results" / "grid" / settings.cohort).mkdir(parents=True, exist_ok=True)
    if not left:
        print(f"grid of {settings.cohort}: all {total} items are done")
        return 0
    failures, patience = [], 0
    with tqdm(total=total, initial=total - left, desc=f"grid of {settings.cohort}", unit="item") as bar:
        while any(missing):
            failed, missing = run_missing(missing, settings, bar, patience)
            failures += failed
            if any(missing):
                tqdm.write("the scheduler is gone: its items go on as soon as it is back", file=sys.stderr)
                patience = cluster.PATIENCE
    if failures:
        print(f"{len(failures)} of {total} items failed; run again to try them again", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    from lib.results.grid import main as run_all  # by its name, so that workers import what they are given

    sys.exit(run_all(sys.argv[1:]))
