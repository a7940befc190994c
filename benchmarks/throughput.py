"""`python benchmarks/throughput.py`: cases per second by one worker and by two, and what a thousand would make of it.

Made-up small volumes are read and segmented by a given model, as `make segment` does. What a case takes, and what Dask
takes to hand it out, are measured; from these a simulation says where more workers bring nothing more. Writes
throughput.json and throughput.md to results/. It needs a machine that is not busy.
"""

import argparse
import heapq
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker is a core
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nibabel as nib
import numpy as np
import psutil
from tqdm import tqdm

from lib.results.tables import as_markdown
from lib.runs import cluster, params
from lib.scans.cases import segmented, workers
from lib.scans.networks.model_file import load_model
from lib.scans.reading.folder import find_cases
from lib.scans.reading.intake import take_in
from lib.scans.reading.store import Store

SHAPE = 32, 32, 16
SETTINGS = "folder.space=slices", "folder.size=32", "pseudo_masks.n=2", "folder.degraded_views=2", "scale=smoke"
SIMULATED = 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000
MANY = 100_000  # cases, in the simulation


def write_cases(folder, count, masks=0):
    """``count`` noisy balls, the first ``masks`` of them with masks."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    rng, axes = np.random.default_rng(0), np.ogrid[tuple(map(slice, SHAPE))]
    for k in tqdm(range(count), desc="writing", unit="case"):
        inside = sum((axis / side - rng.uniform(0.4, 0.6)) ** 2 for axis, side in zip(axes, SHAPE)) < 0.06
        image = (100 * inside + rng.integers(0, 60, SHAPE)).astype(np.int16)
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "images" / f"case_{k:06d}.nii.gz")
        if k < masks:
            nib.save(nib.Nifti1Image(inside.astype(np.uint8), np.eye(4)), folder / "masks" / f"case_{k:06d}.nii.gz")


def train(folder):
    """A model of a few steps; what it has learnt does not matter here."""
    write_cases(folder, 4, masks=2)
    words = [sys.executable, "-m", "lib.scans", folder / "images", folder / "out", "--masks", folder / "masks"]
    words += [word for setting in SETTINGS for word in ("-S", setting)]
    subprocess.run(words, cwd=params.ROOT, check=True)
    return folder / "out" / "model.safetensors"


def memory():
    """Megabytes of this process and of all that it has started."""
    own = psutil.Process()
    return sum(process.memory_info().rss for process in (own, *own.children(recursive=True))) / 2**20


def measure(folder, model_file, count):
    """Read and segment all cases by ``count`` workers: seconds a case of both, seconds of every case, and megabytes.

    One worker is this process itself, without Dask.
    """
    with tempfile.TemporaryDirectory() as output:
        settings = params.load("strong", "folder", changes=[*SETTINGS, f"folder.workers={count}"])
        params.use_folder(settings, images=str(folder / "images"), output=output, model=str(model_file))
        model, found = load_model(model_file), find_cases(folder / "images", None, "{case}")
        (plan,) = model.plans
        store = Store(Path(output) / "store", plan)
        with params.outputs_under(output), workers(settings, len(found)) as client:
            if client:  # what starting costs does not grow with the cases
                client.wait_for_workers(count)
                client.run(load_model, str(model_file))
            began = time.perf_counter()
            intake = take_in(settings.folder, found, [store], client)
            read = time.perf_counter()
            pairs = [(case, [np.arange(len(store.images(case.name)))]) for case in intake.cases]
            times, peak = [time.perf_counter()], 0
            for row in segmented(settings, [store], Path(output), pairs, client):
                assert row["status"] == "done", row
                times.append(time.perf_counter())
                if len(times) % 100 == 0:
                    peak = max(peak, memory())
    cases = len(found)
    return (read - began) / cases, (times[-1] - times[0]) / cases, np.diff(times), peak


def handing_out(count, size):
    """Seconds that Dask takes to give ``size`` cases to a worker and their rows back, with nothing to be done."""
    settings = params.load("strong", "folder")
    with (
        tempfile.TemporaryDirectory() as output,
        params.outputs_under(output),
        cluster.connect(settings, 2) as client,
    ):
        client.wait_for_workers(2)
        [*cluster.mapped(client, bool, range(100))]
        began = time.perf_counter()
        [*cluster.mapped(client, bool, range(count), size=size)]
        return (time.perf_counter() - began) / (count / size)


def simulate(takes, handing, workers):
    """Seconds until MANY cases are done: pieces go out one after another, each to the worker that is free first.

    Args:
        takes: seconds that cases have taken; the simulation goes through them again and again.
        handing: seconds to hand a piece out, by its number of cases, 1 or TOGETHER; during it no other is.
    """
    size = cluster.together(MANY, workers)
    share = (size - 1) / (cluster.TOGETHER - 1)
    each = handing[1] * (1 - share) + handing[cluster.TOGETHER] * share
    free, now = [0.0] * workers, 0.0
    for first in range(0, MANY, size):
        now = max(now + each, free[0])
        heapq.heapreplace(free, now + sum(takes[k % len(takes)] for k in range(first, min(first + size, MANY))))
    return max(free)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    count = parser.parse_args().cases
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model_file = train(folder / "small")
        write_cases(folder / "many", count)
        measured, rows = {}, []
        for number in (1, 2):
            reading, segmenting, takes, peak = measure(folder / "many", model_file, number)
            measured[number] = reading + segmenting
            rows.append({"workers": number, "read_ms": 1e3 * reading, "segment_ms": 1e3 * segmenting, "peak_mb": peak})
            if number == 1:
                takes_of_one = takes
    handing = {size: handing_out(count, size) for size in (1, cluster.TOGETHER)}
    alone = simulate(takes_of_one, handing, 1)
    curve = [
        {
            "workers": number,
            "hours": (seconds := simulate(takes_of_one, handing, number)) / 3600,
            "speed_up": alone / seconds,
        }
        for number in SIMULATED
    ]
    found = {
        "cases": count,
        "runs": rows,
        "speed_up": measured[1] / measured[2],
        "handing_out_ms": 1e3 * handing[1],
        "together": cluster.TOGETHER,
        "handing_out_together_ms": 1e3 * handing[cluster.TOGETHER],
        "simulated_cases": MANY,
        "simulated": curve,
    }
    results = params.output_root() / "results"
    results.mkdir(exist_ok=True)
    rounded = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}"))
    (results / "throughput.json").write_text(json.dumps(rounded, indent=1) + "\n")
    named = [
        {"workers": row["workers"], "hours": f"{row['hours']:.2f}", "speed-up": f"{row['speed_up']:.1f}"}
        for row in curve
    ]
    (results / "throughput.md").write_text(as_markdown(named))
    print(json.dumps(rounded, indent=1))


if __name__ == "__main__":
    main()
