"""`python benchmarks/steps.py`: what a training step of the networks costs on this machine's GPU, or its CPU.

Sizes, precisions and memory layouts beside one another. Writes results/steps/<device>.csv: milliseconds a step, those
in which the GPU computes, and the memory that it takes. Where the two times are far apart the GPU waits for Python:
several trainings at a time then share it well.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from lib.compute import Numerics
from lib.losses import segmentation_loss
from lib.models import ROOT, MrRegNet, ResidualUNet, strides_of
from lib.runs.params import load, output_root

WORK = (
    ("U-Net", (64, 64), 16),
    ("U-Net", (128, 128), 16),
    ("U-Net", (256, 256), 16),
    ("U-Net", (48, 48, 64), 2),
    ("MrRegNet", (64, 64), 5),
    ("MrRegNet", (256, 256), 5),
    ("MrRegNet", (48, 48, 64), 2),
)
WARM, PROFILED = 5, 5  # steps


def step_of(name, space, batch, numerics):
    """A training step of a network on noise, as a function."""
    torch.manual_seed(0)
    strides = strides_of([1] * len(space), space)
    if name == "U-Net":
        root = ROOT if len(space) == 2 else load().volumes.root
        network = ResidualUNet(normalisation="instance", root=root, strides=strides)
    else:
        network = MrRegNet("instance", strides=strides)
    network = numerics.place(network)
    images = numerics.tensor(torch.rand(batch, 1, *space))
    masks = numerics.tensor((torch.rand(batch, 1, *space) > 0.5).float())
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3, fused=True)

    def step():
        with numerics.autocast():
            output = network(images) if name == "U-Net" else network(images, masks)[-1][0]
        loss = segmentation_loss(output, masks, False) if name == "U-Net" else output.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def cost(step, device, steps):
    """Milliseconds of a step; on a GPU also those in which it computes, and the most gigabytes that it held."""
    gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if gpu else lambda: None
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM):
        step()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    found = {"ms": 1000 * (time.perf_counter() - start) / steps}
    if gpu:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(PROFILED):
                step()
            wait()
        busy = sum(event.self_device_time_total for event in profiled.key_averages())
        found |= {"busy_ms": busy / 1000 / PROFILED, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="that are timed")
    steps = parser.parse_args().steps
    rows = []
    ways = [(precision, how) for precision in ("float32", "bfloat16") for how in ("fixed", "contiguous", "fastest")]
    for name, space, batch in tqdm(WORK, desc="networks"):
        for precision, how in ways:
            numerics = Numerics(precision=precision, deterministic=how != "fastest")
            if how == "contiguous":
                numerics.formats = {}
            sides = " x ".join(map(str, space))
            of = {"network": name, "image": sides, "batch": batch, "precision": precision, "convolutions": how}
            rows.append(of | cost(step_of(name, space, batch, numerics), numerics.device, steps))
    file = output_root() / "results" / "steps" / f"{numerics.name.replace(' ', '_')}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).round(3).to_csv(file, index=False)
    print(pd.DataFrame(rows).round(2).to_string(index=False))
    print(f"written to {file}")


if __name__ == "__main__":
    main()
