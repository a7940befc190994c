"""Tests and notebooks under pytest write to a temporary folder, at scale smoke: real results stay as they are."""

import os
import tempfile

import pytest

os.environ["JOINT_OUTPUT"] = tempfile.mkdtemp(prefix="joint-test-")
os.environ["JOINT_SET"] = "scale=smoke,device=cpu"  # tests compare bytes: a GPU adds in no fixed order
if "PYTEST_XDIST_WORKER" in os.environ:  # several at a time, each on one core
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "browser: needs Chromium and its driver, and is skipped where they are missing")


def group_of(item):
    """Notebooks go on from one another, and tests of one file share what is costly: each stay on one core."""
    return "notebooks" if item.path.suffix == ".ipynb" else item.path.stem


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if config.getoption("dist", "no") == "loadgroup" or "PYTEST_XDIST_WORKER" in os.environ:
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group_of(item)))
        items.sort(key=lambda item: group_of(item) not in ("notebooks", "test_training"))  # the longest first
