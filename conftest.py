"""Tests and notebooks under pytest write to a temporary folder, at scale smoke: real results stay as they are."""

import os
import tempfile

os.environ["JOINT_OUTPUT"] = tempfile.mkdtemp(prefix="joint-test-")
os.environ["JOINT_SET"] = "scale=smoke"
