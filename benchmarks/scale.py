"""`python benchmarks/scale.py`: what very many images would cost, reckoned from what has been measured.

A million unlabelled slices, or 100,000 volumes: hours, disk and money on CPUs and GPUs. Nothing is run. Rates are those
of results/bench.json, results/throughput.json and results/steps/. Writes scale.csv and scale.md to results/.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

from lib.results.tables import as_markdown
from lib.runs import cluster, params
from lib.scans.cases import SMALL
from lib.scans.progress import TRAINED

RESULTS = params.output_root() / "results"
GPU = "NVIDIA_H100_80GB_HBM3"
PRICES = {"CPU": 0.05, "GPU": 3.0}  # US dollars an hour, of a core and of a GPU: assumed, put in your own
CORES = 32  # of a CPU node; it is taken to be that many cores' worth of the measured machine
BYTES = 2  # of a stored pixel
WORK = {  # images, pixels of each, training steps and batch at scale paper, as bench.json and the steps name them
    "1,000,000 slices of 256 x 256": (1_000_000, 256**2, 30_000, 16, "seg_train_seconds", "256 x 256"),
    "100,000 volumes of 48 x 48 x 64": (100_000, 48 * 48 * 64, 10_000, 4, "seg_train_3d_seconds", "48 x 48 x 64"),
}
MACHINES = {"2 CPU cores": ("CPU", 2), "100 CPU nodes": ("CPU", 100 * CORES)}
MACHINES |= {f"{count} GPU{'s' * (count > 1)}": ("GPU", count) for count in (1, 8, 64)}
ALONE = "2 CPU cores", "1 GPU"  # one process does all: nothing is handed out


def seconds_an_image(kind, bench, steps, name, image):
    """Of training, on one core or one GPU."""
    if kind == "CPU":
        return bench[name] * bench["threads"]
    fastest = steps[(steps["network"] == "U-Net") & (steps["image"] == image)].sort_values("ms").iloc[0]
    return fastest["ms"] / 1e3 / fastest["batch"]


def handing_out(throughput, images, pixels, workers):
    """Seconds that the scheduler takes to hand out an image; several small ones go out as one piece."""
    size = max(1, min(cluster.together(images, workers), SMALL // pixels))
    share = (size - 1) / (throughput["together"] - 1)
    each = throughput["handing_out_ms"] * (1 - share) + throughput["handing_out_together_ms"] * share
    return each / 1e3 / size


def reckon(bench, steps, throughput, views):
    """Rows of the table.

    Args:
        bench, throughput: what the files of these names hold.
        steps: table of training steps on a GPU.
        views: augmented ones of every image, whose mean is its mask.
    """
    rows = []
    for work, (images, pixels, training, batch, name, image) in WORK.items():
        for machine, (kind, count) in MACHINES.items():
            one = seconds_an_image(kind, bench, steps, name, image)
            # Training is one process on one GPU, or on the cores of one node: more would need data-parallel training.
            trained = one * training * batch / (min(count, CORES) if kind == "CPU" else 1)
            handed = 0 if machine in ALONE else images * handing_out(throughput, images, pixels, count)
            segmented = max(handed, images * views * one / TRAINED / count)
            hours = (trained + segmented) / 3600
            rows.append(
                {
                    "images": work,
                    "machine": machine,
                    "training_hours": trained / 3600,
                    "segmenting_hours": segmented / 3600,
                    "bound": "scheduler" if segmented == handed else "networks",
                    "store_gb": images * pixels * BYTES / 1e9,
                    "dollars": hours * count * PRICES[kind],
                }
            )
    return pd.DataFrame(rows)


def main():
    read = lambda name: json.loads((RESULTS / name).read_text())
    views = params.load("strong", "folder").pseudo_masks.n
    table = reckon(read("bench.json"), pd.read_csv(RESULTS / "steps" / f"{GPU}.csv"), read("throughput.json"), views)
    table.round(3).to_csv(RESULTS / "scale.csv", index=False)
    shown = {"training_hours": "{:.2f}", "segmenting_hours": "{:.2f}", "store_gb": "{:.0f}", "dollars": "{:,.0f}"}
    for column, form in shown.items():
        table[column] = table[column].map(form.format)
    (RESULTS / "scale.md").write_text(as_markdown(table.to_dict("records")))
    print(table.to_string())


if __name__ == "__main__":
    main()
