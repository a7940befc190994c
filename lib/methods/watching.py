"""What a method of recipe `strong` is worth while it learns: DSC of the test images, for the figure of time to quality.

The averaged network is looked at twenty times during training. What is seen is noted and chooses nothing.
"""

import json

import pandas as pd
import torch

from lib.methods import table
from lib.methods.pretraining import segment
from lib.metrics import dice, harden

STAGES = "segmentation", "elastic", "bcp", "joint_plus"  # that are watched: a baseline, the best peer, and ours


def watcher(experiment, stage):
    """What to make ``experiment.watch``: DSC of the test images by a network, a tensor of one number.

    None where setting ``strong.watched`` is false, and for other stages than STAGES.

    Args:
        stage: name of one of methods.table.
    """
    if not experiment.settings.strong.watched or stage not in STAGES:
        return None
    return lambda network: torch.tensor(test_dice(experiment, network))


@torch.no_grad()
def test_dice(experiment, network):
    """Mean DSC over the test subjects, as the contest has it: of a subject's images or volumes, and of all classes."""
    cohort, index = experiment.cohort, experiment.cohort.index("test")
    masks = segment(experiment, network, index)
    if cohort.of_volumes:
        scores = {first: float(dice(seen, truth).mean()) for first, seen, truth in cohort.hard_volumes(masks, index)}
    else:
        scores = dict(enumerate(dice(harden(masks), experiment.data.masks[index]).mean(1).tolist()))
    by_image = pd.Series(scores)
    return float(by_image.groupby(cohort.subjects[index[by_image.index]]).mean().mean())


def rows_of(experiment, stage):
    """What was watched while a stage was trained: a frame with table.COURSE_COLUMNS, without rows where nothing was.

    Minutes are those of all that the method had done by then. Registration counts from the step at which it is needed.
    """
    settings, cabinet = experiment.settings, experiment.cabinet
    of = table.by_stage(stage)
    watched = cabinet.load(stage)["watched"] if stage in STAGES else []
    if not watched:
        return pd.DataFrame(columns=table.COURSE_COLUMNS)
    seconds = lambda name: json.loads(cabinet.cost_file(name).read_text())["seconds"]
    training, needs = settings.strong.training, sum(map(seconds, of.needs("strong")))
    alone = training.steps * settings.strong.get(stage, {}).get("pretraining", 0)
    method = next(method.name for method in table.METHODS if method.stage.name == stage)
    labelled = experiment.cohort.units(experiment.data.labelled.cpu())
    rows = []
    for step, seen in watched:
        took = seconds(stage) * step / training.steps + needs * (step > alone)
        rows.append([method, labelled, settings.seed, step, step * training.batch, took / 60, float(seen)])
    return pd.DataFrame(rows, columns=table.COURSE_COLUMNS)
