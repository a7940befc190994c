"""Where many pieces of work run: on the cores of this machine, or on a cluster, by Dask.

What the pieces share is files. A worker that dies is replaced, its piece goes to another one and resumes from its last
checkpoint, where the workers share a folder. Dask carries what is small.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import CancelledError
from contextlib import contextmanager
from itertools import islice

from lib import DataError
from lib.runs.params import ROOT, work_folder

SHARED = "JOINT_"  # environment variables that begin so hold on every worker as they do here
AHEAD = 4  # pieces of work
TOGETHER = 16  # small items that are one piece of work, at most: handing out a piece takes milliseconds,
SHARES = 8  # and at least so many pieces a worker, so that all of them end at about the same time
LOSSES = 30  # workers that may die under a piece of work before it is given up: nodes are drained, and jobs run out
SECONDS_BETWEEN_LOOKS = 2
PATIENCE = 1800  # seconds for which a scheduler that is gone is waited for
EXTRAS = {"slurm": "dask-jobqueue", "kubernetes": "dask-kubernetes"}


def address_of(settings):
    """Where the workers are; empty: on this machine."""
    return os.environ.get("CLUSTER", settings.cluster.address)


@contextmanager
def connect(settings, workers, patience=0):
    """A dask.distributed.Client of as many workers, closed in the end together with whatever it has started.

    Args:
        settings: as params.load gives them. Section ``cluster`` says where; the environment variable ``CLUSTER``
            stands in for its address.
        workers: at most so many pieces of work run at a time. A running scheduler has the workers that it has.
        patience: seconds for which an address is tried again.

    Raises:
        ValueError: an address that is none, or a package that is missing; the message says what to do.
        OSError: no scheduler answers at the address.
    """
    import dask
    from distributed import Client, LocalCluster

    options, address = settings.cluster.options, address_of(settings)
    dask.config.set({"distributed.comm.timeouts.connect": "20s", "distributed.scheduler.allowed-failures": LOSSES})
    started = None
    if not address:
        started = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=0,  # what takes memory are processes of the pieces of work
            dashboard_address="127.0.0.1:0",
            local_directory=str(work_folder("dask")),
        )
    elif address in EXTRAS:
        started = made(address, options)
        started.scale(workers)
    elif "://" not in address:
        raise ValueError(
            f"cluster '{address}' is not one of {', '.join(EXTRAS)} or an address such as tcp://host:8786; leave it "
            "empty for the cores of this machine"
        )
    end = time.monotonic() + patience
    while True:
        try:
            client, over = Client(started or address), threading.Event()
            break
        except OSError:
            if time.monotonic() > end:
                raise
    if started:
        threading.Thread(target=keep, args=(started, workers, over), daemon=True).start()
    try:
        yield client
    finally:
        over.set()
        client.close()
        if started:
            started.close()


def keep(started, workers, over):
    """Ask a cluster for its workers again and again: Dask gives up one that dies while it starts."""
    while not over.wait(SECONDS_BETWEEN_LOOKS):
        started.scale(workers)


def made(kind, options):
    """A cluster of one of EXTRAS with the options of its class.

    A job of Slurm runs one piece of work at a time, on all of its ``cores``; the package's own default is as many
    pieces as cores.
    """
    try:
        if kind == "slurm":
            from dask_jobqueue import SLURMCluster

            cores = options.get("cores")
            one_at_a_time = {"cores": 1, "processes": 1} | ({"job_cpu": cores} if cores else {})
            return SLURMCluster(**{**options, **one_at_a_time})
        from dask_kubernetes.operator import KubeCluster
    except ImportError as error:
        raise ValueError(f"cluster '{kind}' needs a package: pip install {EXTRAS[kind]}") from error
    return KubeCluster(**options)


def threads_of(settings, workers):
    """Threads of a piece of work: ``grid.threads``, or all cores of a Slurm job, or a share of this machine's."""
    cores = settings.cluster.options.get("cores") if address_of(settings) == "slurm" else None
    return settings.grid.threads or cores or max(1, (os.cpu_count() or 1) // workers)


def together(count, workers):
    """How many of ``count`` small items are one piece of work."""
    return max(1, min(TOGETHER, count // (SHARES * workers)))


def several(work, items):
    """What ``work`` gives for every one of ``items``, which are tuples of its arguments."""
    return [work(*item) for item in items]


def mapped(client, work, *lists, size=1):
    """What ``work`` gives for the items of the lists, in their order.

    At most AHEAD pieces of work a worker are given out at a time: what has been done need not lie in memory.

    Args:
        client: of ``connect``; None does the work here.
        size: items that are one piece of work.

    Raises:
        DataError: the scheduler is gone.
    """
    if client is None:
        yield from map(work, *lists)
        return
    waiting = deque()
    try:
        every = zip(*lists)
        while items := tuple(islice(every, size)):
            waiting.append(client.submit(several, work, items, pure=False))
            while len(waiting) >= AHEAD * max(1, len(client.nthreads())):
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except CancelledError as error:
        raise DataError("the scheduler is gone: what is finished is kept, and the same command goes on") from error


def shared_environment():
    """The environment variables that pieces of work need on every worker."""
    return {name: value for name, value in os.environ.items() if name.startswith(SHARED)}


def own_gpu():
    """Environment of a piece of work that gives each worker of this machine one of its GPUs, in turn.

    Empty where there is at most one, and on the workers of a cluster, whose scheduler gives them theirs.
    """
    from distributed import get_worker

    try:
        number = get_worker().name
    except ValueError:  # not on a worker at all
        return {}
    if not isinstance(number, int):
        return {}
    import torch

    count = torch.cuda.device_count()
    return {"CUDA_VISIBLE_DEVICES": str(number % count)} if count > 1 else {}


def process(command, environment):
    """Run a command from the repository's folder, on the GPU of this worker, and take down what it prints.

    Returns:
        subprocess.CompletedProcess, with text.
    """
    return subprocess.run(
        command,
        env=environment | own_gpu(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=die_with_parent,
    )


def die_with_parent():
    """To be called in a new process (``preexec_fn``): Linux kills it when the worker that has started it dies.

    Otherwise it would go on beside the one that another worker starts in its place.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of sys/prctl.h
