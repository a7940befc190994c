"""A trained model as one file: safetensors, so that nothing in it is ever executed."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib import DataError
from lib.models import ResidualUNet
from lib.runs.files import replacing
from lib.runs.versions import fingerprint
from lib.scans.reading.planning import KINDS, Plan
from lib.training import weights_digest

FORMAT = "joint segmentation and registration"
VERSION = 6
READABLE = 5, VERSION  # 5 is the same without a localiser
LOCALISER = "localiser/"


class Model(NamedTuple):
    """Segmentation networks, each with the plan by which it sees scans; their mean is the mask.

    ``about``: classes (names), values (label value of each class in the masks), plans (for every network: space, axis,
    spacing and canvas of its Plan, and root, its channels of the finest level), channels (what the names of their files
    end with), normalisation, pseudo_masks (of the test-time augmentation), symmetric, fingerprint (of training data and
    settings), licence (of the training data) and calibration (rows: number of a held-out subject, and confidence and
    DSC of one of its cases or of a worse view of it).
    """

    networks: list
    about: dict
    localiser: "Model | None" = None  # whose masks say which region of a scan these networks see

    def to(self, numerics):
        """The model on a device."""
        return self._replace(networks=[numerics.place(network) for network in self.networks])

    @property
    def plans(self):
        """The planning.Plan of every network."""
        return plans_in(self.about)

    @property
    def key(self):
        """Fingerprint of the weights and of how they are applied."""
        sums = [float(value.double().sum()) for network in self.networks for value in network.state_dict().values()]
        return fingerprint({name: self.about[name] for name in REQUIRED}, sums)


REQUIRED = {
    "classes": list,
    "values": list,
    "plans": list,
    "channels": list,
    "normalisation": str,
    "pseudo_masks": dict,
    "symmetric": bool,
    "fingerprint": str,
    "licence": str,
    "calibration": list,
}


def plans_in(about):
    """The planning.Plans that a model's ``about`` holds."""
    return [Plan(plan["space"], plan["axis"], tuple(plan["spacing"]), tuple(plan["canvas"])) for plan in about["plans"]]


def checksum(model):
    """Fingerprint of all that a model file holds."""
    localised_by = [checksum(model.localiser)] if model.localiser else []
    return fingerprint(model.about, [weights_digest(network) for network in model.networks], *localised_by)


def tensors_of(model, start=""):
    """Weights of all networks by name; those of the localiser begin with LOCALISER."""
    own = {
        f"{start}{k}/{name}": value.detach().cpu().contiguous()
        for k, network in enumerate(model.networks)
        for name, value in network.state_dict().items()
    }
    return own | (tensors_of(model.localiser, start + LOCALISER) if model.localiser else {})


def described(model):
    """A model's ``about``, its localiser's in it."""
    return {**model.about, **({"localiser": described(model.localiser)} if model.localiser else {})}


def built(about, tensors, start=""):
    """The Model that ``described`` and ``tensors_of`` say.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError, AttributeError: they do not say one.
    """
    about = dict(about)
    for name, kind in REQUIRED.items():
        if not isinstance(about[name], kind):
            raise TypeError(f"{name} is {about[name]!r}")
    localiser = built(about.pop("localiser"), tensors, start + LOCALISER) if "localiser" in about else None
    networks = []
    for k, (plan, root) in enumerate(zip(plans_in(about), (plan["root"] for plan in about["plans"]))):
        if plan.space not in KINDS or plan.axis not in range(3):
            raise ValueError(f"space is {plan.space!r}, axis {plan.axis!r}")
        network = ResidualUNet(
            len(about["classes"]), about["normalisation"], root, plan.strides, len(about["channels"])
        )
        first = f"{start}{k}/"
        own = {name.removeprefix(first): value for name, value in tensors.items() if name.startswith(first)}
        if not all(torch.isfinite(value).all() for value in own.values()):
            raise ValueError("a weight is not finite")
        network.load_state_dict(own)
        networks.append(network.eval())
    if not networks:
        raise ValueError("there is no network in it")
    return Model(networks, about, localiser)


def save_model(model, file):
    """Write a model; leaves either the old file or the whole new one. The same model gives the same bytes.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    file = Path(file)
    about = {**described(model), "checksum": checksum(model), "format": FORMAT, "version": VERSION}
    with replacing(file) as partial:
        try:
            save_file(
                tensors_of(model), partial, {"about": json.dumps(about)}
            )  # one entry: several are written in random order
        except SafetensorError as error:  # as which the full disk comes
            raise OSError(f"{file} cannot be written ({error})") from error


def load_model(file):
    """The model in a file, on the CPU, whatever it was trained on.

    Raises:
        DataError: the file is missing, is no model of this project, is of another version, or is not whole.
    """
    file = Path(file)
    if not file.is_file():
        raise DataError(f"{file} does not exist: give the model file that a training has written")
    try:
        with safe_open(file, framework="pt", device="cpu") as archive:
            about = json.loads((archive.metadata() or {}).get("about", "{}"))
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"{file} is not a model file, or is cut short ({error}): train again, or copy it again"
        ) from error
    if not isinstance(about, dict) or about.pop("format", None) != FORMAT:
        raise DataError(f"{file} is a safetensors file, but not a model of this project: give one that it has trained")
    if (version := about.pop("version", None)) not in READABLE:
        raise DataError(
            f"{file} is a model of version {version}, this is version {VERSION}: train again, or use the "
            "release that wrote it"
        )
    try:
        written = about.pop("checksum", None)
        model = built(about, tensors)
        if written != checksum(model):
            raise ValueError("it has changed since it was written")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DataError(
            f"{file} is a model file whose content does not fit ({error}): train again, or copy it again"
        ) from error
    return model
