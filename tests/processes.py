"""Starts trainings of several processes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ABORTED = "terminate called without an active exception"
"""What torch 2.13 on gloo says when a process ends while its peer's connection closes. On a machine with other work a bare
DistributedDataParallel loop does so, too: one of seven runs."""
TRIES = 4


def launch(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Runs a command; again in an emptied folder where torch aborted at the end, which says nothing of gradloc."""
    for _ in range(TRIES):
        done = subprocess.run(
            list(command), env=dict(environment), capture_output=True, text=True, timeout=timeout, check=False
        )
        if done.returncode == 0 or ABORTED not in done.stderr:
            break
        shutil.rmtree(folder)
        folder.mkdir()
    return done
