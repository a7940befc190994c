"""An experiment: what one run works on, and the networks as it starts and as its stages have left them."""

import hashlib
from typing import NamedTuple

import pandas as pd
import torch

from lib import pseudo_masks
from lib.cohorts import load_cohort
from lib.cohorts.cohort import Tensors
from lib.compute import Numerics
from lib.models import HALVED, MrRegNet, ResidualUNet, strides_of
from lib.runs.cabinet import WITHOUT_MASKS, Cabinet
from lib.runs.params import cohort_file
from lib.runs.versions import NUMERICS, VOLUMES, fingerprint


class Prediction(NamedTuple):
    """What a method says of test images."""

    round: int  # that is tested; 0 where there are none
    masks: torch.Tensor  # (n, classes, *space) in [0, 1]


class Experiment:
    """What one run works on: settings, device, the cohort on it, and networks as they start.

    Attributes:
        settings: as params.load gives them.
        numerics: lib.compute.Numerics.
        cohort: cohorts.cohort.Cohort.
        data: cohorts.cohort.Tensors.
        cabinet: runs.cabinet.Cabinet, in which the stages keep their weights, checkpoints and costs.
        after_step: function that is called after every training step of recipe `strong`, for whoever shows progress.
        watch: function of a network that gives a tensor, or None: called with the averaged network now and then while
            recipe `strong` trains. Training is the same with and without it.
        whole: whether an image is a volume.
        strides: of the networks, see models.strides_of.
        pooled: whether the soft Dice loss of the segmentation is that of whole batches, see losses.soft_dice_loss.
            True if the images are slices of volumes.
        origin: fingerprint of cohort file, draws, precision and versions. It is part of every checkpoint's own. The
            rate is not in it: registration is pre-trained without masks, once for all rates.
    """

    def __init__(self, settings):
        self.settings = settings
        self.after_step = lambda: None
        self.watch = None
        self.numerics = Numerics(settings.device, settings.precision, settings.deterministic)
        self.cabinet = Cabinet(settings, self.numerics)
        file = cohort_file(settings)
        self.cohort = load_cohort(file)
        self.pooled = self.cohort.of_volumes
        self.data = Tensors(self.cohort, settings, self.numerics)
        self.whole = self.cohort.axes == 3
        self.strides = strides_of(self.cohort.spacing, self.cohort.labels.shape[1:]) if self.whole else HALVED
        self.origin = fingerprint(
            hashlib.sha256(file.read_bytes()).hexdigest(),
            NUMERICS,
            [settings[key] for key in ("cohort", "recipe", "seed", "pseudo_masks")],
            str(self.numerics.device),
            self.numerics.precision,
            torch.__version__,
            *[VOLUMES] * self.pooled,
        )

    def segmentation_network(self):
        """A ResidualUNet with the seed's initial weights, on the device."""
        options = {"normalisation": self.settings.segmentation.normalisation, "strides": self.strides}
        options["inputs"] = self.data.images.shape[1]
        if self.whole:
            options["root"] = self.settings.volumes.root
        return self._seeded(lambda: ResidualUNet(len(self.cohort.classes), **options))

    def registration_network(self):
        """A MrRegNet with the seed's initial weights, on the device."""
        return self._seeded(lambda: MrRegNet(self.settings.registration.normalisation, strides=self.strides))

    def _seeded(self, make):
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            return self.numerics.place(make())

    def generate(self, networks, index, label, *names):
        """Pseudo-masks of the images ``index`` by ``networks`` from the labelled ones; ``names`` seed the draws."""
        generator = self.numerics.generator(self.settings.seed, *names)
        given = self._given(networks, index)
        return pseudo_masks.generate(*given, generator, self.numerics, label, self.matches(index))

    def every_mask(self, networks, index, generator):
        """The 2N masks of the images ``index``, see pseudo_masks.every_mask. Their mean is the soft pseudo-mask."""
        return pseudo_masks.every_mask(*self._given(networks, index), generator, self.numerics, self.matches(index))

    def _given(self, networks, index):
        """What pseudo-masks of the images ``index`` are made of."""
        data, settings = self.data, self.settings.pseudo_masks
        sources = data.images[data.labelled], data.masks[data.labelled]
        return networks, data.images[index], *sources, settings, data.symmetric

    def matches(self, index):
        """Which labelled images may be registered to the images ``index``: None for all, else ``(n, k)`` positions."""
        found = self.cohort.matches(torch.as_tensor(index).cpu(), self.data.labelled.cpu())
        return None if found is None else self.data.as_index(found)

    def draw_sources(self, index, n, generator):
        """``(len(index), n)`` positions of random labelled images to register to the images ``index``."""
        return pseudo_masks.draw_sources(len(index), len(self.data.labelled), n, generator, self.matches(index))

    def note_cost(self, stage, seconds):
        """Note what a stage of this experiment took."""
        settings = self.settings
        labelled = None if stage in WITHOUT_MASKS else self.cohort.units(self.data.labelled.cpu())
        self.cabinet.note_cost(
            stage,
            seconds,
            cohort=self.cohort.title,
            recipe=settings.recipe,
            rate=settings.rate,
            n_labelled=labelled,
            seed=settings.seed,
            variant=settings.variant,
        )


def load_pretrained_registration(experiment):
    """The MrRegNet that the pre-training saved."""
    network = experiment.registration_network()
    network.load_state_dict(experiment.cabinet.load("registration")["network"])
    return network


def load_pretrained(experiment):
    """The networks that the two pre-trainings saved: (ResidualUNet, MrRegNet)."""
    segmentation = experiment.segmentation_network()
    segmentation.load_state_dict(experiment.cabinet.load("segmentation")["network"])
    return segmentation, load_pretrained_registration(experiment)


def load_round(experiment, number):
    """Both networks after joint round ``number`` (0: before the first), and what was saved with them."""
    saved = experiment.cabinet.load("joint", number)
    networks = experiment.segmentation_network(), experiment.registration_network()
    for network, name in zip(networks, ("segmentation", "registration")):
        network.load_state_dict(saved[name])
    return networks, saved


def finished_rounds(experiment):
    """Numbers of the joint rounds that have been saved."""
    numbers = range(experiment.settings.joint.rounds + 1)
    return [number for number in numbers if experiment.cabinet.file("joint", number).exists()]


def load_measured(experiment):
    """What was measured in all joint rounds, one row per round and split."""
    numbers = range(experiment.settings.joint.rounds + 1)
    return pd.DataFrame([row for number in numbers for row in load_round(experiment, number)[1]["measured"]])


def best_rounds(measured):
    """The round that each method is tested with: the best on the validation images for that method.

    Args:
        measured: Rounds.measured.

    Returns:
        Dictionary of method (joint, registration, combined) to round; the earlier round where two are equal.
    """
    validation = measured[measured["split"] == "validation"].set_index("round")
    columns = {"joint": "dsc_segmentation", "registration": "dsc_registration", "combined": "dsc_pseudo_masks"}
    return {method: int(validation[column].idxmax()) for method, column in columns.items()}


def predict_rounds(experiment, index):
    """Masks of ``joint``, ``registration`` and ``combined``, each by the round that was best for it.

    Args:
        index: of the images.

    Returns:
        Dictionary of method to Prediction.
    """
    chosen = best_rounds(load_measured(experiment))
    masks = {}
    for number in sorted(set(chosen.values())):
        networks, _ = load_round(experiment, number)
        masks[number] = experiment.generate(networks, index, f"test, joint round {number}", "test", "joint", number)
    fields = {"registration": "registration", "joint": "plain", "combined": "soft"}
    return {name: Prediction(chosen[name], getattr(masks[chosen[name]], field)) for name, field in fields.items()}


def rounds_of(experiment):
    """Rows of rounds.csv of the joint rounds. ``best_for`` names the methods that are tested with a round."""
    measured = load_measured(experiment)
    chosen = best_rounds(measured)
    named = measured["round"].map(lambda n: " ".join(method for method, number in chosen.items() if number == n))
    return measured.assign(stage="joint", best_for=named)
