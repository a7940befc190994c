"""A run on a user's own folder that is stopped, at any moment: started again, it ends with the same bytes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_own import fill

from lib import DataError
from lib.runs import params
from lib.scans import __main__ as command
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
    return {"space": "slices", "region": "localised"} if space == "regions" else {"space": space}


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
    call = "import sys, json, test_stops; print(json.dumps(test_stops.struck_at_every_write(*sys.argv[1:])))"
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
