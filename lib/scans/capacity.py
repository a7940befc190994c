"""`python -m lib.scans.capacity`: how much memory many slices take, and a large volume; to results/capacity.json.

Made-up volumes of 100 slices, one of them labelled, go through everything that `make segment` does, at scale smoke:
first few of them, then many. What grows with their number lies on disk. Then a model of whole volumes is applied to a
large one.
"""

import json
import os
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
LARGE = 512, 512, 700
SETTINGS = "folder.space=slices", "folder.size=32", "pseudo_masks.n=2", "folder.degraded_views=2"
WHOLE = "folder.space=volumes", *SETTINGS[2:]


def write_volumes(folder, count, shape=(SIDE, SIDE, SLICES), masks=1, extent=None):
    """``count`` noisy balls, the first ``masks`` of them with a mask; ``extent`` in mm, or voxels of 1 mm."""
    affine = np.diag([*(np.array(extent or shape) / shape), 1.0])
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in tqdm(range(count), desc="writing", unit="volume"):
        distance = sum(
            ((axis - rng.uniform(0.4, 0.6) * side) / side) ** 2
            for axis, side in zip(np.ogrid[tuple(map(slice, shape))], shape)
        )
        inside = distance < rng.uniform(0.03, 0.08)
        image = (100 * inside).astype(np.int16)
        image += rng.integers(0, 60, shape, np.int16)
        nib.save(nib.Nifti1Image(image, affine), folder / "images" / f"volume_{k:04d}.nii")
        if k < masks:
            nib.save(nib.Nifti1Image(inside.astype(np.uint8), affine), folder / "masks" / f"volume_{k:04d}.nii.gz")


def segment(folder, *settings):
    """`make segment` in a process of its own: seconds and peak resident memory in megabytes."""
    command = [sys.executable, "-m", "lib.scans", folder / "images", folder / "out", "--masks", folder / "masks"]
    changes = [part for setting in settings for part in ("-S", setting)]
    started = time.perf_counter()
    process = subprocess.Popen([*command, *changes], cwd=ROOT, env={**os.environ, "JOINT_SET": "scale=smoke"})
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(status, command)
    return {"seconds": round(time.perf_counter() - started), "peak_mb": round(used.ru_maxrss / 1024)}


def measure_many(count):
    """``count`` volumes of SLICES slices, one of them with a mask."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_volumes(folder, count)
        cost = segment(folder, *SETTINGS)
        written = len(list((folder / "out").glob("*_mask.nii.gz")))
        stored = sum(file.stat().st_size for file in (folder / "out" / "work" / "scans").rglob("*.*"))
    return {"slices": SLICES * written, **cost, "store_mb": round(stored / 2**20)}


def measure_large(shape=LARGE):
    """One volume of this shape, by a model of whole volumes; reading and writing it included."""
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        write_volumes(small, 3, (SIDE,) * 3, extent=shape)
        segment(small, *WHOLE)
        write_volumes(large, 1, shape, masks=0)
        cost = segment(large, f"folder.model={small / 'out' / 'model.safetensors'}", *WHOLE)
        assert len(list((large / "out").glob("*_mask.nii.gz"))) == 1
    return {"shape": shape, **cost}


def main():
    found = {"side": SIDE, "runs": [measure_many(count) for count in VOLUMES], "large": measure_large()}
    file = output_root() / "results" / "capacity.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(file.read_text())


if __name__ == "__main__":
    main()
