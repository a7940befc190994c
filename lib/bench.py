"""`make bench`: what memory layout, allocator and bfloat16 bring, measured in one run at 256 x 256.

Plain PyTorch (contiguous float32, the system's allocator defaults) against the project's own path (lib.compute).
The real training steps are timed, on made-up images; writes results/bench.json.
"""

import json
import time
from types import SimpleNamespace

import torch

from lib.compute import Numerics, best_device
from lib.losses import registration_loss, soft_dice_loss
from lib.models import MrRegNet, ResidualUNet
from lib.params import load, output_root
from lib.pseudo_masks import generate

SIDE, BATCH, REPEATS = 256, 5, 5


class Plain:
    """PyTorch as it comes: the reference that Numerics is measured against."""

    precision = "float32"
    memory_format = torch.contiguous_format

    def __init__(self, device):
        self.device = device

    place = Numerics.place
    tensor = Numerics.tensor
    autocast = Numerics.autocast
    batch = Numerics.batch


def seconds(work, device, repeats=REPEATS):
    """Median seconds of ``work()`` after one warm-up, the GPU's queue waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def measure(numerics, settings):
    """Losses of the first step and seconds per image (or pair) of training and pseudo-masks."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(2 * BATCH, 1, 12, 12, generator=generator), size=(SIDE, SIDE), mode="bicubic"
    ).clamp(0, 1)
    images, masks = numerics.tensor(smooth), numerics.tensor((smooth > 0.6).float())
    source, target = images[:BATCH], images[BATCH:]
    torch.manual_seed(0)
    segmentation, registration = numerics.place(ResidualUNet()), numerics.place(MrRegNet())

    def segmentation_loss():
        with numerics.autocast():
            prediction = segmentation.segment(source)
        return soft_dice_loss(prediction, masks[:BATCH])

    def registration_objective():
        with numerics.autocast():
            levels = registration(source, target)
        guides = masks[:BATCH], masks[BATCH:]
        return registration_loss(levels, source, target, settings.registration.smoothness, *guides).total

    found = {}
    for name, network, loss in (
        ("seg", segmentation, segmentation_loss), ("reg", registration, registration_objective)
    ):
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

        def step():
            optimiser.zero_grad(set_to_none=True)
            loss().backward()
            optimiser.step()

        with torch.no_grad():
            found[f"{name}_loss"] = float(loss())
        found[f"{name}_train"] = seconds(step, numerics.device) / BATCH
    quiet = SimpleNamespace(**settings.pseudo_masks)
    draws = torch.Generator(numerics.device).manual_seed(0)
    work = lambda: generate((segmentation, registration), source, images, masks, quiet, True, draws, numerics)
    found["pseudo_mask"] = seconds(work, numerics.device, 3) / BATCH
    return found


def main():
    settings = load()
    device = best_device(settings.device)
    plain = measure(Plain(device), settings)  # first: Numerics changes the allocator for good
    numerics = Numerics(settings.device, settings.precision)
    ours = measure(numerics, settings)
    reduced = numerics.precision if numerics.precision == "bfloat16" else "bfloat16, emulated"
    checked = Numerics(settings.device, "bfloat16")
    with_bfloat16 = ours if numerics.precision == "bfloat16" else measure_losses(checked, settings)
    table = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "precision": numerics.precision, "side": SIDE, "batch": BATCH,
    }
    print(f"{table['device']}, {table['threads']} threads, {SIDE} x {SIDE}, batch {BATCH}, {numerics.precision}\n")
    print(f"{'seconds per image or pair':28}{'plain':>10}{'here':>10}{'speed-up':>10}")
    for name, label in (("seg_train", "U-Net, training"), ("reg_train", "MrRegNet, training"),
                        ("pseudo_mask", "soft pseudo-mask (2N = 10)")):
        table |= {f"{name}_seconds_plain": plain[name], f"{name}_seconds": ours[name],
                  f"{name}_speedup": plain[name] / ours[name]}
        print(f"{label:28}{plain[name]:10.4f}{ours[name]:10.4f}{plain[name] / ours[name]:10.2f}")
    for name in ("seg", "reg"):
        difference = abs(with_bfloat16[f"{name}_loss"] / plain[f"{name}_loss"] - 1)
        table[f"{name}_loss_difference"] = difference
        print(f"{name} loss, {reduced} against float32: {100 * difference:.2f} % apart")
        if difference > 0.02:
            raise SystemExit(f"the {name} loss differs by more than 2 %")
    file = output_root() / "results" / "bench.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in table.items()}, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
