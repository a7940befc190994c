"""What befalls a run on a user's own folder: spoilt files, full disks, permissions, too little memory.

Nothing finished is lost, and what is said is true. Runs that are stopped: test_stops.
"""

import contextlib
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from test_own import fill, scan, taken_in
from test_stops import of_space, outcome, settings_for

from lib import DataError
from lib.models import ResidualUNet
from lib.scans import __main__ as command
from lib.scans.reading.folder import nifti_files
from lib.scans.reading.store import Store
from lib.scans.segment import segment_folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder that has been segmented without an accident, and what came out."""
    folder = fill(tmp_path_factory.mktemp("own") / "mé dossier 影像", cases=7, labelled=5, slices=1)
    segment_folder(settings_for(folder))
    return folder, outcome(folder)


@pytest.fixture(scope="module")
def finished_volumes(tmp_path_factory):
    """As ``finished``, of volumes; fewer."""
    folder = of_space(tmp_path_factory.mktemp("own") / "volumes", "volumes", cases=3, labelled=2)
    segment_folder(settings_for(folder, space="volumes"))
    return folder, outcome(folder)


def flipped(content):
    """One byte of a file changed, in its middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


def halved(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("space", "spoil"),
    [
        ("slices", lambda content: b""),
        ("slices", halved),
        ("slices", flipped),
        ("volumes", halved),
        ("volumes", flipped),
    ],
)
def test_files_cut_short_or_changed_are_made_again(request, space, spoil):
    """All that lies under work, and the model: the run started again ends with the same bytes."""
    folder, before = request.getfixturevalue("finished_volumes" if space == "volumes" else "finished")
    for file in [*(folder / "out" / "work").rglob("*.*"), folder / "out" / "model.safetensors"]:
        if file.is_file():
            file.write_bytes(spoil(file.read_bytes()))
    segment_folder(settings_for(folder, space=space))
    after = outcome(folder)
    assert sorted(after) == sorted(before)
    assert [name for name in before if after[name] != before[name]] == []


FULL = "cannot be written to .*File too large.*make room; what is finished is kept"


@contextlib.contextmanager
def disk_of(size):
    """No file may grow beyond ``size`` bytes; what goes to the terminal is kept in memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.redirect_stderr(io.StringIO()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_the_run_and_nothing_finished_is_lost(finished, tmp_path):
    folder, before = finished
    new = fill(tmp_path / folder.name, cases=7, labelled=5, slices=1)
    for size in (3_000, 60_000, 2_000_000):  # reached in reading, by the cohort and by the weights
        with disk_of(size), pytest.raises(DataError, match=FULL):
            segment_folder(settings_for(new))
        assert not list((new / "out").rglob("*partial*"))
    assert len(Store(new / "out" / "work" / "scans" / "axial").index) == 7
    lost = folder / "out" / "case 3_confidence.nii.gz"
    lost.unlink()
    with disk_of(300), pytest.raises(DataError, match=FULL):
        segment_folder(settings_for(folder))
    assert {name: content for name, content in before.items() if "case 3_conf" not in name} == outcome(folder)
    segment_folder(settings_for(folder))
    assert lost.read_bytes() == before["out/" + lost.name]


@contextlib.contextmanager
def unprivileged():
    """Who runs the tests as root, whom no permission stops, is nobody for a while."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_may_not_be_read_or_written_is_named():
    with tempfile.TemporaryDirectory() as name:
        folder = fill(Path(name), cases=2, labelled=1, slices=1)
        folder.chmod(0o777)
        (folder / "scans").mkdir(mode=0o777)
        (folder / "scans").chmod(0o777)
        for file in ("scans/images.bin", "scans/labels.bin", "scans/index.jsonl"):
            (folder / file).touch()
            (folder / file).chmod(0o666)
        (folder / "images" / "case 0.nii.gz").chmod(0)
        (folder / "out").mkdir(mode=0o555)
        with unprivileged():
            intake, _ = taken_in(settings_for(folder), folder)
            with pytest.raises(DataError, match="out cannot be written to .Permission denied.: give another output"):
                segment_folder(settings_for(folder))
        assert [case.name for case in intake.cases] == ["case 1"]
        assert "case 0.nii.gz cannot be read (Permission denied)" in intake.failures["case 0"]
        (folder / "images").chmod(0)
        with unprivileged(), pytest.raises(DataError, match="images cannot be read .Permission denied"):
            nifti_files(folder / "images", "images")
        (folder / "images").chmod(0o755)


@pytest.fixture
def memory(monkeypatch):
    """``memory.most``: how many images a segmentation network has room for."""

    class Memory:
        most = 0

    forward = ResidualUNet.forward

    def crowded(network, images, *more):
        if len(images) > Memory.most:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you "
                "tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"
            )
        return forward(network, images, *more)

    monkeypatch.setattr(ResidualUNet, "forward", crowded)
    return Memory


def test_one_labelled_image_and_little_memory_give_masks_that_are_all_to_be_reviewed(tmp_path, memory, capsys):
    folder = fill(tmp_path, cases=3, labelled=1, slices=1)
    memory.most = 8
    settings = settings_for(folder)
    settings.strong.training["batch"] = 16
    table = segment_folder(settings)
    assert "training: out of memory with batches of 1/1" in capsys.readouterr().out
    assert (table["status"] == "done").all() and table["predicted_dsc"].isna().all() and table["review"].all()
    assert pd.read_csv(folder / "out" / "held_out.csv").empty


def test_the_command_names_what_failed_and_its_status_says_so(finished, tmp_path, monkeypatch, capsys):
    folder = fill(tmp_path, cases=1, labelled=0, slices=1)
    (folder / "images" / "bad.nii").write_bytes(b"no")
    (folder / "images" / "none.nii.gz").touch()
    model = str(finished[0] / "out" / "model.safetensors")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["own", str(folder / "images"), str(folder / "out"), "--model", model])
    with pytest.raises(SystemExit) as left:
        command.main()
    said = capsys.readouterr()
    assert left.value.code == 1 and "1 of 3 cases are segmented, 3 to be reviewed" in said.out
    assert "failed: bad: " in said.err and "none.nii.gz is empty: export or download it again" in said.err
    monkeypatch.setattr(sys, "argv", ["own", str(folder / "nowhere"), str(folder / "out"), "--model", model])
    with pytest.raises(SystemExit, match="error: .*nowhere is not a folder: give the one that holds the images"):
        command.main()


def test_out_of_memory_is_met_with_smaller_batches_and_loses_nothing(finished, tmp_path, memory):
    folder, before = finished
    model = str(folder / "out" / "model.safetensors")
    deep = fill(tmp_path, cases=1, labelled=0, slices=300)
    memory.most = 100
    table = segment_folder(settings_for(deep, masks="", model=model))
    assert table["status"].tolist() == ["done"] and table["slices"].tolist() == [300]
    mask = (deep / "out" / "case 0_mask.nii.gz").read_bytes()
    memory.most = 0
    nib.save(nib.Nifti1Image(scan(9)[0], np.eye(4)), deep / "images" / "new.nii.gz")
    table = segment_folder(settings_for(deep, masks="", model=model))
    assert table["status"].tolist() == ["done", "failed"] and "out of memory even with an eighth" in table["note"][1]
    assert (deep / "out" / "case 0_mask.nii.gz").read_bytes() == mask
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "out" / "model.safetensors").unlink()
    shutil.rmtree(copy / "out" / "work" / "checkpoints")
    with pytest.raises(DataError, match="training: out of memory even with an eighth of the batch: lower folder.size"):
        segment_folder(settings_for(copy))
    kept = {name: content for name, content in before.items() if "_mask" in name or "_conf" in name or ".csv" in name}
    assert len(kept) == 16 and kept.items() <= outcome(copy).items()


def test_empty_masks_are_noted_and_nothing_but_empty_masks_is_an_error(tmp_path):
    folder = fill(tmp_path, cases=3, labelled=2, slices=1)
    for k in range(2):
        nothing = nib.Nifti1Image(np.zeros((40, 36, 1), np.uint8), np.diag([-2.0, 1.0, 4.0, 1.0]))
        nib.save(nothing, folder / "masks" / f"case {k}.nii.gz")
        if k == 0:
            intake, store = taken_in(settings_for(folder), tmp_path)
            assert list(intake.notes) == ["case 0"] and "marks nothing" in intake.notes["case 0"]
    with pytest.raises(DataError, match="mark nothing: draw at least one structure"):
        segment_folder(settings_for(folder))
