"""Where a run is kept: weights, checkpoints of interrupted trainings, and what every stage cost."""

import io
import json
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import torch

from lib import parallel
from lib.runs.files import replacing
from lib.runs.params import work_folder

WITHOUT_MASKS = ("registration",)  # stages that are the same at any rate, since they see no mask
# Names under which it is noted what registering images to unlabelled ones took: labelled ones, and any.
PAIRS, NEIGHBOURS = "pairs", "neighbours"


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


class Checkpoint(NamedTuple):
    """Where an interrupted piece of work is kept, for ``training.fit`` and whatever else takes long."""

    file: Path
    key: str  # fingerprint of what the work depends on
    device: torch.device

    def load(self):
        """What was last saved if it belongs to the work that the key names, else None."""
        try:
            saved = load_saved(self.file, self.device)
        except (FileNotFoundError, ValueError):
            return None
        return saved if saved.get("fingerprint") == self.key else None

    def save(self, contents):
        """Keep a dictionary of tensors and plain values.

        Raises:
            OSError: the folder cannot be written to, or the disk is full.
        """
        save_atomically({"fingerprint": self.key, **contents}, self.file)


class Cabinet:
    """The files of one run.

    Args:
        settings: as params.load gives them.
        numerics: compute.Numerics of the device that tensors are loaded onto.
    """

    def __init__(self, settings, numerics):
        self.settings = settings
        self.numerics = numerics

    def _place(self, stage):
        """The part of a stage's path that says which run it is of.

        Stages without masks are the same at any rate. A variant has a stage of its own if it changes that stage's
        section of params.yaml, or ``strong``, which all stages read. It shares the other stages.
        """
        settings = self.settings
        if stage in WITHOUT_MASKS:
            return settings.cohort, f"seed_{settings.seed}", stage, settings.recipe
        own = {stage, "strong"} & set(settings.varied)
        variant = ["variants", settings.variant] if own else []
        return settings.cohort, *variant, f"seed_{settings.seed}", f"rate_{settings.rate:g}", settings.recipe, stage

    def folder(self, stage):
        """Where a stage keeps its weights and curves."""
        return work_folder("models", *self._place(stage))

    def file(self, stage, number=None):
        """Where the weights of a stage (of joint round ``number``) lie."""
        return self.folder(stage) / ("network.pt" if number is None else f"round_{number:02d}.pt")

    def save(self, contents, stage, number=None):
        """Keep weights, and what was measured with them; errors as ``save_atomically``."""
        save_atomically(contents, self.file(stage, number))
        parallel.wait()  # for the process that writes it: what comes next may read it

    def load(self, stage, number=None):
        """What ``save`` kept; errors as ``load_saved``."""
        return load_saved(self.file(stage, number), self.numerics.device)

    def checkpoint(self, key):
        """The Checkpoint of the work that ``key`` fingerprints."""
        return Checkpoint(work_folder("checkpoints", f"{key}.pt"), key, self.numerics.device)

    def cost_file(self, stage):
        """Where the cost of a stage is noted: apart from its weights, which are the same bytes in every run."""
        return work_folder("costs", *self._place(stage)).with_suffix(".json")

    def note_cost(self, stage, seconds, **of):
        """Note what a stage took; ``of`` says what it is of, in columns of costs.csv."""
        cost = {
            **of,
            "stage": stage,
            "seconds": round(seconds, 1),
            "device": self.numerics.name,
            "precision": self.numerics.precision,
        }
        with replacing(self.cost_file(stage)) as partial:
            partial.write_text(json.dumps(cost) + "\n")
