"""`python lib/runs/torch_build.py`: before torch is installed, whether the build that pip would take fits this machine.

Says nothing where it does. It runs in an empty environment and stops no installation.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
INDEX = "https://download.pytorch.org/whl"
CHANGE = f"run `. .venv/bin/activate && pip install {{torch}} --index-url {INDEX}/{{build}}`, then make again"


def has_gpu():
    """Whether NVIDIA's driver is there and sees a GPU."""
    try:
        return "GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False


def brings_cuda(report):
    """Whether the build of torch in a report of pip would bring CUDA's libraries to this system.

    Args:
        report: what ``pip install --dry-run --report`` gives, as a dictionary.
    """
    needed = report["install"][0]["metadata"].get("requires_dist", [])
    markers = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}
    other = [system for name, system in markers.items() if name != sys.platform]
    here = [line for line in needed if "extra ==" not in line and not any(f'"{system}"' in line for system in other)]
    return any(re.match(r"(nvidia|cuda)[-_]", line) for line in here)


def advice(gpu, cuda, torch):
    """One line where torch's build and the machine do not go together, else nothing."""
    if cuda and not gpu:
        what = "torch brings gigabytes of CUDA libraries, and this machine has no GPU. For the CPU build "
        return what + CHANGE.format(torch=torch, build="cpu")
    if gpu and not cuda:
        what = "this machine has a GPU, and torch comes without CUDA. For a build that uses it "
        return what + CHANGE.format(torch=torch, build="cu130")
    return ""


def main():
    torch = re.search(r"^torch==\S+", REQUIREMENTS.read_text(), re.MULTILINE)[0]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--dry-run",
        "--no-deps",
    ]
    done = subprocess.run([*command, "--report", "-", torch], capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except ValueError:  # pip itself will say what is wrong
        return
    if report.get("install") and (line := advice(has_gpu(), brings_cuda(report), torch)):
        print(line)  # where torch is there already, nothing is to be installed


if __name__ == "__main__":
    main()
