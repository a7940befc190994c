"""`python -m lib.scans.capacity`: how much memory a folder of many slices takes, written to results/capacity.json.

Made-up volumes of 100 slices, one of them labelled, go through everything that `make segment` does, at scale smoke:
first few of them, then many. What grows with their number lies on disk.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from lib.runs.params import ROOT, output_root

SLICES, SIDE = 100, 32  # of a volume
VOLUMES = 10, 500
SETTINGS = "folder.space=slices", "folder.size=32", "pseudo_masks.n=2", "folder.degraded_views=2"


def write_volumes(folder, count):
    """``count`` noisy balls, the first with a mask."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in tqdm(range(count), desc="writing", unit="volume"):
        axes = np.ogrid[:SIDE, :SIDE, :SLICES]
        distance = sum(
            ((axis - rng.uniform(0.4, 0.6) * side) / side) ** 2 for axis, side in zip(axes, (SIDE, SIDE, SLICES))
        )
        inside = distance < rng.uniform(0.03, 0.08)
        image = (100 * inside + rng.integers(0, 60, inside.shape)).astype(np.int16)
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "images" / f"volume_{k:04d}.nii.gz")
        if k == 0:
            nib.save(nib.Nifti1Image(inside.astype(np.uint8), np.eye(4)), folder / "masks" / f"volume_{k:04d}.nii.gz")


def measure(count):
    """Segment ``count`` volumes in a process of its own: slices, seconds and peak resident memory."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_volumes(folder, count)
        settings = [part for setting in SETTINGS for part in ("-S", setting)]
        command = [sys.executable, "-m", "lib.scans", folder / "images", folder / "out", "--masks", folder / "masks"]
        started = time.perf_counter()
        subprocess.run([*command, *settings], cwd=ROOT, env={**os.environ, "JOINT_SET": "scale=smoke"}, check=True)
        seconds = time.perf_counter() - started
        written = len(list((folder / "out").glob("*_mask.nii.gz")))
        stored = sum(file.stat().st_size for file in (folder / "out" / "work" / "scans").rglob("*.*"))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of the largest so far: fewer go first
    return {
        "slices": SLICES * written,
        "seconds": round(seconds),
        "peak_mb": round(peak),
        "store_mb": round(stored / 2**20),
    }


def main():
    rows = [measure(count) for count in VOLUMES]
    file = output_root() / "results" / "capacity.json"
    file.write_text(json.dumps({"side": SIDE, "runs": rows}, indent=1) + "\n")
    print(file.read_text())


if __name__ == "__main__":
    main()
