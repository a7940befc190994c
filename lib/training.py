"""Training: one resumable loop, the two pre-trainings and the joint rounds (P1, sections 2.1, 2.3 and 3.2)."""

import copy
import hashlib
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from lib import evaluation, pseudo_masks
from lib.augment import augment
from lib.compute import Numerics
from lib.data import Tensors, load_cohort
from lib.losses import registration_loss, soft_dice_loss
from lib.models import MrRegNet, ResidualUNet, pad_to_multiple
from lib.params import fingerprint, work_folder

CHECKPOINT_SECONDS = 20
HOST_STEPS = 10  # steps between two looks at the loss, each of which waits for the GPU
NUMERIC_MODULES = ("augment", "compute", "losses", "models", "pseudo_masks", "training", "warping")


class Setup:
    """What a stage of one recipe works on: settings, device, the cohort on it, and networks as they start.

    Attributes:
        settings: as params.load gives them.
        numerics: lib.compute.Numerics.
        cohort: lib.data.Cohort.
        data: lib.data.Tensors.
        origin: fingerprint of cohort file, draws, precision and code, part of every checkpoint's own.
    """

    def __init__(self, settings):
        self.settings = settings
        self.numerics = Numerics(settings.device, settings.precision)
        file = cohort_file(settings)
        self.cohort = load_cohort(file)
        self.data = Tensors(self.cohort, settings, self.numerics)
        here = Path(__file__).parent
        self.origin = fingerprint(
            hashlib.sha256(file.read_bytes()).hexdigest(),
            [hashlib.sha256((here / f"{name}.py").read_bytes()).hexdigest() for name in NUMERIC_MODULES],
            [settings[key] for key in ("cohort", "rate", "seed", "recipe", "augmentation", "pseudo_masks")],
            [str(self.numerics.device), self.numerics.precision, torch.__version__],
        )

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

    def model_file(self, stage, number=None):
        """Where the weights of a stage (of joint round ``number``) lie."""
        name = f"{stage}.pt" if number is None else f"{stage}/round_{number:02d}.pt"
        return work_folder("models", self.settings.cohort, self.settings.recipe, name)

    def generate(self, networks, images, label, *names):
        """Pseudo-masks of ``images`` by ``networks`` from the labelled images; draws are seeded by ``names``."""
        data = self.data
        return pseudo_masks.generate(
            networks, images, data.images[data.labelled], data.masks[data.labelled], self.settings.pseudo_masks,
            data.symmetric, self.numerics.generator(self.settings.seed, *names), self.numerics, label,
        )


def cohort_file(settings):
    """Where notebooks/01_data.ipynb writes the cohort."""
    return work_folder("cohort", f"{settings.cohort}.npz")


def save_atomically(contents, file):
    """torch.save that leaves either the old file or the whole new one, even after a power cut."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    with open(partial, "wb") as stream:
        torch.save(contents, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def load_saved(file, device):
    """What ``save_atomically`` wrote; nothing is unpickled but tensors and plain values.

    Raises:
        FileNotFoundError, ValueError: the file is missing or is not one of ours; the message says what to do.
    """
    file = Path(file)
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: run the notebook of the stage before this one, or `dvc repro`")
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # zip, pickle and tensor errors all mean a file that is not whole or not ours
        raise ValueError(f"{file} cannot be loaded ({error}): delete it and run its stage again") from error


def resume(file, key, device):
    """The checkpoint in ``file`` if it belongs to the work that ``key`` fingerprints, else None."""
    try:
        saved = load_saved(file, device)
    except (FileNotFoundError, ValueError):
        return None
    return saved if saved.get("fingerprint") == key else None


def learning_rate(schedule, peak, step, steps):
    """``constant``, or ``one_cycle``: cosine warm-up over the first tenth, then cosine decay towards zero."""
    if schedule == "constant":
        return peak
    if schedule != "one_cycle":
        raise ValueError(f"schedule '{schedule}' in params.yaml is not one of constant, one_cycle")
    warm = max(1, steps // 10)
    if step < warm:
        return peak * (1 - math.cos(math.pi * (step + 1) / warm)) / 2
    return peak * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def fit(network, batch_loss, *, steps, peak, schedule, weight_decay, generator, key, label, validate=None, checks=20):
    """Train ``network`` by Adam; a killed run started again ends with the same weights, bit for bit.

    Args:
        network: on its device; trained in place.
        batch_loss: function of the generator that gives named losses, ``loss`` (minimised) first.
        steps: optimiser steps.
        peak, schedule, weight_decay: learning rate and its course (see learning_rate); decoupled weight decay.
        generator: for all draws; its state is part of the checkpoint.
        key: fingerprint of settings, data and initial weights. Names the checkpoint under work/checkpoints.
        label: of the progress bar.
        validate: function of the network that gives a score; the weights of the best score are kept.
        checks: how many times it is called, evenly spaced.

    Returns:
        pandas.DataFrame, one row per step: step, learning_rate, the losses, and validation where it was measured.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    device = next(network.parameters()).device
    optimiser = torch.optim.AdamW(network.parameters(), lr=peak, weight_decay=weight_decay, fused=True)
    file = work_folder("checkpoints", f"{key}.pt")
    history, best, best_score, start = [], None, -math.inf, 0
    saved = resume(file, key, device)
    if saved:
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        generator.set_state(saved["generator"].cpu())
        history, best, best_score, start = saved["history"], saved["best"], saved["best_score"], saved["step"]

    def checkpoint(step):
        save_atomically(
            {
                "fingerprint": key, "step": step, "network": network.state_dict(), "history": history,
                "optimiser": optimiser.state_dict(), "generator": generator.get_state(),
                "best": best, "best_score": best_score,
            },
            file,
        )

    pending, saved_at = [], time.monotonic()
    bar = tqdm(total=steps, initial=start, desc=label, unit="step", mininterval=1)
    for step in range(start, steps):
        network.train()
        rate = learning_rate(schedule, peak, step, steps)
        optimiser.param_groups[0]["lr"] = rate
        losses = batch_loss(generator)
        optimiser.zero_grad(set_to_none=True)
        next(iter(losses.values())).backward()
        optimiser.step()
        pending.append((step + 1, rate, torch.stack([value.detach() for value in losses.values()])))
        last = step + 1 == steps
        if (step + 1) % HOST_STEPS == 0 or last:
            values = torch.stack([parts for *_, parts in pending]).tolist()
            for (number, at_rate, _), row in zip(pending, values):
                if not all(map(math.isfinite, row)):
                    raise FloatingPointError(
                        f"{label}: the loss is not finite at step {number}; lower the learning rate in params.yaml"
                    )
                history.append({"step": number, "learning_rate": at_rate, **dict(zip(losses, row))})
            pending = []
            bar.set_postfix({name: f"{value:.3f}" for name, value in zip(losses, values[-1])}, refresh=False)
            if validate and (last or (step + 1) * checks // steps > (step + 1 - HOST_STEPS) * checks // steps):
                score = validate(network)
                history[-1]["validation"] = score
                if score >= best_score:
                    best, best_score = copy.deepcopy(network.state_dict()), score
            if last or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                checkpoint(step + 1)
                saved_at = time.monotonic()
        bar.update()
    bar.close()
    if best is not None:
        network.load_state_dict(best)
    return pd.DataFrame(history)


def draw_indices(count, batch, generator):
    """``(batch,)`` random indices below ``count``, all different where there are enough."""
    order = [
        torch.randperm(count, generator=generator, device=generator.device) for _ in range(-(-batch // count))
    ]
    return torch.cat(order)[:batch]


def steps_of(epochs, images, batch):
    """Optimiser steps of so many passes over so many images."""
    return max(1, round(epochs * images / batch))


def weights_digest(network):
    """A hash of a network's weights, so that a checkpoint is not resumed from other ones."""
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train_segmentation(setup, network, images, masks, *, epochs, peak, label, names):
    """Minimise the soft Dice loss, eq. (1), of ``network`` on images and (soft) masks.

    Args:
        setup: Setup.
        network: ResidualUNet, trained in place.
        images, masks: ``(n, 1, height, width)`` and ``(n, classes, height, width)`` on the device.
        epochs: passes over the images.
        peak: learning rate.
        label: of the progress bar.
        names: words and numbers that seed the draws and name the work.

    Returns:
        History, see fit. The network ends with the weights that were best on the validation images.
    """
    settings, numerics, data = setup.settings, setup.numerics, setup.data
    options = settings.segmentation

    def batch_loss(generator):
        index = draw_indices(len(images), options.batch, generator)
        batch, target = images[index], masks[index]
        if options.augmentation == "strong":
            batch, target = augment(batch, target, generator, settings.augmentation, data.symmetric)
        with numerics.autocast():
            prediction = network.segment(batch)
        return {"loss": soft_dice_loss(prediction, target)}

    steps = steps_of(epochs, len(images), options.batch)
    key = fingerprint(setup.origin, "segmentation", options, names, steps, peak, weights_digest(network),
                      float(masks.double().sum()))
    return fit(
        network, batch_loss, steps=steps, peak=peak, schedule=options.schedule, weight_decay=options.weight_decay,
        generator=numerics.generator(settings.seed, *names), key=key, label=label,
        validate=lambda trained: validation_dice(setup, trained),
    )


def train_registration(setup, network, images, masks, *, epochs, peak, label, names):
    """Minimise the registration objective, eq. (3), of ``network`` on random pairs of images.

    Args:
        masks: ``(n, classes, height, width)`` that guide the registration, or None in pre-training.
        The other arguments are those of train_segmentation.

    Returns:
        History, see fit. The network ends with the weights of the last step.
    """
    settings, numerics, data = setup.settings, setup.numerics, setup.data
    options = settings.registration

    def batch_loss(generator):
        index = draw_indices(len(images), 2 * options.batch, generator)
        batch = images[index]
        guides = masks[index] if masks is not None else images[index, :0]
        if options.augmentation == "strong":
            batch, guides = augment(batch, guides, generator, settings.augmentation, data.symmetric)
        batch, guides = pad_to_multiple(batch)[0], pad_to_multiple(guides)[0]
        half = options.batch
        with numerics.autocast():
            levels = network(batch[:half], batch[half:])
        pair = (guides[:half], guides[half:]) if masks is not None else (None, None)
        losses = registration_loss(levels, batch[:half], batch[half:], options.smoothness, *pair)
        named = {"loss": losses.total, "similarity": losses.similarity, "smoothness": losses.smoothness}
        return named if masks is None else {**named, "dice": losses.dice}

    steps = steps_of(epochs, len(images), options.batch)
    key = fingerprint(setup.origin, "registration", options, names, steps, peak, weights_digest(network),
                      None if masks is None else float(masks.double().sum()))
    return fit(
        network, batch_loss, steps=steps, peak=peak, schedule=options.schedule, weight_decay=options.weight_decay,
        generator=numerics.generator(settings.seed, *names), key=key, label=label,
    )


@torch.no_grad()
def validation_dice(setup, network):
    """Mean DSC of the segmentation network on the validation images."""
    network.eval()
    data, masks = setup.data, []
    images = data.images[data.validation]
    for batch in images.split(setup.numerics.batch(images)):
        with setup.numerics.autocast():
            masks.append(network.segment(batch))
    return float(evaluation.dice(torch.cat(masks), data.masks[data.validation]).mean())


def pretrain_segmentation(setup):
    """Iteration 0 of the segmentation network: the labelled images alone (P1, section 2.1). Also the FS baseline.

    Returns:
        (ResidualUNet, history). The weights are saved under work/models.
    """
    options, data = setup.settings.segmentation, setup.data
    network = setup.segmentation_network()
    history = train_segmentation(
        setup, network, data.images[data.labelled], data.masks[data.labelled], epochs=options.epochs,
        peak=options.learning_rate, label="segmentation", names=("segmentation", "pretraining"),
    )
    save_atomically({"network": network.state_dict()}, setup.model_file("segmentation"))
    return network, history


def pretrain_registration(setup):
    """Iteration 0 of the registration network: random pairs of all training images, no masks (P1, section 2.1).

    Returns:
        (MrRegNet, history). The weights are saved under work/models.
    """
    options, data = setup.settings.registration, setup.data
    network = setup.registration_network()
    history = train_registration(
        setup, network, data.images[data.train], None, epochs=options.epochs, peak=options.learning_rate,
        label="registration", names=("registration", "pretraining"),
    )
    save_atomically({"network": network.state_dict()}, setup.model_file("registration"))
    return network, history


def load_pretrained(setup):
    """The networks that the two pre-trainings saved: (ResidualUNet, MrRegNet)."""
    networks = setup.segmentation_network(), setup.registration_network()
    for network, stage in zip(networks, ("segmentation", "registration")):
        network.load_state_dict(load_saved(setup.model_file(stage), setup.numerics.device)["network"])
    return networks


def load_round(setup, number):
    """Both networks after joint round ``number`` (0: before the first), and what was measured of them."""
    saved = load_saved(setup.model_file("joint", number), setup.numerics.device)
    networks = setup.segmentation_network(), setup.registration_network()
    for network, stage in zip(networks, ("segmentation", "registration")):
        network.load_state_dict(saved[stage])
    return networks, saved["measured"]


def load_measured(setup):
    """What was measured in all joint rounds, one row per round and split."""
    numbers = range(setup.settings.joint.rounds + 1)
    return pd.DataFrame([row for number in numbers for row in load_round(setup, number)[1]])


class Rounds(NamedTuple):
    """What joint training gives."""

    measured: pd.DataFrame  # one row per round and split
    history: pd.DataFrame  # one row per optimiser step


def measure(masks, truth, split, number):
    """A row of rounds.csv: DSC of both networks and of the soft pseudo-masks, confidence and folding."""
    return {
        "round": number,
        "split": split,
        "n": len(truth),
        "dsc_segmentation": float(evaluation.dice(masks.plain, truth).mean()),
        "dsc_registration": float(evaluation.dice(masks.registration, truth).mean()),
        "dsc_pseudo_masks": float(evaluation.dice(masks.soft, truth).mean()),
        "mean_confidence": float(pseudo_masks.mean_confidence(masks.soft).mean()),
        "folding": float(masks.folding.mean()),
    }


def joint_rounds(setup):
    """The joint rounds (P1, section 2.1): soft pseudo-masks, then both networks continue on them, again and again.

    In every round both networks give soft pseudo-masks to the unlabelled images; the segmentation network
    continues on labelled and pseudo-labelled images, the registration network on random pairs of them, guided
    by the masks. All rounds are saved under work/models; none is discarded, so that the best one on the
    validation images can be tested.

    Returns:
        Rounds. True masks of unlabelled images are used for its columns alone, never for training or choosing.
    """
    settings, data = setup.settings, setup.data
    options = settings.joint
    networks = load_pretrained(setup)
    images = torch.cat((data.images[data.labelled], data.images[data.unlabelled]))
    truth = {"validation": data.masks[data.validation], "unlabelled": data.masks[data.unlabelled]}
    rows, histories = [], []
    for number in range(options.rounds + 1):
        soft = setup.generate(networks, data.images[data.unlabelled], f"round {number}: pseudo-masks",
                              "joint", "unlabelled", number)
        seen = setup.generate(networks, data.images[data.validation], f"round {number}: validation",
                              "joint", "validation", number)
        measured = [measure(masks, truth[split], split, number)
                    for split, masks in (("validation", seen), ("unlabelled", soft))]
        rows += measured
        segmentation, registration = networks
        save_atomically(
            {"segmentation": segmentation.state_dict(), "registration": registration.state_dict(),
             "measured": measured},
            setup.model_file("joint", number),
        )
        if number == options.rounds:
            break
        masks = torch.cat((data.masks[data.labelled], soft.soft))
        after = number + 1
        for train, network, epochs, peak in (
            (train_segmentation, segmentation, options.segmentation_epochs, options.segmentation_learning_rate),
            (train_registration, registration, options.registration_epochs, options.registration_learning_rate),
        ):
            name = train.__name__.removeprefix("train_")
            history = train(setup, network, images, masks, epochs=epochs, peak=peak,
                            label=f"round {after}: {name}", names=("joint", name, after))
            histories.append(history.assign(round=after, network=name))
    return Rounds(pd.DataFrame(rows), pd.concat(histories, ignore_index=True))


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
