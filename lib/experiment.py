"""An experiment: what one recipe works on, and the files in which its work is kept between stages."""

import hashlib
import io
import json
from pathlib import Path
from zipfile import ZipFile

import pandas as pd
import torch

from lib import pseudo_masks
from lib.compute import Numerics
from lib.data import Tensors, load_cohort
from lib.files import replacing
from lib.models import MrRegNet, ResidualUNet
from lib.params import fingerprint, work_folder
from lib.selection import coverage_order
from lib.versions import NUMERICS, VOLUMES
from lib.volumes import VolumeCohort


class Experiment:
    """What one recipe works on: settings, device, the cohort on it, and networks as they start.

    Attributes:
        settings: as params.load gives them.
        numerics: lib.compute.Numerics.
        cohort: lib.data.Cohort.
        data: lib.data.Tensors.
        pooled: whether segmentation is trained by the soft Dice of whole batches, see losses.soft_dice_loss: where
            the images are slices of volumes.
        folder: where the stages of this cohort, recipe, seed and rate keep their weights and curves.
        origin: fingerprint of cohort file, draws, precision and versions, part of every checkpoint's own. The
            rate is not: registration is pre-trained without masks, once for all rates.
    """

    def __init__(self, settings):
        self.settings = settings
        self.numerics = Numerics(settings.device, settings.precision)
        file = cohort_file(settings)
        self.cohort = load_cohort(file)
        self.pooled = isinstance(self.cohort, VolumeCohort)
        self.data = Tensors(self.cohort, settings, self.numerics,
                            self.annotation_order if settings.coverage.choose else None)
        self.origin = fingerprint(
            hashlib.sha256(file.read_bytes()).hexdigest(), NUMERICS,
            [settings[key] for key in ("cohort", "recipe", "seed", "augmentation", "pseudo_masks")],
            str(self.numerics.device), self.numerics.precision, torch.__version__, *[VOLUMES] * self.pooled,
        )

    def annotation_order(self, data):
        """The training images in the order in which they cover the cohort best, see lib.selection."""
        network = load_pretrained_registration(self)
        generator = self.numerics.generator(self.settings.seed, "coverage")
        return coverage_order(network, data, data.drawn, self.settings.coverage, self.numerics, generator)

    def segmentation_network(self):
        """A ResidualUNet with the seed's initial weights, on the device."""
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            network = ResidualUNet(len(self.cohort.classes), self.settings.segmentation.normalisation)
        return self.numerics.place(network)

    def registration_network(self):
        """A MrRegNet with the seed's initial weights, on the device."""
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            network = MrRegNet(self.settings.registration.normalisation)
        return self.numerics.place(network)

    def folder(self, stage):
        """Where a stage keeps its weights and curves. Registration needs no masks: it is the same at any rate."""
        settings = self.settings
        if stage == "registration":
            return work_folder("models", settings.cohort, f"seed_{settings.seed}", stage, settings.recipe)
        variants = []
        if settings.variant and (stage in ("joint_plus", "cctr") or settings.coverage.choose):
            variants = ["variants", settings.variant]
        return work_folder("models", settings.cohort, *variants, f"seed_{settings.seed}", f"rate_{settings.rate:g}",
                           settings.recipe, stage)

    def model_file(self, stage, number=None):
        """Where the weights of a stage (of joint round ``number``) lie."""
        return self.folder(stage) / ("network.pt" if number is None else f"round_{number:02d}.pt")

    def generate(self, networks, index, label, *names):
        """Pseudo-masks of the images ``index`` by ``networks`` from the labelled ones; ``names`` seed the draws."""
        data = self.data
        return pseudo_masks.generate(
            networks, data.images[index], data.images[data.labelled], data.masks[data.labelled],
            self.settings.pseudo_masks, data.symmetric, self.numerics.generator(self.settings.seed, *names),
            self.numerics, label, self.matches(index),
        )

    def every_mask(self, networks, index, generator):
        """The 2N masks of the images ``index``, of which soft pseudo-masks are the mean: pseudo_masks.every_mask."""
        data = self.data
        return pseudo_masks.every_mask(
            networks, data.images[index], data.images[data.labelled], data.masks[data.labelled],
            self.settings.pseudo_masks, data.symmetric, generator, self.numerics, self.matches(index),
        )

    def matches(self, index):
        """Which labelled images may be registered to the images ``index``: None for all, else ``(n, k)`` positions."""
        if not isinstance(self.cohort, VolumeCohort):
            return None
        return self.data.as_index(self.cohort.matches(torch.as_tensor(index).cpu(), self.data.labelled.cpu()))

    def draw_sources(self, index, n, generator):
        """``(len(index), n)`` positions of random labelled images to register to the images ``index``."""
        return pseudo_masks.draw_sources(len(index), len(self.data.labelled), n, generator, self.matches(index))


def cohort_file(settings):
    """Where notebooks/01_data.ipynb writes the cohort."""
    return work_folder("cohort", f"{settings.cohort}.npz")


def save_atomically(contents, file):
    """torch.save that leaves either the old file or the whole new one, even after a power cut.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    whole = io.BytesIO()  # torch.save to the disk itself hides that it is full behind an error of its own
    torch.save(contents, whole)
    with replacing(file) as partial:
        partial.write_bytes(whole.getbuffer())


def load_saved(file, device):
    """What ``save_atomically`` wrote; nothing is unpickled but tensors and plain values.

    Raises:
        FileNotFoundError, ValueError: the file is missing or is not one of ours; the message says what to do.
    """
    file = Path(file)
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: run the notebook of the stage before this one, or `dvc repro`")
    try:
        with ZipFile(file) as archive:  # whose checksums torch writes, but does not look at
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it has changed since it was written")
        return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # zip, pickle and tensor errors all mean a file that is not whole or not ours
        raise ValueError(f"{file} cannot be loaded ({error}): delete it and run its stage again") from error


def save_cost(experiment, stage, seconds):
    """Keep a stage's training time beside its weights, which stay the same bytes however long they took."""
    cost = {"seconds": round(seconds, 1), "device": experiment.numerics.name}
    (experiment.folder(stage) / "cost.json").write_text(json.dumps(cost) + "\n")


def load_cost(experiment, *stages):
    """Seconds that stages took to train, summed."""
    return sum(json.loads((experiment.folder(stage) / "cost.json").read_text())["seconds"] for stage in stages)


def resume(file, key, device):
    """The checkpoint in ``file`` if it belongs to the work that ``key`` fingerprints, else None."""
    try:
        saved = load_saved(file, device)
    except (FileNotFoundError, ValueError):
        return None
    return saved if saved.get("fingerprint") == key else None


def load_pretrained_registration(experiment):
    """The MrRegNet that the pre-training saved."""
    network = experiment.registration_network()
    network.load_state_dict(load_saved(experiment.model_file("registration"), experiment.numerics.device)["network"])
    return network


def load_pretrained(experiment):
    """The networks that the two pre-trainings saved: (ResidualUNet, MrRegNet)."""
    segmentation = experiment.segmentation_network()
    saved = load_saved(experiment.model_file("segmentation"), experiment.numerics.device)
    segmentation.load_state_dict(saved["network"])
    return segmentation, load_pretrained_registration(experiment)


def load_round(experiment, number, stage="joint"):
    """Both networks after round ``number`` (0: before the first), and what was saved with them."""
    saved = load_saved(experiment.model_file(stage, number), experiment.numerics.device)
    networks = experiment.segmentation_network(), experiment.registration_network()
    for network, name in zip(networks, ("segmentation", "registration")):
        network.load_state_dict(saved[name])
    return networks, saved


def load_measured(experiment, stage="joint"):
    """What was measured in all rounds, one row per round and split."""
    numbers = range(experiment.settings[stage].rounds + 1)
    return pd.DataFrame([row for number in numbers for row in load_round(experiment, number, stage)[1]["measured"]])


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
