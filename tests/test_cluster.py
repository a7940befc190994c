import io
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pandas as pd
import psutil
import pytest
from test_training import made_up_cohort

from lib.results import grid
from lib.runs import cluster, params

ITEM = grid.Item("strong", 20, 1, "", "elastic")
PATIENCE = 120  # seconds


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A small cohort in a folder of its own; training takes some seconds."""
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    monkeypatch.setenv("JOINT_SET", "scale=smoke,device=cpu,scales.smoke.strong.training.steps=150")
    settings = params.load()
    made_up_cohort().save(params.cohort_file(settings))
    return settings


def wait_until(true):
    """What ``true()`` gives, as soon as it is something."""
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    return found


def run_whole(settings):
    """Run the item without a disturbance: (its results without what it took; its notebook).

    Everything is removed again.
    """
    files = grid.run(ITEM, settings, 1, {})
    grid.shutil.rmtree(grid.folder_of(ITEM, settings))
    grid.shutil.rmtree(params.work_folder("checkpoints"))
    executed = params.work_folder("notebooks", "grid", settings.cohort, ITEM.name, "12_peers.ipynb")
    executed.unlink()
    return untimed(files), executed


def untimed(files):
    """Results of an item without what it took: minutes differ from run to run."""
    files = {name: content for name, content in files.items() if name != "item.json"}
    course = pd.read_csv(io.BytesIO(files.pop("course.csv"))).drop(columns="minutes")
    return {**files, "course": course.to_csv()}


def test_an_item_whose_worker_is_killed_goes_to_another_one_and_ends_with_the_same_bytes(settings):
    whole, executed = run_whole(settings)
    with cluster.connect(settings, 2) as client:
        (future,) = grid.submit(client, [[ITEM]], settings, 1)
        wait_until(executed.exists)
        (address,) = [address for address, tasks in client.processing().items() if tasks]
        pid = client.run(os.getpid)[address]
        children = wait_until(lambda: len(found := psutil.Process(pid).children(recursive=True)) > 1 and found)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
        again = future.result(timeout=PATIENCE)
    assert untimed(again) == whole and grid.is_done(ITEM, settings)


@contextmanager
def scheduler_at(port):
    """A scheduler and a worker as somebody else would start them; yields the scheduler, and kills both in the end."""
    address, started = f"tcp://127.0.0.1:{port}", []
    for kind, words in ("scheduler", ["--host", "127.0.0.1", "--port", str(port)]), ("worker", [address]):
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", *words, "--no-dashboard"]
        started.append(subprocess.Popen(command, cwd=params.ROOT, stderr=subprocess.DEVNULL))
    try:
        yield started[0]
    finally:
        for process in started:
            for child in (*psutil.Process(process.pid).children(recursive=True), process):
                child.kill()
            process.wait()


def test_items_go_on_when_a_scheduler_that_was_gone_is_back_and_end_with_the_same_bytes(settings, monkeypatch, capsys):
    whole, executed = run_whole(settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("CLUSTER", f"tcp://127.0.0.1:{port}")
    monkeypatch.setenv("JOINT_SET", os.environ["JOINT_SET"] + ",grid.threads=1")  # as above: it rounds differently
    monkeypatch.setattr(grid, "groups_of", lambda settings: [[ITEM]])
    with ThreadPoolExecutor(1) as pool:
        with scheduler_at(port) as scheduler:
            status = pool.submit(grid.main)
            wait_until(executed.exists)
            scheduler.kill()
            wait_until(lambda: "scheduler is gone" in capsys.readouterr().err)
        assert not status.done()
        with scheduler_at(port):
            assert status.result(timeout=PATIENCE) == 0
    found = {file.name: file.read_bytes() for file in grid.folder_of(ITEM, settings).iterdir()}
    assert untimed(found) == whole


def test_a_process_dies_with_the_one_that_has_started_it():
    code = (
        "import subprocess, time; from lib.runs import cluster\n"
        "print(subprocess.Popen(['sleep', '100'], preexec_fn=cluster.die_with_parent).pid, flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=params.ROOT)
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.wait()
    wait_until(lambda: not child.is_running() or child.status() == "zombie")


@pytest.mark.parametrize(
    "address, says", [("somewhere", "is not one of slurm, kubernetes or an address"), ("slurm", "pip install dask-job")]
)
def test_an_address_that_is_none_and_a_missing_package_are_named(settings, monkeypatch, address, says):
    monkeypatch.setenv("CLUSTER", address)
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ValueError, match=says), cluster.connect(settings, 1):
        pass


def test_slurm_gets_its_options_and_as_many_workers_as_are_asked_for(settings, monkeypatch):
    asked = {}

    class SLURMCluster:
        def __init__(self, **options):
            asked.update(options)

        def scale(self, workers):
            asked["workers"] = workers
            raise InterruptedError  # before a client looks for a scheduler

    monkeypatch.setitem(sys.modules, "dask_jobqueue", type(sys)("dask_jobqueue"))
    sys.modules["dask_jobqueue"].SLURMCluster = SLURMCluster
    settings.cluster |= {"address": "slurm", "options": {"queue": "gpu", "cores": 8}}
    with pytest.raises(InterruptedError), cluster.connect(settings, 5):
        pass
    one_at_a_time = {"cores": 1, "processes": 1, "job_cpu": 8}
    assert asked == {"queue": "gpu", **one_at_a_time, "workers": 5}
    settings.grid["threads"] = 0
    assert cluster.threads_of(settings, 5) == 8  # all cores of the job
    settings.cluster["address"] = ""
    assert cluster.threads_of(settings, 1) == os.cpu_count() and cluster.threads_of(settings, 1000) == 1
    settings.grid["threads"] = 3
    assert cluster.threads_of(settings, 5) == 3


JOB_SCRIPT = """#!/usr/bin/env bash

#SBATCH -J dask-worker
#SBATCH -p gpu
#SBATCH -n 1
#SBATCH --cpus-per-task=8
#SBATCH --mem=30G
#SBATCH -t 02:00:00
#SBATCH --gres=gpu:1

PYTHON -m distributed.cli.dask_worker ADDRESS --name dummy-name --nthreads 1 --memory-limit 29.80GiB --nanny \
--death-timeout 60
"""


def test_the_job_script_of_slurm_asks_for_what_the_options_say_and_runs_one_piece_of_work_at_a_time():
    options = {"queue": "gpu", "cores": 8, "memory": "32GB", "walltime": "02:00:00"}
    with cluster.made("slurm", {**options, "job_extra_directives": ["--gres=gpu:1"]}) as made:
        script = made.job_script().replace(sys.executable, "PYTHON").replace(made.scheduler_address, "ADDRESS")
    assert script.strip() == JOB_SCRIPT.replace("\\\n", "").strip()


def test_a_running_scheduler_is_used_as_it_is(settings):
    with cluster.connect(settings, 1) as first:
        address = first.scheduler.address
        settings.cluster["address"] = address
        with cluster.connect(settings, 7) as client:
            assert client.scheduler.address == address and len(client.scheduler_info()["workers"]) == 1
            assert client.submit(sum, [1, 2]).result(timeout=PATIENCE) == 3
        assert first.submit(sum, [1, 2]).result(timeout=PATIENCE) == 3  # it goes on when its second client has left


def test_workers_of_this_machine_share_its_gpus_in_turn(monkeypatch):
    worker = type("Worker", (), {"name": 3})
    monkeypatch.setattr("distributed.get_worker", lambda: worker)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert cluster.own_gpu() == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert cluster.own_gpu() == {}
    worker.name = "tcp://10.0.0.7:4567"  # of a cluster, which has given it its GPU
    assert cluster.own_gpu() == {}


def test_work_comes_back_in_order_and_little_is_given_out_at_a_time(settings):
    with cluster.connect(settings, 1) as client:
        asked, lists = [], (range(20), "abcdefghijklmnopqrst")
        found = cluster.mapped(
            client, lambda number, letter: f"{number}{letter}", (asked.append(k) or k for k in lists[0]), lists[1]
        )
        assert next(found) == "0a" and len(asked) == cluster.AHEAD
        assert [*found] == [f"{k}{letter}" for k, letter in zip(*lists)][1:]
        together = cluster.mapped(client, pow, range(20), (asked.append(k) or 2 for k in range(20)), size=3)
        asked.clear()
        assert next(together) == 0 and len(asked) == 3 * cluster.AHEAD
        assert [*together] == [k**2 for k in range(1, 20)]
    assert [*cluster.mapped(None, pow, [2, 3], [3, 2])] == [8, 9]


def test_small_items_are_handed_out_together_unless_workers_would_run_out_of_them():
    assert cluster.together(100_000, 2) == cluster.TOGETHER and cluster.together(100_000, 1000) == 12
    assert cluster.together(30, 2) == 1 and cluster.together(0, 1) == 1
