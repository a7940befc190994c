"""`make bench`: what memory layout, allocator and bfloat16 bring, measured in one run at 256 x 256 and in 3D.

Plain PyTorch (contiguous float32, the system's allocator defaults) against the project's own path (lib.compute).
The real training steps are timed, on made-up images, in turns, so that other work on the machine slows both alike;
writes results/bench.json.
"""

import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from torch.nn.functional import interpolate
from tqdm import tqdm

from lib.compute import Numerics, best_device
from lib.losses import registration_loss, soft_dice_loss
from lib.models import ROOT, MrRegNet, ResidualUNet, strides_of
from lib.pseudo_masks import generate
from lib.runs.params import load, output_root

SIDE, BATCH, REPEATS, TURNS = 256, 5, 5, 4
VOLUME, VOLUMES = (48, 48, 64), 2  # voxels, and how many volumes there are in a batch
TRAINED = 5  # steps before losses are compared: MrRegNet begins at the identity, whatever its precision


class Plain:
    """PyTorch as it comes: the reference that Numerics is measured against."""

    precision = "float32"
    formats = {}
    share = 1.0

    def __init__(self, device):
        self.device = device

    place = Numerics.place
    tensor = Numerics.tensor
    autocast = Numerics.autocast
    batch = Numerics.batch


def seconds(work, device, repeats):
    """Seconds of every ``work()`` after one warm-up, the GPU's queue waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return times[1:]


class Work:
    """The real training losses and pseudo-masks of both networks, on smooth made-up images or volumes.

    Args:
        numerics: Numerics, or Plain.
        settings: as params.load gives them.
        space: sides of the images; None for slices of SIDE.
    """

    def __init__(self, numerics, settings, space=None):
        self.numerics, self.settings = numerics, settings
        space, self.batch = (space, VOLUMES) if space else ((SIDE, SIDE), BATCH)
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(2 * self.batch, 1, *[12] * len(space), generator=generator)
        smooth = interpolate(coarse, size=space, mode="bicubic" if len(space) == 2 else "trilinear").clamp(0, 1)
        self.images, self.masks = numerics.tensor(smooth), numerics.tensor((smooth > 0.6).float())
        torch.manual_seed(0)
        strides = strides_of([1] * len(space), space)
        root = ROOT if len(space) == 2 else settings.volumes.root
        self.segmentation = numerics.place(ResidualUNet(root=root, strides=strides))
        self.registration = numerics.place(MrRegNet(strides=strides))

    def segmentation_loss(self):
        with self.numerics.autocast():
            prediction = self.segmentation.segment(self.images[: self.batch])
        return soft_dice_loss(prediction, self.masks[: self.batch])

    def registration_loss(self):
        source, target = self.images.split(self.batch)
        with self.numerics.autocast():
            levels = self.registration(source, target)
        guides = self.masks.split(self.batch)
        return registration_loss(levels, source, target, self.settings.registration.smoothness, *guides).total

    def pseudo_masks(self):
        draws = torch.Generator(self.numerics.device).manual_seed(0)
        networks = self.segmentation, self.registration
        generate(
            networks,
            self.images[: self.batch],
            self.images,
            self.masks,
            self.settings.pseudo_masks,
            True,
            draws,
            self.numerics,
        )

    def training(self):
        """A training step of each network, as functions that give the loss."""

        def training_of(network, loss):
            optimiser = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0, fused=True)

            def step():
                optimiser.zero_grad()
                value = loss()
                value.backward()
                optimiser.step()
                return value.detach()

            return step

        return {
            "seg": training_of(self.segmentation, self.segmentation_loss),
            "reg": training_of(self.registration, self.registration_loss),
        }

    def losses(self):
        """Both losses after some steps of training."""
        return {name: float([step() for _ in range(TRAINED)][-1]) for name, step in self.training().items()}

    def times(self):
        """Seconds per image (or pair) of every training step, and of soft pseudo-masks of slices, as lists."""
        device, whole = self.numerics.device, self.images.ndim == 5
        ending = "train_3d" if whole else "train"
        times = {f"{name}_{ending}": seconds(step, device, REPEATS) for name, step in self.training().items()}
        if not whole:
            times["pseudo_mask"] = seconds(self.pseudo_masks, device, max(1, REPEATS // 2))
        return {name: [one / self.batch for one in found] for name, found in times.items()}


def times_of(make_numerics, settings, sizes):
    """Work.times in a process of its own, because Numerics changes the allocator of the process for good."""
    globals().update(sizes)
    numerics = make_numerics()
    return Work(numerics, settings).times() | Work(numerics, settings, VOLUME).times()


LABELS = {
    "seg_train": "U-Net, training",
    "reg_train": "MrRegNet, training",
    "pseudo_mask": "soft pseudo-mask (2N = 10)",
    "seg_train_3d": "U-Net in 3D, training",
    "reg_train_3d": "MrRegNet in 3D, training",
}


def main():
    settings = load()
    device = best_device(settings.device)
    ways = {"plain": partial(Plain, device), "ours": partial(Numerics, settings.device, settings.precision)}
    times = {way: dict.fromkeys(LABELS, ()) for way in ways}
    sizes = {"SIDE": SIDE, "BATCH": BATCH, "REPEATS": REPEATS, "VOLUME": VOLUME, "VOLUMES": VOLUMES}
    spawn = multiprocessing.get_context("spawn")
    for _ in tqdm(range(TURNS), desc="turns", unit="turn"):
        for way, make in ways.items():
            with ProcessPoolExecutor(1, spawn) as pool:
                for name, found in pool.submit(times_of, make, settings, sizes).result().items():
                    times[way][name] += tuple(found)
    plain, ours = ({name: statistics.median(found) for name, found in times[way].items()} for way in ways)
    numerics = Numerics(settings.device, settings.precision)
    float32_losses = Work(Plain(device), settings).losses()
    bfloat16_losses = Work(Numerics(settings.device, "bfloat16"), settings).losses()
    table = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": numerics.precision,
        "side": SIDE,
        "batch": BATCH,
        "volume": VOLUME,
        "volumes": VOLUMES,
    }
    sides = " x ".join(map(str, VOLUME))
    print(f"\n{table['device']}, {table['threads']} threads, {numerics.precision}: {SIDE} x {SIDE}, batch {BATCH};")
    print(f"in 3D {sides}, batch {VOLUMES}\n")
    print(f"{'seconds per image or pair':28}{'plain':>10}{'here':>10}{'speed-up':>10}")
    for name, label in LABELS.items():
        table |= {
            f"{name}_seconds_plain": plain[name],
            f"{name}_seconds": ours[name],
            f"{name}_speedup": plain[name] / ours[name],
        }
        print(f"{label:28}{plain[name]:10.4f}{ours[name]:10.4f}{plain[name] / ours[name]:10.2f}")
    for name, loss in float32_losses.items():
        difference = table[f"{name}_loss_difference"] = abs(bfloat16_losses[name] / loss - 1)
        print(f"{name} loss in bfloat16 and in float32: {100 * difference:.3f} % apart after {TRAINED} steps")
        if difference > 0.02:
            raise SystemExit(f"the {name} loss differs by more than 2 %")
    file = output_root() / "results" / "bench.json"
    file.parent.mkdir(exist_ok=True)
    rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in table.items()}
    file.write_text(json.dumps(rounded, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
