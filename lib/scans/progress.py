"""One display over everything that a run on a folder does: how much of it is done, and the time left."""

from contextlib import contextmanager

from tqdm import tqdm

TRAINED = (
    3.5  # times as long as segmenting an image takes training on it: backward pass, averaged network, augmentation
)
REGISTERED = 0.7  # of a joint+ training goes to its registration as well
FORMAT = "all: {percentage:3.0f} %|{bar:30}| {elapsed} passed, {remaining} left; {desc}"
SEGMENTING = "segmenting"


class Progress:
    """A bar whose unit is one image seen by a network.

    Args:
        parts: dictionary of the names of what a run does, in order, to what each takes.
    """

    def __init__(self, parts):
        self.parts = parts
        self.bar = tqdm(total=sum(parts.values()), bar_format=FORMAT)

    def skip(self, *names):
        """Parts that an earlier run has done."""
        self.bar.total -= sum(self.parts.pop(name) for name in names)
        self.bar.refresh()

    @contextmanager
    def part(self, name):
        """Context of a part; yields a function that is told what the last piece of it took."""
        end = self.bar.n + self.parts[name]
        self.bar.set_description_str(name)
        yield lambda piece: self.bar.update(min(piece, end - self.bar.n))
        self.bar.update(end - self.bar.n)
        self.bar.refresh()


def step_takes(training):
    """What one training step takes; ``training``: its settings."""
    return TRAINED * training.batch


def case_takes(settings, images, measured=False):
    """What segmenting a case of so many images takes, or, held out, measuring what confidence means of it."""
    return images * settings.pseudo_masks.n * (1 + settings.folder.degraded_views * measured)


def network_name(number):
    """What the display calls a network."""
    return f"quick network {number}" if number else "network"


def parts_of(settings, trainings, folds, counts):
    """What a run does and what each part takes: dictionary for Progress.

    Args:
        settings: as params.load gives them.
        trainings: settings of every network's training, the one that is used first.
        folds: names of the cases that are held out from every network.
        counts: dictionary of case to how many of its images are segmented.
    """
    parts = {}
    for number, (training, names) in enumerate(zip(trainings, folds)):
        registered = REGISTERED * (settings.folder.method == "joint+" and number == 0)
        measured = sum(case_takes(settings, counts[name], measured=True) for name in names)
        parts[network_name(number)] = training.steps * step_takes(training) * (1 + registered) + measured
    return {**parts, SEGMENTING: sum(case_takes(settings, count) for count in counts.values())}
