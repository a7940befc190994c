"""Tests and notebooks under pytest write to a temporary folder, at scale smoke: real results stay as they are."""

import os
import tempfile

os.environ["JOINT_OUTPUT"] = tempfile.mkdtemp(prefix="joint-test-")
os.environ["JOINT_SET"] = "scale=smoke"


def pytest_configure(config):
    config.addinivalue_line("markers", "browser: needs Chromium and its driver, and is skipped where they are missing")
