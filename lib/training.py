"""Training: one resumable loop for every network (P1, sections 2.1 and 3.2)."""

import copy
import hashlib
import math
import time
from typing import NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from lib import parallel

CHECKPOINT_SECONDS = 20
HOST_STEPS = 10  # steps between two looks at the loss; each look waits for the GPU


def learning_rate(schedule, peak, step, steps):
    """``constant``, or ``one_cycle``: cosine warm-up over the first tenth, then cosine decay towards zero."""
    if schedule == "constant":
        return peak
    if schedule != "one_cycle":
        raise ValueError(f"schedule '{schedule}' is not one of constant, one_cycle")
    warm = max(1, steps // 10)
    if step < warm:
        return peak * (1 - math.cos(math.pi * (step + 1) / warm)) / 2
    return peak * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


class Clock:
    """Seconds of work on a device. On the CPU, seconds in which the process was paused or waited do not count.

    Args:
        device: torch.device.
    """

    def __init__(self, device):
        self.on_cpu = device.type == "cpu"
        self.seconds = 0.0
        self.last = time.monotonic(), time.process_time()

    def read(self):
        """Seconds since the clock was made; to be read after every short piece of work."""
        now = time.monotonic(), time.process_time()
        passed, busy = (late - early for late, early in zip(now, self.last))  # with all threads, busy may be more
        self.seconds += min(passed, busy) if self.on_cpu else passed
        self.last = now
        return self.seconds

    def skip(self):
        """What was done since the last reading does not count."""
        self.last = time.monotonic(), time.process_time()


class Fit(NamedTuple):
    """What training gives, besides the trained network."""

    history: pd.DataFrame  # one row per step: step, learning_rate, the losses, and validation where it was measured
    seconds: float  # spent in this and all interrupted runs, see Clock
    watched: list  # pairs of step and what ``watch`` gave


class Best:
    """The best weights of every part of a network, by validation score.

    Args:
        parts: names of modules. Each is kept by itself. An empty name stands for the whole network.
        scores, weights: those of an interrupted run.
    """

    def __init__(self, parts, scores=None, weights=None):
        self.parts = parts
        self.scores = scores or [-math.inf] * len(parts)
        self.weights = weights or {}

    def update(self, network, scores):
        """Keep the parts whose score is at least the best so far: of equal scores the later one is kept."""
        for k, part in enumerate(self.parts):
            if scores[k] >= self.scores[k]:
                weights = network.get_submodule(part).state_dict(prefix=part and f"{part}.")
                self.weights |= copy.deepcopy(dict(weights))
                self.scores[k] = scores[k]

    def restore(self, network):
        """Give the network its best parts back. A part that was never scored stays as it is."""
        network.load_state_dict({**network.state_dict(), **self.weights})


def fit(
    network,
    batch_loss,
    *,
    steps,
    peak,
    schedule,
    weight_decay,
    generator,
    label,
    checkpoint=None,
    validate=None,
    checks=20,
    after_step=None,
    watch=None,
    parts=("",),
):
    """Train ``network`` by Adam; a killed run started again ends with the same weights, bit for bit.

    Where torchrun has started several processes they train together, see lib.parallel.

    Args:
        network: on its device; trained in place.
        batch_loss: function of generator and step that gives named losses, ``loss`` (minimised) first.
        steps: optimiser steps.
        peak, schedule, weight_decay: learning rate and its course (see learning_rate); decoupled weight decay.
        generator: for all draws; its state is part of the checkpoint.
        label: of the progress bar.
        checkpoint: where an interrupted run is kept, such as runs.cabinet.Checkpoint: ``load()`` gives the dictionary
            that was last given to ``save(contents)``, or None. None keeps nothing.
        validate: function of the network that gives a score, or a list of them, one for each of ``parts``. The weights
            with the best score are kept; without it those of the last step.
        checks: how many times ``validate`` and ``watch`` are called, evenly spaced.
        after_step: called after every step, for averages of the weights that are part of ``network``.
        watch: function of the network. The tensors that it gives are kept. Its time does not count.
        parts: modules of the network. Each is validated by itself and ends with its own best weights.

    Returns:
        Fit.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    device = next(network.parameters()).device
    parallel.join(device)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, peak, weight_decay=weight_decay, fused=True)
    columns = ["validation", *(f"validation {part}" for part in parts[1:])]
    history, watched, best, start, before = [], [], Best(parts), 0, 0.0
    saved = checkpoint.load() if checkpoint else None
    if saved:
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict({**optimiser.state_dict(), **saved["optimiser"]})  # old files hold the state alone
        generator.set_state(saved["generator"].cpu())  # loading has moved it; torch wants it on the CPU
        history, watched, before = saved["history"], saved["watched"], saved["seconds"]
        best, start = Best(parts, listed(saved["best_score"]), saved["best"]), saved["step"]
    clock = Clock(device)

    def contents(step):
        return {
            "step": step,
            "network": network.state_dict(),
            "history": history,
            "optimiser": optimiser.state_dict(),
            "generator": generator.get_state(),
            "best": best.weights,
            "best_score": best.scores,
            "watched": watched,
            "seconds": before + clock.read(),
        }

    pending, saved_at = [], time.monotonic()
    bar = tqdm(total=steps, initial=start, desc=label, unit="step", mininterval=1, disable=not parallel.is_first())
    for step in range(start, steps):
        network.train()
        rate = learning_rate(schedule, peak, step, steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        with parallel.spread(network):
            losses = batch_loss(generator, step)
        optimiser.zero_grad()
        next(iter(losses.values())).backward()  # the first is the total, the others are for the log
        parallel.average(trained)
        optimiser.step()
        if after_step:
            after_step()
        # Losses stay on the device until the next look: reading each at once would make every step wait for the GPU.
        pending.append((step + 1, rate, torch.stack([value.detach() for value in losses.values()])))
        last = step + 1 == steps
        if (step + 1) % HOST_STEPS == 0 or last:
            values = torch.stack([parts for *_, parts in pending]).tolist()
            for (number, at_rate, _), row in zip(pending, values):
                if not all(map(math.isfinite, row)):
                    raise FloatingPointError(
                        f"{label}: the loss is not finite at step {number}; lower the learning rate"
                    )
                history.append({"step": number, "learning_rate": at_rate, **dict(zip(losses, row))})
            pending = []
            bar.set_postfix({name: f"{value:.3f}" for name, value in zip(losses, values[-1])}, refresh=False)
            # A check is due if one of the evenly spaced ones lies in the steps since the last look.
            if last or (step + 1) * checks // steps > (step + 1 - HOST_STEPS) * checks // steps:
                if validate:
                    scores = listed(validate(network))
                    history[-1] |= dict(zip(columns, scores, strict=True))
                    best.update(network, scores)
                if watch:
                    clock.read()
                    watched.append((step + 1, watch(network)))
                    clock.skip()
            if checkpoint and parallel.is_first() and (last or time.monotonic() - saved_at > CHECKPOINT_SECONDS):
                checkpoint.save(contents(step + 1))
                saved_at = time.monotonic()
        bar.update()
        clock.read()
    bar.close()
    best.restore(network)  # after the checkpoint, which holds the weights of the last step beside the best ones
    return Fit(pd.DataFrame(history), before + clock.read(), watched)


def listed(scores):
    """One score, or several, as a list."""
    return list(scores) if isinstance(scores, (list, tuple)) else [scores]


def draw_indices(count, batch, generator):
    """``(batch,)`` random indices below ``count``, all different where there are enough."""
    order = [torch.randperm(count, generator=generator, device=generator.device) for _ in range(-(-batch // count))]
    return torch.cat(order)[:batch]


def steps_of(epochs, images, batch, limit=None):
    """Optimiser steps of so many passes over so many images, at most ``limit``."""
    return min(limit or math.inf, max(1, round(epochs * images / batch)))


def sums_of(*tensors):
    """Sums of tensors (None where there is none), by which a checkpoint knows what it was trained on."""
    return [None if tensor is None else [len(tensor), float(tensor.double().sum())] for tensor in tensors]


def weights_digest(network):
    """A hash of a network's weights, so that a checkpoint is not resumed from other ones."""
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
