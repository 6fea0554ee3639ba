"""Whatever happens to the disk, the thread or the process: training goes on, and the run says what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import gradloc
from gradloc.cli.main import main
from gradloc.record import writer
from tests.conftest import make_net, train

ROOT = Path(__file__).parents[2]


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """The short version of ``benchmarks/kill.py``, which checks every window after every kill."""
    command = [sys.executable, str(ROOT / "benchmarks/kill.py"), "--kills", "3", "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["kills"] == 3
    # What was handed to the writer but not yet on disk, and the window in progress.
    assert found["steps_lost_at_most"] <= found["flush_every"] * (writer.QUEUE_LENGTH + 2)


def test_a_killed_run_is_told_from_one_that_is_at_work_or_closed(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
import gradloc
from tests.conftest import make_net, train
model, optimizer = make_net()
gradloc.wrap(optimizer, model, run={str(tmp_path / "r")!r}, every=1, flush_every=2)
train(model, optimizer, 5)
gradloc.recorder_of(optimizer)._thread.drain()
print("trained", flush=True)
sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "trained\n"
        assert gradloc.load_run(tmp_path / "r").problems == []  # another process is at work
        process.kill()
    killed = gradloc.load_run(tmp_path / "r")
    assert len(killed.problems) == 1
    assert killed.problems[0].startswith("recording was not closed: its process was killed")
    assert "after step 4 is missing" in killed.problems[0]
    first = gradloc.report(killed, show=False, wandb=False).findings[0]
    assert first.problem
    assert "not closed" in first.text
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=2, resume=True)
    train(model, optimizer, 2)
    gradloc.recorder_of(optimizer)._thread.drain()  # a window that is being written is an unfinished one
    assert gradloc.load_run(tmp_path / "r").problems == []  # at work in this process
    gradloc.recorder_of(optimizer).close()
    assert gradloc.load_run(tmp_path / "r").problems == []


def test_a_full_disk(tmp_path: Path) -> None:
    """The system refuses every file above a limit, as a full disk does; what was written before stays whole."""
    code = f"""
import resource, signal, warnings
import gradloc
from gradloc.record import writer
from tests.conftest import make_net, train
writer.RETRY_SECONDS = (0.01,)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model, optimizer = make_net()
gradloc.wrap(optimizer, model, run={str(tmp_path / "r")!r}, every=1, flush_every=2, snapshots=False)
recorder = gradloc.recorder_of(optimizer)
train(model, optimizer, 4)
recorder.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    train(model, optimizer, 4)
    recorder.flush()
assert len([w for w in caught if "could not be written" in str(w.message)]) == 1, [str(w.message) for w in caught]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
train(model, optimizer, 2)
recorder.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = gradloc.load_run(tmp_path / "r")
    assert sorted(run.store.windows()) == [0, 1, 4]
    assert run.evidence("head.weight").exposure == 6
    assert not list((tmp_path / "r").rglob("*.tmp"))
    assert any("windows [2, 3] are missing" in problem for problem in run.problems)
    assert sum("could not be written and is lost" in problem for problem in run.problems) == 2


def test_a_writer_thread_that_dies(tmp_path: Path) -> None:
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=2)
    recorder = gradloc.recorder_of(optimizer)
    train(model, optimizer, 2)
    recorder._thread.drain()
    recorder._thread._jobs.put(None)
    recorder._thread._thread.join()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 4)
        recorder.close()
    assert any("the writer thread died" in str(w.message) for w in caught)
    assert sorted(gradloc.load_run(tmp_path / "r").store.windows()) == [0]


def test_a_forked_process_leaves_the_run_alone(tmp_path: Path) -> None:
    """As a data loader's workers are: closing there must neither write nor release the parent's lock."""
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=2)
    recorder = gradloc.recorder_of(optimizer)
    train(model, optimizer, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that forking with threads is risky
        child = os.fork()
    if child == 0:
        recorder.flush()
        recorder.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    other, second = make_net()
    with pytest.raises(gradloc.errors.RunExistsError, match="another process"):
        gradloc.wrap(second, other, run=tmp_path / "r", resume=True)
    train(model, optimizer, 2)
    recorder.close()
    assert gradloc.load_run(tmp_path / "r").evidence("head.weight").exposure == 4


def test_leaving_the_process_closes_the_others_when_one_fails(tmp_path: Path) -> None:
    code = f"""
import shutil
import gradloc
from gradloc.record import writer
from tests.conftest import make_net, train
writer.RETRY_SECONDS = ()
for name, settings in (("a", {{"on_error": "raise"}}), ("b", {{}})):
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run={str(tmp_path)!r} + "/" + name, every=1, **settings)
    train(model, optimizer, 3)
shutil.rmtree({str(tmp_path / "a")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert "can't be written" in done.stderr
    assert gradloc.load_run(tmp_path / "b").store.last_step == 3


def test_a_working_directory_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run="runs/r", every=1, flush_every=2)
    train(model, optimizer, 2)
    gradloc.recorder_of(optimizer).flush()
    opened = gradloc.load_run("runs/r")
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(model, optimizer, 4)
    assert gradloc.report(show=False, wandb=False).data.final_step == 6
    gradloc.recorder_of(optimizer).close()
    assert opened.evidence("head.weight").exposure == 2
    assert not list((tmp_path / "elsewhere").iterdir())
    assert gradloc.load_run(tmp_path / "runs/r").evidence("head.weight").exposure == 6
    monkeypatch.chdir(tmp_path)
    assert gradloc.report(show=False, wandb=False).data.location == "runs/r"


def test_a_run_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("home", "work"):
        (tmp_path / place).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run="~/runs/r", every=1)
    train(model, optimizer, 2)
    gradloc.recorder_of(optimizer).close()
    assert (tmp_path / "home/runs/r/run.json").is_file()
    assert gradloc.load_run(Path("~/runs/r")).location == str(tmp_path / "home/runs/r")
    assert main(["report", "run=~/runs/r", "wandb=false"]) == 0
    assert (tmp_path / "home/runs/r/report.html").is_file()
    assert not list((tmp_path / "work").iterdir())
    with pytest.raises(gradloc.errors.ConfigError, match="home directory"):
        gradloc.load_run("~nobody-of-that-name/r")


def test_errors_are_raised_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(writer, "RETRY_SECONDS", ())
    model, optimizer = make_net()
    gradloc.wrap(optimizer, model, run=tmp_path / "r", every=1, flush_every=1, on_error="raise")
    shutil.rmtree(tmp_path / "r")
    with pytest.raises(gradloc.errors.StoreError, match="can't be written"):
        for _ in range(50):
            train(model, optimizer, 1)
            gradloc.recorder_of(optimizer)._thread.drain()
    gradloc.recorder_of(optimizer).close()
