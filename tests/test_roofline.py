import pytest
import torch

from lib.compute import Numerics
from lib.results import roofline
from lib.runs import bench
from lib.runs.params import load


def test_operations_and_bytes_are_those_of_a_convolution_and_a_view_moves_nothing():
    layer = torch.nn.Conv2d(3, 5, 1, bias=False)
    images = torch.rand(2, 3, 8, 8)
    operations, moved = roofline.counted(lambda: layer(images.transpose(2, 3)).detach())
    assert operations == 2 * 2 * 8 * 8 * 3 * 5
    assert moved == 4 * (images.numel() + 3 * 5 + 2 * 5 * 8 * 8)  # read, read, written


def test_the_backward_pass_counts_as_well():
    layer, images = torch.nn.Conv2d(3, 5, 1, bias=False), torch.rand(2, 3, 8, 8)
    forward, _ = roofline.counted(lambda: layer(images))
    both, _ = roofline.counted(lambda: layer(images).sum().backward())
    assert both == 2 * forward  # the images need no gradient


@pytest.mark.parametrize("space", [None, (16, 16, 32)])
def test_every_stage_is_timed_and_counted(monkeypatch, space):
    monkeypatch.setattr(bench, "SIDE", 32)
    monkeypatch.setattr(roofline, "REPEATS", 1)
    work = bench.Work(Numerics("cpu", "float32"), load(), space)
    rows = {row["stage"]: row for row in roofline.measure(work, {"float32": 1e12, "bytes": 1e10})}
    assert ("soft pseudo-masks" in rows) == (space is None)
    assert all(row["seconds"] > 0 and row["gigabytes"] > 0 for row in rows.values())
    assert rows["U-Net, training step"]["gigaoperations"] > 0 == rows["copy-paste"]["gigaoperations"]
    step = rows["whole step of BCP"]
    assert step["compute_share"] == pytest.approx(step["gigaoperations"] / 1e3 / step["seconds"])
