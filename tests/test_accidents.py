"""What befalls a run on a user's own folder: nothing finished is lost, and what is said is true."""

import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from test_own import fill, scan, taken_in

from lib import DataError
from lib.models import ResidualUNet
from lib.runs import params
from lib.scans import __main__ as command
from lib.scans.reading.folder import nifti_files
from lib.scans.reading.store import Store
from lib.scans.segment import segment_folder

SMALL = {
    "scale": "smoke",
    "folder.size": 32,
    "scales.smoke.strong.training.steps": 2,
    "scales.smoke.strong.training.batch": 4,
    "pseudo_masks.n": 1,
    "folder.method": "joint+",  # the longest way: registration, then training
    "registration.batch": 2,
}


def settings_for(folder, **changes):
    settings = params.load("strong", "folder", changes=[f"{key}={value}" for key, value in SMALL.items()])
    settings.folder |= {"images": str(folder / "images"), "masks": str(folder / "masks"), "output": str(folder / "out")}
    settings.folder |= changes
    return settings


def outcome(folder):
    """All bytes of a finished run, but for checkpoints, costs and logs, which hold times, in any order."""
    files = [file for file in (folder / "out").rglob("*") if file.is_file()]
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in files
        if not {"checkpoints", "scans", "cases.jsonl", "costs"} & {*file.parts}
    }


def of_space(folder, space, **options):
    """Made-up scans that are single slices, or volumes."""
    return fill(folder, slices=1 if space in ("slices", "regions") else 12, **options)


def seen_as(space):
    """What of section ``folder`` says so; ``regions`` are slices of a region that is found first."""
    return {"space": "slices", "region": "found"} if space == "regions" else {"space": space}


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


def start(folder, log):
    """The command, on a folder, as a process of its own."""
    words = [sys.executable, "-m", "lib.scans", folder / "images", folder / "out", "--masks", folder / "masks"]
    words += [word for key, value in SMALL.items() for word in ("-S", f"{key}={value}")]
    with open(log, "wb") as stream:
        return subprocess.Popen(words, cwd=params.ROOT, stdout=stream, stderr=stream)


STAGES = [
    (signal.SIGTERM, lambda text, out: "reading:" in text),
    (signal.SIGINT, lambda text, out: "registration:" in text),
    (signal.SIGTERM, lambda text, out: "before fusion:" in text),
    (signal.SIGKILL, lambda text, out: "neighbours:" in text),
    (signal.SIGTERM, lambda text, out: "joint+:  " in text),
    (signal.SIGKILL, lambda text, out: "elastic:" in text),
    (signal.SIGKILL, lambda text, out: any(out.glob("case*_mask.nii.gz"))),
]


def test_a_run_stopped_in_every_stage_ends_with_the_same_bytes(tmp_path):
    whole, stopped = (fill(tmp_path / f"{name} 影像", cases=7, labelled=5, slices=1) for name in ("whole", "stopped"))
    log = tmp_path / "log"
    process, limit = start(whole, log), time.monotonic() + 300
    while "reading:" not in log.read_text():
        assert time.monotonic() < limit and process.poll() is None, log.read_text()
        time.sleep(0.005)
    with pytest.raises(DataError, match="another run is at work"):
        segment_folder(settings_for(whole))
    assert process.wait() == 0, log.read_text()
    for number, reached in STAGES:
        process = start(stopped, log)
        while not reached(log.read_text(), stopped / "out"):
            assert time.monotonic() < limit and process.poll() is None, log.read_text()
            time.sleep(0.005)
        process.send_signal(number)
        process.wait()
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 128 + number
            assert f"stopped by {number.name}: the same command goes on from here" in log.read_text()
    masks = {file: file.stat().st_mtime_ns for file in (stopped / "out").glob("case*_mask.nii.gz")}
    process = start(stopped, log)
    assert process.wait() == 0 and "7 of 7 cases are segmented" in log.read_text(), log.read_text()
    again = [file for file, written in masks.items() if file.stat().st_mtime_ns != written]
    assert 0 < len(masks) < 7 and len(again) <= 1  # the one whose confidence map was not yet there
    found, expected = (
        {name.replace(folder.name, ""): content for name, content in outcome(folder).items()}
        for folder in (stopped, whole)
    )
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def struck_at_every_write(folder, accident, space):
    """Segment a folder again and again, each run until it meets a write at which no run before has been struck.

    To be called in a process that has computed nothing: it forks, as imports are the most of so short a run, and
    threads do not live on in a fork.

    Args:
        accident: ``killed``, with the last bytes not yet on the disk, or ``full``, which the disk is.
        space: see seen_as.

    Returns:
        Names of the files at which runs were struck, and the texts that they ended with, ``""`` where killed.
    """
    import monai.metrics  # noqa: F401 - by every run otherwise

    folder = Path(folder)
    seen, said = folder / "seen", folder / "said"
    seen.touch()

    def strike(descriptor):
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        known = [len(log.read_text().splitlines()) for log in (folder / "out" / "work").rglob("*.jsonl")]
        write = f"{sum(known)}/{file.name.removeprefix('.partial.')}"
        if write in seen.read_text().splitlines():
            return
        with open(seen, "a") as stream:
            stream.write(write + "\n")
        if accident == "killed":
            os.truncate(file, file.stat().st_size - 7)
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    texts = []
    while True:
        said.write_text("")
        child = os.fork()
        if not child:
            os.fsync = strike
            try:
                command.segment(settings_for(folder, **seen_as(space)))
                os._exit(0)
            except DataError as error:
                said.write_text(str(error))
            finally:
                os._exit(1)
        if os.waitpid(child, 0)[1] == 0:
            return [write.split("/")[1] for write in seen.read_text().splitlines()], texts
        texts.append(said.read_text())


@pytest.fixture
def one_thread():
    """Sums by several threads differ in the last bits from those by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("accident", "space"), [("killed", "volumes"), ("killed", "views"), ("killed", "regions"), ("full", "slices")]
)
def test_a_run_struck_at_every_single_write_ends_with_the_same_bytes(tmp_path, one_thread, accident, space):
    """Also what the clock cannot aim at: quick networks, calibration, model, summary and pictures."""
    labelled = 1 if space in ("views", "regions") else 2  # no quick networks there: they are as of the other kinds
    whole, struck = (
        of_space(tmp_path / name / "folder", space, cases=3, labelled=labelled) for name in ("whole", "struck")
    )
    call = "import sys, json, test_accidents; print(json.dumps(test_accidents.struck_at_every_write(*sys.argv[1:])))"
    command.segment(settings_for(whole, **seen_as(space)))
    surroundings = {"PYTHONPATH": f"{params.ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-c", call, str(struck), accident, space],
        capture_output=True,
        text=True,
        cwd=params.ROOT,
        env={**os.environ, **surroundings},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    writes, texts = json.loads(done.stdout.splitlines()[-1])
    expected = (
        "images.bin labels.bin index.jsonl held_out.csv model.safetensors cases.jsonl cases.csv confidence.png "
        "least_certain.png"
    )
    seen = {
        "volumes": ["volumes"],
        "views": ["axial", "sagittal", "coronal"],
        "slices": ["axial"],
        "regions": ["axial"],
    }[space]
    cohorts = {f"{view}_0.npz" for view in seen} | {f"{seen[0]}_{k}.npz" for k in (1, 2) if labelled > 1}
    assert {*expected.split(), *cohorts, "case 0_mask.nii.gz", "case 2_confidence.nii.gz"} <= {*writes}
    assert sum(name.endswith(".pt") for name in writes) >= 5 and len(texts) == len(writes)
    for text in texts:
        assert text == "" if accident == "killed" else "make room; what is finished is kept, and the same" in text, text
    found, sound = outcome(struck), outcome(whole)
    assert sorted(found) == sorted(sound)
    assert [name for name in sound if found[name] != sound[name]] == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_loses_is_raised_again(tmp_path, monkeypatch, capsys):
    """What a destructor raises is discarded: without a second attempt the run would go on as if nothing had come."""

    class Destroyed:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # the signal's handler runs here

    def work(settings):
        Destroyed()
        came_through.append("the destructor")
        time.sleep(30)
        came_through.append("the stop")

    came_through = []
    monkeypatch.setattr(command, "segment_folder", work)
    monkeypatch.setattr(command, "AGAIN", 0.2)
    monkeypatch.setattr(sys, "argv", ["own", str(tmp_path), str(tmp_path / "out")])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    try:
        with pytest.raises(SystemExit) as left:
            command.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert left.value.code == 128 + signal.SIGTERM and came_through == ["the destructor"]
    assert "stopped by SIGTERM: the same command goes on from here" in capsys.readouterr().err
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


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
