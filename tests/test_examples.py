"""Every example that needs no download runs, and says that it worked."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IN_ONE_PROCESS = {
    "wrap_an_optimizer.py": "report.html",
    "hf_trainer.py": "completed; mask exact: True",
    "lightning_module.py": "completed; mask exact: True",
    "accelerate_loop.py": "completed; mask exact: True",
}
NEEDS_A_DOWNLOAD = {"fine_tune_minilm.py"}


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {*IN_ONE_PROCESS, *NEEDS_A_DOWNLOAD, "ddp.py"}


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("name", IN_ONE_PROCESS)
def test_an_example_runs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trainers
        warnings.filterwarnings("error", message="gradloc")
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert IN_ONE_PROCESS[name] in capsys.readouterr().out


def test_the_example_with_two_processes_runs(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*launcher, str(ROOT / "examples/ddp.py")], env=environment, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes: completed; mask exact: True" in done.stdout
