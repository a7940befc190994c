"""Fails where dvc.lock is not what dvc.yaml, params.yaml, lib and the notebooks' code now say.

Large outputs are not in git, so a fresh clone may miss them: what is *missing* is fine, what is *different* is not.
"""

import json
import subprocess
import sys

MISSING = ("deleted", "not in cache")
status = json.loads(subprocess.run(["dvc", "status", "--json"], capture_output=True, text=True, check=True).stdout)
stale = []
for stage, changes in status.items():
    for change in changes:
        if isinstance(change, str):  # "changed command"
            stale.append(f"{stage}: {change}")
            continue
        for kind, files in change.items():
            stale += [f"{stage}: {kind}: {file}: {what}" for file, what in files.items() if what not in MISSING]
print("\n".join(stale) or f"dvc.lock is current: {len(status)} stages lack only files that git does not keep")
sys.exit(bool(stale))
