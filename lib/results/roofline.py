"""`python -m lib.results.roofline`: how close every stage comes to what this machine can do, in 2D and in 3D.

Operations are those of convolutions and matrix products. Bytes are what all operations of torch read and write, as if
nothing stayed in a cache. Each divided by the machine's own measured rate is a time, and the larger of the two is the
floor: no version of the same operations is much faster. What a cache keeps makes the floor by bytes too high, so a
share may exceed 1. Writes results/roofline.json and roofline.md.
"""

import json
import statistics

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lib.augment import light, place
from lib.compute import Numerics
from lib.methods.mean_teacher import MeanTeacher
from lib.methods.peers.bcp import box, paste
from lib.refinement import refine
from lib.results.tables import as_markdown
from lib.runs.bench import VOLUME, Work, seconds
from lib.runs.params import load, output_root

MATRIX, COPIED, REPEATS = 2048, 2**28, 5  # side of the matrices; bytes


class Traffic(TorchDispatchMode):
    """Context that counts the bytes that operations read and write; those that give a view move nothing."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        aliases = [value.alias_info for value in operation._schema.returns]
        view = aliases and all(alias is not None and not alias.is_write for alias in aliases)
        if not view and "empty" not in str(operation):
            tensors = tree_leaves((args, kwargs, output))
            self.bytes += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
        return output


def counted(work):
    """Operations and bytes of one ``work()``."""
    with FlopCounterMode(display=False) as operations, Traffic() as traffic:
        work()
    return operations.get_total_flops(), traffic.bytes


def machine(device):
    """What the machine reaches, per second: operations of a matrix product in both precisions, bytes of a copy."""
    rates = {}
    for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        first, second = (torch.randn(MATRIX, MATRIX, device=device).to(kind) for _ in range(2))
        rates[name] = 2 * MATRIX**3 / min(seconds(lambda: first @ second, device, REPEATS))
    source = torch.randn(COPIED // 4, device=device)
    target = torch.empty_like(source)
    rates["bytes"] = 2 * COPIED / min(seconds(lambda: target.copy_(source), device, REPEATS))
    return rates


def stages(work):
    """Functions by name, each one batch of a stage: recipe `strong` where it differs from the paper's.

    Args:
        work: bench.Work, which holds images, networks and settings.
    """
    numerics, settings, n = work.numerics, work.settings, work.batch
    strong, images, masks, spare = settings.strong, work.images[:n], work.masks[:n], work.images[n:]
    draws = numerics.generator("roofline")
    field = torch.zeros(n, images.ndim - 2, *images.shape[2:], device=numerics.device)
    teacher = numerics.place(MeanTeacher(work.segmentation, strong.training.decay))
    training = work.training()

    def augmentation():
        moved, _ = place(images, masks, draws, strong.augmentation, False)
        return light(moved, draws, strong.augmentation)

    def copy_paste():
        inside = box(n, images.shape[2:], strong.bcp.share, draws)
        return paste(images, spare, inside), paste(masks, masks, inside)

    def network():
        with numerics.autocast():
            logits = work.segmentation(images)
        logits.backward(masks)  # any gradient does, in the layout of a real one

    def whole_step():
        augmentation(), copy_paste(), training["seg"](), teacher.update()

    found = {
        "U-Net, forward and backward": network,
        "U-Net, training step": training["seg"],
        "MrRegNet, training step": training["reg"],
        "refinement": lambda: refine(field, images, spare, settings.refinement),
        "augmentation": augmentation,
        "copy-paste": copy_paste,
        "whole step of BCP": whole_step,
    }
    if images.ndim == 4:
        found["soft pseudo-masks"] = work.pseudo_masks
    return found


def measure(work, rates):
    """Rows of the table, one per stage."""
    rows, device = [], work.numerics.device
    for name, stage in tqdm(stages(work).items(), desc=f"{work.images.ndim - 2}D", unit="stage"):
        operations, moved = counted(stage)
        took = statistics.median(seconds(stage, device, REPEATS))
        compute = operations / rates[work.numerics.precision]
        rows.append(
            {
                "stage": name,
                "space": f"{work.images.ndim - 2}D",
                "batch": work.batch,
                "seconds": took,
                "gigaoperations": operations / 1e9,
                "gigabytes": moved / 1e9,
                "compute_share": compute / took,
                "memory_share": moved / rates["bytes"] / took,
            }
        )
    return rows


def main():
    settings = load()
    numerics = Numerics(settings.device, settings.precision, settings.deterministic)
    rates = machine(numerics.device)
    rows = [row for space in (None, VOLUME) for row in measure(Work(numerics, settings, space), rates)]
    table = {"device": numerics.name, "precision": numerics.precision}
    table |= {f"{name}_rate": rate / 1e9 for name, rate in rates.items()}
    for space in ("2D", "3D"):
        took = {row["stage"]: row["seconds"] for row in rows if row["space"] == space}
        table[f"network_share_{space}"] = took["U-Net, forward and backward"] / took["whole step of BCP"]
    rounded = lambda of: {name: round(value, 4) if isinstance(value, float) else value for name, value in of.items()}
    results = output_root() / "results"
    results.mkdir(exist_ok=True)
    text = json.dumps({**rounded(table), "stages": [rounded(row) for row in rows]}, indent=1)
    (results / "roofline.json").write_text(text + "\n")
    shown = [
        {
            "stage": row["stage"],
            "images": row["space"],
            "ms": f"{1000 * row['seconds']:.0f}",
            "GFLOP": f"{row['gigaoperations']:.1f}",
            "GB": f"{row['gigabytes']:.2f}",
            "of the matrix rate": f"{row['compute_share']:.0%}",
            "of the memory rate": f"{row['memory_share']:.0%}",
        }
        for row in rows
    ]
    (results / "roofline.md").write_text(as_markdown(shown))
    print((results / "roofline.md").read_text())


if __name__ == "__main__":
    main()
