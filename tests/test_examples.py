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

from tests.processes import launch

ROOT = Path(__file__).parents[1]
IN_ONE_PROCESS = {
    "wrap_an_optimizer.py": "report.html",
    "hf_trainer.py": "completed; mask exact: True",
    "lightning_module.py": "completed; mask exact: True",
    "accelerate_loop.py": "completed; mask exact: True",
    "cnn.py": "of the second convolution's kernels: accuracy",
    "lstm.py": "blocks hold",
    "shards_with_duckdb.py": "The hidden units that most samples pull at:",
}
FEWER = {"cnn.py": "3", "lstm.py": "40"}
"""Epochs or steps for a test, where an example takes them."""
NEEDS_A_DOWNLOAD = {"fine_tune_minilm.py"}


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {
        *IN_ONE_PROCESS,
        *NEEDS_A_DOWNLOAD,
        "ddp.py",
        "decompose_and_serve.py",
    }


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("name", IN_ONE_PROCESS)
def test_an_example_runs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [name, *([FEWER[name]] if name in FEWER else [])])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trainers
        warnings.filterwarnings("error", message="gradloc")
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert IN_ONE_PROCESS[name] in capsys.readouterr().out


def test_the_example_with_two_processes_runs(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = launch([*launcher, str(ROOT / "examples/ddp.py")], environment, tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes: completed; mask exact: True" in done.stdout


def test_what_was_decomposed_is_served_by_a_fresh_process(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/decompose_and_serve.py"), "3"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fresh process: certificate passed: True" in done.stdout
    assert "served 40 requests" in done.stdout
