"""One display over everything that a run on a folder does: how much of it is done, and the time left."""

import math
from contextlib import contextmanager

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

TRAINED = (
    3.5  # times as long as segmenting an image takes training on it: backward pass, averaged network, augmentation
)
PIXEL = 2  # times as long as a voxel of a volume takes a pixel of a slice, whose network has more channels
REGISTERED = 0.7  # of a joint+ training goes to its registration as well
FORMAT = "all: {percentage:3.0f} %|{bar}| {elapsed} passed, {remaining} left; {desc}"
WIDTH = 100  # of the bar in a terminal, with all that stands beside it
IN_NOTEBOOK = issubclass(tqdm, tqdm_notebook)  # where it is a widget, and takes no line from the bars of trainings
SEGMENTING = "segmenting"


class Progress:
    """A bar whose unit is one voxel seen by a network, over all stages of a run. It shows nothing before ``begin``."""

    def __init__(self):
        self.parts, self.stage, self.bar = {}, "", None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()

    def begin(self, parts, stage="", later=0):
        """A stage begins; what the one before it has left undone is no longer waited for.

        Args:
            parts: dictionary of the names of what the stage does, in order, to what each takes.
            stage: its name, which is shown before that of a part.
            later: what the stages after it will take, as far as this is known.
        """
        self.parts, self.stage = parts, stage
        total = sum(parts.values()) + later
        if self.bar is None:
            line = {"position": 1} if IN_NOTEBOOK else {"ncols": WIDTH}
            self.bar = tqdm(total=total, bar_format=FORMAT, **line)
        else:
            self.end_at(self.bar.n + total)

    def end_at(self, total):
        """Change where the bar ends."""
        self.bar.total = total
        if IN_NOTEBOOK:
            self.bar.container.children[1].max = total  # tqdm's widget keeps its first one
        self.bar.refresh()

    def skip(self, *names):
        """Parts that an earlier run has done."""
        self.end_at(self.bar.total - sum(self.parts.pop(name) for name in names))

    @contextmanager
    def part(self, name):
        """Context of a part; yields a function that is told what the last piece of it took."""
        end = self.bar.n + self.parts[name]
        self.bar.set_description_str(self.stage + name)
        yield lambda piece: self.bar.update(min(piece, end - self.bar.n))
        self.bar.update(end - self.bar.n)
        self.bar.refresh()


def image_takes(plan):
    """What segmenting an image on the canvas of a planning.Plan takes."""
    return math.prod(plan.canvas) * (1 if plan.space == "volumes" else PIXEL)


def step_takes(training, plan):
    """What one training step takes; ``training``: its settings."""
    return TRAINED * training.batch * image_takes(plan)


def case_takes(settings, plans, positions, measured=False):
    """What segmenting a case takes or, held out, measuring what confidence means of it.

    Args:
        positions: of its images that are segmented, for every plan.
    """
    images = sum(len(at) * image_takes(plan) for at, plan in zip(positions, plans))
    return images * settings.pseudo_masks.n * (1 + settings.folder.degraded_views * measured)


def network_name(number, plan, together):
    """What the display calls a network; ``plan``: its own; ``together``: plans of those whose mean is the mask."""
    return (f"quick network {number}" if number else "network") + f" of {plan.in_words}" * (len(together) > 1)


def measuring_name(number):
    """What the display calls measuring the cases that are held out from a network."""
    return f"cases held out from {f'quick network {number}' if number else 'the network'}"


def parts_of(settings, plans, trainings, folds, chosen):
    """What a run does and what each part takes: dictionary for Progress.

    Args:
        settings: as params.load gives them.
        plans: planning.Plan of every network, for every fold; the first fold is that of the model itself.
        trainings: settings of their training, likewise.
        folds: names of the cases that are held out from every one.
        chosen: dictionary of case to the positions of its images that are segmented, see intake.chosen_images.
    """
    parts = {}
    for number, (trained, seen, names) in enumerate(zip(trainings, plans, folds)):
        for training, plan in zip(trained, seen):
            registered = REGISTERED * (settings.folder.method == "joint+" and number == 0)
            parts[network_name(number, plan, seen)] = training.steps * step_takes(training, plan) * (1 + registered)
        measured = (case_takes(settings, seen, chosen[name][: len(seen)], measured=True) for name in names)
        parts[measuring_name(number)] = sum(measured)
    return {**parts, SEGMENTING: sum(case_takes(settings, plans[0], positions) for positions in chosen.values())}
